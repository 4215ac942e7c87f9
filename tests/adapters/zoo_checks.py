"""What a family of `zoo` does under Lynx, found by running it: a row of docs/families.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import zoo
from torch import Tensor, nn

import lynx
import lynx.attachment
from lynx.adapter import Discovery
from lynx.adapters.transformers.adapter import TransformersAdapter
from lynx.adapters.transformers.probe import ARGUMENT
from lynx.routing import WeightRule

ROWS, PROMPT, STEPS, CANVAS = 4, 6, 3, 4
PRUNING: dict[str, Any] = {"name": "batch-union", "top": 1}
ONE_EACH: dict[str, Any] = {"name": "top-budget", "budget": 1, "protect": 0}
"""Where tokens have one expert each, there is nothing below their best to drop."""


@dataclass(frozen=True)
class Row:
    """A family of the matrix.

    Attributes:
        family: Folder of the models in transformers.
        model: The class that was built.
        layers: MoE layers found.
        shape: How its experts are run: S1 to S4; S5 if it is refused.
        exact: Whether under ``exact`` logits of prefill and decode were equal bit for bit.
        selects: Whether decode woke fewer experts, of those that reach the experts, and prefill stayed as it was.
        lynx: Whether logits under selection were equal, but for rounding, with Lynx's experts; or why they cannot run.
        rule: The weight rule.
        choice: What experts are ranked by.
        notes: What is said of the model when it is looked at.
        refused: Why it is not taken.
    """

    family: str
    model: str
    layers: int
    shape: str
    exact: bool = False
    selects: bool = False
    lynx: str = ""
    rule: str = ""
    choice: str = ""
    notes: tuple[str, ...] = ()
    refused: str = ""


def check(family: str) -> Row:
    """Build a family's model and find its row."""
    model = zoo.build(family)
    name = type(model).__name__
    found = TransformersAdapter().discover(model)
    refused = next((layer.refused for layer in found.layers if layer.refused), "")
    if refused or not found.layers:
        try:
            lynx.attach(model, "exact")
        except lynx.UnsupportedModelError as error:
            return Row(family, name, 0, "S5", refused=refused or str(error))
        raise AssertionError(f"{family} was refused when it was looked at, and attached")
    run, options = _way_to_run(family)
    strategy = PRUNING if max(layer.info.top_k for layer in found.layers) > 1 else ONE_EACH
    if family in zoo.NO_DECODE:
        strategy = {"name": "phase-aware", "prefill": strategy, "decode": strategy}
    with counted(model) as plain:
        before = run(model)
    with lynx.attach(model, "exact", **options):
        exact = run(model)
    with lynx.attach(model, strategy, experts="model", **options), counted(model) as counter:
        pruned = run(model)
    after = run(model)
    decode = slice(0 if family in zoo.NO_DECODE else 1, None)
    kept = [torch.equal(*pair) for pair in zip(before, pruned, strict=True)]
    fewer = counter.count(found) < plain.count(found)
    return Row(
        family,
        name,
        len(found.layers),
        _shape(found),
        exact=_equal(before, exact) and _equal(before, after),
        selects=fewer and not all(kept[decode]) and all(kept[: decode.start]),
        lynx=_with_lynx(model, run, strategy, options, pruned),
        rule=words(found.layers[0].info.rule),
        choice=_choice(found),
        notes=tuple(dict.fromkeys([*found.notes, *(note for layer in found.layers for note in layer.notes)])),
    )


