"""Layers to time: shapes of known models with random weights, and the routing of batches that wake them.

Routing is drawn, layer by layer and seeded. The logit of token t for expert e is

    0.5 * popularity[e] + 0.5 * topic[e] + noise[t, e]

with all three normal of variance 1: `popularity` belongs to the layer, `topic` to the batch, `noise` to the token. This
is "skewed" routing: some experts are wanted by everybody, and tokens of one batch resemble each other, as in text. At
T = 16 a layer of Qwen3-30B-A3B's shape wakes some 58 of 128 experts so. Under "uniform" routing, `popularity` and
`topic` are 0, and it wakes 82. Every figure stands beside the mean number of active experts that it was measured at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lynx.kernels import ExpertWeights, StandInWeights
from lynx.kernels.gates import recognise
from lynx.routing import Phase, Role, Routing, WeightRule

Kind = Literal["skewed", "uniform"]
RANK = 8  # of stand-ins
POPULARITY, TOPIC = 0.5, 0.5


@dataclass(frozen=True, slots=True)
class Shape:
    """One model's MoE layer.

    Attributes:
        name: The model, and what was scaled down.
        family: transformers' `model_type`.
        E: Experts.
        k: Experts per token.
        H: Hidden size.
        I: Expert size.
        rule: How the router weighs experts.
        experts: Name of the config's field for E.
        size: Name of the config's field for I.
        divisor: What H and I are divided by on a CPU.
        groups: Groups of experts, and how many of them a token may choose from; (1, 1) for no groups.
    """

    name: str
    family: str
    E: int
    k: int
    H: int
    I: int  # noqa: E741
    rule: WeightRule
    experts: str
    size: str
    divisor: int
    groups: tuple[int, int] = (1, 1)

    def divided(self, by: int) -> Shape:
        """The same layer with H and I divided; E and k, which decide the routing, stay."""
        if by == 1:
            return self
        return replace(self, name=f"{self.name}, H/{by}, I/{by}", H=self.H // by, I=self.I // by)


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("Mixtral-8x7B", "mixtral", 8, 2, 4096, 14336, WeightRule(), "num_local_experts", "intermediate_size", 8),
        Shape("Qwen3-30B-A3B", "qwen3_moe", 128, 8, 2048, 768, WeightRule(), "num_experts", "moe_intermediate_size", 2),
        Shape(
            "OLMoE-1B-7B", "olmoe", 64, 8, 2048, 1024, WeightRule(renormalise=False),
            "num_experts", "intermediate_size", 2,
        ),
        Shape(
            "gpt-oss-120b", "gpt_oss", 128, 4, 2880, 2880, WeightRule("softmax_over_chosen"),
            "num_local_experts", "intermediate_size", 4,
        ),
        Shape(
            "DeepSeek-V3", "deepseek_v3", 256, 8, 7168, 2048, WeightRule("sigmoid", scale=2.5),
            "n_routed_experts", "moe_intermediate_size", 8, groups=(8, 4),
        ),
    )
}  # fmt: skip
# gpt-oss ships its experts in 4 bits. Here they are bfloat16, as after dequantising; DeepSeek-V3's 8-bit ones likewise.


@dataclass(slots=True)
class Layer:
    """One layer's experts, for transformers and for Lynx: the same memory.

    Attributes:
        shape: Its shape.
        module: transformers' own experts module.
        weights: The same weights as Lynx takes them.
        popularity: `(E,)`, see above.
        standins: Stand-ins of rank `RANK`, random: what they answer is of no use, how long they take is.
    """

    shape: Shape
    module: Any
    weights: ExpertWeights
    popularity: Tensor
    standins: StandInWeights

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights and biases."""
        return sum(parameter[0].nbytes for parameter in self.module.parameters())

    @property
    def layout(self) -> str:
        """In words, how the weights lie."""
        words = ["input first" if self.weights.transposed else "output first"]
        return ", ".join([*words, "biased"] if self.weights.gate_up_bias is not None else words)


