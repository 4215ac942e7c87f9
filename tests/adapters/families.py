"""Tiny random models of every family the transformers adapter must take, with settings that make their rules matter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lynx.demo.cache import as_argument

PAD, EOS, VOCABULARY = 0, 1, 96
_LEFT_BY_GENERATE = {"_cache", "_compiled_call", "_previous_max_cache_length"}

# initializer_range: hidden states have norm 1, so router logits get a standard deviation of about 1
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": 2,
}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
}


@dataclass(frozen=True)
class Family:
    """How to build a tiny model, and what its router is known to do from reading its source."""

    config: type[Any]
    model: type[Any]
    options: dict[str, Any]
    score: str
    renormalise: bool
    scale: float = 1.0
    choice: str = "logits"
    groups: tuple[int, int, str] = (1, 1, "max")
    bias: str | None = None
    repick: bool = True


FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        MixtralConfig,
        MixtralForCausalLM,
        {"num_local_experts": 8, "num_experts_per_tok": 2},
        score="softmax",
        renormalise=True,
    ),
    "qwen2_moe": Family(
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        {
            "num_experts": 12,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "norm_topk_prob": False,
        },
        score="softmax",
        renormalise=False,
    ),
    "qwen3_moe": Family(
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "num_experts": 12,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 16,
            "head_dim": 8,
            "norm_topk_prob": True,
        },
        score="softmax",
        renormalise=True,
    ),
    "olmoe": Family(
        OlmoeConfig,
        OlmoeForCausalLM,
        {"num_experts": 12, "num_experts_per_tok": 4, "norm_topk_prob": False},
        score="softmax",
        renormalise=False,
    ),
    "deepseek_v2": Family(
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        {
            **_LATENT,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 1.5,
        },
        score="softmax",
        renormalise=False,
        scale=1.5,
        choice="softmax",
        groups=(4, 2, "max"),
    ),
    "deepseek_v3": Family(
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        {
            **_LATENT,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
        },
        score="sigmoid",
        renormalise=True,
        scale=2.5,
        choice="sigmoid",
        groups=(4, 2, "top2-sum"),
        bias="e_score_correction_bias",
    ),
    "gpt_oss": Family(
        GptOssConfig,
        GptOssForCausalLM,
        {"num_local_experts": 8, "num_experts_per_tok": 4, "head_dim": 8, "sliding_window": 8},
        score="softmax",  # over the chosen logits: the same as a renormalised softmax over all
        renormalise=True,
    ),
    "granitemoe": Family(
        GraniteMoeConfig,
        GraniteMoeForCausalLM,
        {"num_local_experts": 8, "num_experts_per_tok": 4},
        score="softmax",
        renormalise=True,
    ),
    "glm4_moe": Family(
        Glm4MoeConfig,
        Glm4MoeForCausalLM,
        {
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 16,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "num_hidden_layers": 3,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.5,
            "norm_topk_prob": True,
            "head_dim": 8,
        },
        score="sigmoid",
        renormalise=True,
        scale=1.5,
        choice="sigmoid",
        bias="e_score_correction_bias",
    ),
    "minimax": Family(
        MiniMaxConfig,
        MiniMaxForCausalLM,
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "block_size": 4,
            "layer_types": ["full_attention", "linear_attention"],
        },
        score="softmax",
        renormalise=True,
    ),
    "jamba": Family(
        JambaConfig,
        JambaForCausalLM,
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
        score="softmax",
        renormalise=False,
    ),
    "phimoe": Family(
        PhimoeConfig,
        PhimoeForCausalLM,
        {"num_local_experts": 8, "num_experts_per_tok": 2},
        score="softmax",
        renormalise=False,
        repick=False,
    ),
}

ABSENT: dict[str, str] = {}
"""Families that the installed transformers has in no shape that can be taken, each with the reason."""

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 21):
    del FAMILIES["jamba"]
    ABSENT["jamba"] = "before transformers 5.21 its block decides, around a router that gives logits; these ask routers"


def build(name: str, **changes: Any) -> Any:
    """Make a new model in eval mode; the same weights on every call."""
    family = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = family.model(family.config(**{**_COMMON, **family.options, **changes})).eval()
        for path, tensor in (*model.named_parameters(), *model.named_buffers()):
            if path.endswith("e_score_correction_bias"):
                tensor.data.normal_(0.0, 0.2)
            elif path.endswith("bias") and "proj" in path:
                tensor.data.normal_(0.0, 0.1)
    return model


@cache
def shared(name: str) -> Any:
    """Return the one model of a family that tests share; they leave it as they found it."""
    return build(name)


def prompts(rows: int = 4, columns: int = 6, seed: int = 1) -> dict[str, Tensor]:
    """Make a left-padded batch: row ``r`` has ``r`` columns of padding, up to half of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, columns), generator=generator)
    padding = torch.arange(rows).clamp_max(columns // 2).flip(0)
    mask = (torch.arange(columns) >= padding.unsqueeze(1)).long()
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


@dataclass
class Stepped:
    """Logits of a prefill ``(B, L, V)`` and of decode steps on its cache ``(B, n, V)``."""

    prefill: Tensor
    decode: Tensor


@torch.no_grad()
def stepwise(model: Any, batch: dict[str, Tensor], tokens: Tensor) -> Stepped:
    """Run a prompt and then feed ``tokens (B, n)`` one column at a time."""
    mask = batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    out = model(**batch, position_ids=positions, use_cache=True)
    (name,) = as_argument(None, model)
    prefill, cached, steps = out.logits, {name: out[name]}, []
    for column in tokens.unbind(1):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        out = model(
            input_ids=column.unsqueeze(1),
            attention_mask=mask,
            position_ids=mask.sum(-1, keepdim=True) - 1,
            **cached,
            use_cache=True,
        )
        steps.append(out.logits)
    return Stepped(prefill, torch.cat(steps, dim=1) if steps else prefill[:, :0])


def generate(model: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    """Generate greedily, with the raw logits of every step."""
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**batch, **{**settings, **options})


def new_tokens(rows: int = 4, columns: int = 3, seed: int = 2) -> Tensor:
    """Make tokens to feed in decode."""
    return torch.randint(3, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))