class Counter:
    """Keeps, apart from Lynx, what the experts modules of a model are given."""

    def __init__(self) -> None:
        self.active: list[tuple[nn.Module, set[int]]] = []

    def experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the ids with a weight; for experts that run all, those whose input is not 0."""
        values = [*args, *kwargs.values()]
        if len(values) == 1:
            inputs = values[0].view(len(module.down_proj), -1, values[0].shape[-1])
            used = inputs.abs().sum((1, 2)).nonzero().flatten()
        else:
            ids, weights = values[1:3]
            used = ids[weights != 0].unique()
        self.active.append((module, set(used.tolist())))

    def count(self, found: Discovery) -> int:
        """Sum distinct experts over the calls of layers that were taken; experts without weights do not count."""
        real = {layer.site.experts: layer.info.num_experts - layer.fingerprint.zero_experts for layer in found.layers}
        return sum(len({i for i in used if i < real[module]}) for module, used in self.active if module in real)


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter]:
    """Count what reaches the experts."""
    counter = Counter()
    modules = [module for name, module in model.named_modules() if name.endswith(".experts")]
    handles = [module.register_forward_pre_hook(counter.experts, with_kwargs=True) for module in modules]
    try:
        yield counter
    finally:
        for handle in handles:
            handle.remove()


def tokens(columns: int, seed: int = 1) -> Tensor:
    """Draw ``(B, columns)`` tokens that end nothing."""
    return torch.randint(3, 90, (ROWS, columns), generator=torch.Generator().manual_seed(seed))


class Forced:
    """A logits processor: generation goes on with given tokens, whatever the model says."""

    def __init__(self, prompt: int, new: Tensor) -> None:
        self.prompt = prompt
        self.new = new

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Leave one token possible."""
        wanted = self.new[:, ids.shape[1] - self.prompt].unsqueeze(-1)
        return torch.full_like(scores, -torch.inf).scatter(-1, wanted, 0.0)


def generated(model: Any) -> list[Tensor]:
    """Logits of the prompt's last token, then of every decode step."""
    drawn = tokens(PROMPT + STEPS + 1)
    out = model.generate(
        input_ids=drawn[:, :PROMPT],
        attention_mask=torch.ones(ROWS, PROMPT, dtype=torch.long),
        logits_processor=[Forced(PROMPT, drawn[:, PROMPT:])],
        max_new_tokens=STEPS + 1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return list(out.logits)


@torch.no_grad()
def forward(model: Any) -> list[Tensor]:
    """Logits of a model that does not generate."""
    return [model(input_ids=tokens(PROMPT)).logits]


@torch.no_grad()
def denoised(model: Any) -> list[Tensor]:
    """What the encoder says of a prompt, and logits of a canvas."""
    prompt, canvas = tokens(PROMPT), tokens(CANVAS, seed=2)
    encoder = model.model.encoder(input_ids=prompt)
    return [encoder.last_hidden_state, model(input_ids=prompt, decoder_input_ids=canvas).logits]


def words(rule: WeightRule) -> str:
    """Describe a weight rule."""
    parts = [rule.score.replace("_", " ")]
    parts += ["renormalised"] if rule.renormalise else []
    parts += [f"x {rule.scale:g}"] if rule.scale != 1.0 else []
    return ", ".join(parts) if rule.repick else "unknown: keep or lose only"


def _way_to_run(family: str) -> tuple[Callable[[Any], list[Tensor]], dict[str, Any]]:
    if family in zoo.NO_DECODE:
        return forward, {}
    return (denoised, {"max_decode_q": CANVAS}) if family in zoo.DENOISING else (generated, {})


def _with_lynx(model: Any, run: Any, strategy: Any, options: dict[str, Any], expected: list[Tensor]) -> str:
    try:
        with lynx.attach(model, strategy, experts="lynx", **options):
            ours = run(model)
    except lynx.ConfigError as error:
        return str(error)
    close = all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(ours, expected, strict=True))
    return "equal" if close else "differs"


def _shape(found: Discovery) -> str:
    site, output = found.layers[0].site, found.layers[0].fingerprint.output
    experts = site.experts
    if output.ids is None:
        return "S4"
    if not all(hasattr(experts, name) for name in ("has_gate", "has_bias", "is_transposed")):
        return "S3"
    odd = not experts.has_gate or experts.has_bias or experts.is_transposed
    odd = odd or getattr(experts, "has_post_expert_norm", False)
    return "S2" if odd or type(experts)._apply_gate.__name__ != "_default_apply_gate" else "S1"


def _choice(found: Discovery) -> str:
    rule = found.layers[0].fingerprint.choice
    bias = "a bias from its block" if rule.bias == ARGUMENT else f"`{(rule.bias or '').rpartition('.')[-1]}`"
    parts = [f"plus {bias}"] if rule.bias else []
    parts += [f"in {rule.kept_groups} of {rule.groups} groups"] if rule.groups > 1 else []
    return ", ".join(parts)


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))