def make_layer(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> Layer:
    """Build a layer with random weights."""
    # Imported here: not before `origin` has seen to it that transformers does not take kernels.py for a package.
    from transformers import AutoConfig, AutoModelForCausalLM

    from lynx.adapters.transformers.experts import expert_weights

    sizes = {shape.experts: shape.E, shape.size: shape.I, "hidden_size": shape.H, "num_experts_per_tok": shape.k}
    few = {"num_hidden_layers": 1, "vocab_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
    if shape.groups != (1, 1):
        few |= {"n_group": shape.groups[0], "topk_group": shape.groups[1], "first_k_dense_replace": 0}
    config = AutoConfig.for_model(shape.family, **sizes, **few, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    module = next(part for part in model.modules() if hasattr(part, "gate_up_proj")).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in list(module.named_parameters()):
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        scale = 0.02 if parameter.ndim == 2 else parameter.shape[1 if module.is_transposed else 2] ** -0.5
        for expert in values:  # one by one: all of DeepSeek-V3's are more elements than 2**31
            expert.normal_(0, scale, generator=generator)
        setattr(module, name, nn.Parameter(values, requires_grad=False))
    weights = expert_weights(module, recognise(module._apply_gate, shape.I, gated=True, device=device))
    popularity = torch.randn(shape.E, generator=torch.Generator().manual_seed(seed))
    sizes_of = (shape.E, RANK, shape.H), (shape.E, RANK, shape.H), (shape.E, shape.H)
    parts = [torch.empty(size, dtype=dtype, device=device).normal_(0, 0.02, generator=generator) for size in sizes_of]
    return Layer(shape, module, weights, popularity, StandInWeights(*parts))


@dataclass(slots=True)
class Batch:
    """What a layer's router hands to the layer for T tokens.

    Attributes:
        hidden: `(T, H)`.
        choice: `(T, E)` float32, what experts are ranked by.
        logits: `(T, E)` float32.
        ids: `(T, k)` int64.
        weights: `(T, k)`, dtype of `hidden`.
        role: `(T,)`, all OPEN.
        phase: `(T,)`, all decode.
        rule: How weights follow from logits.
    """

    hidden: Tensor
    choice: Tensor
    logits: Tensor
    ids: Tensor
    weights: Tensor
    role: Tensor
    phase: Tensor
    rule: WeightRule

    @property
    def routing(self) -> Routing:
        """The decision as Lynx takes it."""
        return Routing(self.choice, self.logits, self.ids, self.weights, self.role, self.phase, self.rule)

    @property
    def active(self) -> int:
        """How many experts the batch wakes."""
        return self.ids.unique().numel()


def make_batch(layer: Layer, T: int, kind: Kind, seed: int) -> Batch:
    """Draw a batch on the layer's device."""
    shape, weight = layer.shape, layer.weights.down
    generator = torch.Generator().manual_seed(seed)
    logits, topic = torch.randn(T, shape.E, generator=generator), torch.randn(shape.E, generator=generator)
    if kind == "skewed":
        logits += POPULARITY * layer.popularity + TOPIC * topic
    choice = _inside_groups(logits, *shape.groups)
    ids = choice.topk(shape.k).indices
    weights = _weigh(logits, ids, shape.rule).to(weight.dtype)
    hidden = torch.randn(T, shape.H, generator=generator).to(weight.dtype)
    role = torch.full((T,), int(Role.OPEN), dtype=torch.int8)
    phase = torch.full((T,), int(Phase.DECODE), dtype=torch.int8)
    tensors = (hidden, choice, logits, ids, weights, role, phase)
    return Batch(*(tensor.to(weight.device) for tensor in tensors), rule=shape.rule)


def _inside_groups(logits: Tensor, groups: int, chosen: int) -> Tensor:
    """Forbid all groups of experts but a token's best, by their two best experts, as DeepSeek-V3 does."""
    if groups == 1:
        return logits
    scores = logits.sigmoid()
    best = scores.unflatten(-1, (groups, -1)).topk(2, dim=-1).values.sum(-1).topk(chosen).indices
    allowed = torch.zeros(len(logits), groups, dtype=torch.bool).scatter(1, best, True)
    return scores.masked_fill(~allowed.repeat_interleave(logits.shape[-1] // groups, dim=-1), -torch.inf)


def _weigh(logits: Tensor, ids: Tensor, rule: WeightRule) -> Tensor:
    if rule.score == "softmax_over_chosen":
        return logits.gather(-1, ids).softmax(-1)
    scores = (logits.sigmoid() if rule.score == "sigmoid" else logits.softmax(-1)).gather(-1, ids)
    return (scores / scores.sum(-1, keepdim=True) if rule.renormalise else scores) * rule.scale