def same(first: Tensor, second: Tensor) -> bool:
    """Whether logits are equal but for rounding: even alone, a model's bits depend on how many rows an expert gets."""
    return torch.allclose(first, second, rtol=0.0, atol=1e-5)


class ExpertsCounter:
    """Counts, apart from Lynx, what experts modules are called with: one entry a call, in running order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        _, ids, weights = [*args, *kwargs.values()][:3]
        self.calls.append((ids.clone(), weights.clone()))

    @property
    def active(self) -> list[int]:
        """Distinct experts with non-zero weight, per call."""
        return [len(ids[weights != 0].unique()) for ids, weights in self.calls]


@contextmanager
def counted(model: nn.Module) -> Iterator[ExpertsCounter]:
    """Count what reaches the experts modules of a model."""
    counter = ExpertsCounter()
    modules = [module for name, module in model.named_modules() if name.endswith(".experts")]
    handles = [module.register_forward_pre_hook(counter, with_kwargs=True) for module in modules]
    try:
        yield counter
    finally:
        for handle in handles:
            handle.remove()


def routers(model: nn.Module) -> list[nn.Module]:
    """Return the routers in running order: the modules called gate or router beside an experts module."""
    found = []
    for _, block in model.named_modules():
        if isinstance(getattr(block, "experts", None), nn.Module):
            found.append(next(getattr(block, name) for name in ("gate", "router") if hasattr(block, name)))
    return found


def footprint(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that Lynx might leave traces in."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    hooks = (*hooks, "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_state_dict_hooks")
    traces: dict[str, Any] = {"state": list(model.state_dict())}
    for name, module in model.named_modules():
        traces[name] = (
            sorted(vars(module).keys() - _LEFT_BY_GENERATE),
            [list(getattr(module, kind)) for kind in hooks],
            id(getattr(module, "config", None)),
            module.training,
        )
    traces["experts"] = model.get_experts_implementation()
    return traces
