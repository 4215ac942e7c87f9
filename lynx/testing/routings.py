"""Routings to test with: every kind of router, made up from random logits, consistent in every field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from lynx.routing import Phase, Role, Routing, Score, WeightRule

Router = Literal["softmax", "softmax-over-chosen", "sigmoid", "grouped", "sqrt-softplus"]
ROUTERS: tuple[Router, ...] = ("softmax", "softmax-over-chosen", "sigmoid", "grouped", "sqrt-softplus")
SHAPES = ((8, 2), (16, 4), (24, 8), (12, 6), (6, 3), (4, 4), (4, 1))
"""Pairs of ``E`` and ``k`` that are tried."""
LARGE_SHAPES = ((64, 8), (128, 8), (256, 8))
"""Pairs that are tried for a strategy whose options fit none of the small ones."""

_SCORES: dict[Router, Score] = {
    "softmax": "softmax",
    "softmax-over-chosen": "softmax_over_chosen",
    "sigmoid": "sigmoid",
    "grouped": "sigmoid",
    "sqrt-softplus": "sqrt_softplus",
}
# Logits are multiples of 2**-14 below 2**5, so that adding a whole number to them is exact in float32.
_COARSE, _FINE = 2.0**-8, 2.0**-14


@dataclass(frozen=True, slots=True)
class RoutingSpec:
    """The arguments of :func:`make_routing`; its ``repr`` is the call that makes the same routing again."""

    router: Router = "softmax"
    tokens: int = 8
    experts: int = 16
    top_k: int = 4
    seed: int = 0
    renormalise: bool = True
    scale: float = 1.0
    repick: bool = True
    roles: tuple[Role, ...] | None = None
    phases: tuple[Phase, ...] | None = None
    priority: bool = False
    skew: float = 1.0
    ties: bool = False
    shuffle: bool = True
    weights_dtype: torch.dtype = torch.float32
    ids_dtype: torch.dtype = torch.int64

    def build(self) -> Routing:
        """Make the routing."""
        return make_routing(**{field.name: getattr(self, field.name) for field in fields(self)})

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis prints failing examples with this."""
        printer.text(repr(self))

    def __repr__(self) -> str:
        given = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return f"make_routing({', '.join(f'{name}={_written(value)}' for name, value in given)})"


def make_routing(
    router: Router = "softmax",
    *,
    tokens: int = 8,
    experts: int = 16,
    top_k: int = 4,
    seed: int = 0,
    renormalise: bool = True,
    scale: float = 1.0,
    repick: bool = True,
    roles: Sequence[Role] | None = None,
    phases: Sequence[Phase] | None = None,
    priority: bool = False,
    skew: float = 1.0,
    ties: bool = False,
    shuffle: bool = True,
    weights_dtype: torch.dtype = torch.float32,
    ids_dtype: torch.dtype = torch.int64,
    batch: tuple[int, ...] = (),
) -> Routing:
    """Make up one MoE layer's decision, as a router of the given kind would have made it.

    Some experts are more popular than others, as in real models. The same arguments give the same routing.

    Args:
        router: ``softmax``; ``softmax-over-chosen`` (gpt-oss); ``sigmoid`` with a bias on the choice (GLM);
            ``grouped``, the same with half of the expert groups forbidden to each token (DeepSeek-V3);
            ``sqrt-softplus`` with a bias.
        tokens: ``T``.
        experts: ``E``.
        top_k: ``k``.
        seed: Of the random numbers.
        renormalise: See :class:`lynx.WeightRule`.
        scale: See :class:`lynx.WeightRule`.
        repick: See :class:`lynx.WeightRule`.
        roles: One per token; all OPEN by default.
        phases: One per token; all decode by default.
        priority: Whether tokens have vote weights that differ.
        skew: How much more popular some experts are than others, beside 1.5 for what tokens differ in.
        ties: Whether experts may be equally good for a token; without, no two are.
        shuffle: Whether the slots are in no order, as in many hosts, or from the best expert down.
        weights_dtype: The host's type of ``weights``.
        ids_dtype: The host's type of ``ids``.
        batch: Leading dimensions.

    Returns:
        A routing on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float32)

    full = (*batch, tokens, experts)
    logits = (1.5 * normal(*full) + skew * normal(experts)).clamp(-16.0, 16.0)
    bias = 0.3 * normal(experts)
    if ties:
        logits, bias = logits.round(), (2.0 * bias).round() / 2.0
    else:
        logits = (logits / _COARSE).floor() * _COARSE + uniform(*full).argsort(-1) * _FINE
    rule = WeightRule(_SCORES[router], renormalise, scale, repick)
    scores = _scores(rule.score, logits)
    choice = logits
    if rule.score in ("sigmoid", "sqrt_softplus"):
        choice = scores + bias
    if router == "grouped":
        choice = _mask_groups(choice, top_k)

    # stable: among equals the lowest id comes first
    ids = torch.sort(choice, dim=-1, descending=True, stable=True).indices[..., :top_k]
    if shuffle:
        ids = ids.gather(-1, uniform(*ids.shape).argsort(-1))
    if rule.score == "softmax_over_chosen":
        weights = torch.softmax(logits.gather(-1, ids), dim=-1)
    else:
        weights = scores.gather(-1, ids)
        if renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
    rows = (*batch, tokens)
    return Routing(
        choice=choice,
        logits=logits,
        ids=ids.to(ids_dtype),
        weights=(weights * scale).to(weights_dtype),
        role=_rows(roles, Role.OPEN, rows),
        phase=_rows(phases, Phase.DECODE, rows),
        rule=rule,
        priority=0.25 + uniform(*rows) if priority else None,
    )


@st.composite
def specs(
    draw: st.DrawFn,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    max_tokens: int = 8,
    roles: Sequence[Role] = (Role.OPEN, Role.EXACT, Role.PADDING),
    phases: Sequence[Phase] = (Phase.DECODE, Phase.PREFILL),
) -> RoutingSpec:
    """Draw the arguments of :func:`make_routing`.

    Args:
        draw: Given by Hypothesis.
        shapes: Pairs of ``E`` and ``k`` to draw from.
        max_tokens: Largest ``T``.
        roles: Roles to draw from; half of the batches have OPEN rows only.
        phases: Phases to draw from; half of the batches are decode only.
    """
    experts, top_k = draw(st.sampled_from(list(shapes)))
    tokens = draw(st.integers(1, max_tokens))
    mixed_roles, mixed_phases = draw(st.booleans()), draw(st.booleans())
    # OPEN twice: a batch of padding has little to say
    role = st.sampled_from([*roles, Role.OPEN]) if mixed_roles else st.just(Role.OPEN)
    phase = st.sampled_from(list(phases)) if mixed_phases else st.just(Phase.DECODE)
    return RoutingSpec(
        router=draw(st.sampled_from(ROUTERS)),
        tokens=tokens,
        experts=experts,
        top_k=top_k,
        seed=draw(st.integers(0, 9999)),
        renormalise=draw(st.booleans()),
        scale=draw(st.sampled_from((1.0, 2.5))),
        repick=draw(st.sampled_from((True, True, True, False))),
        roles=tuple(draw(role) for _ in range(tokens)),
        phases=tuple(draw(phase) for _ in range(tokens)),
        priority=draw(st.booleans()),
        skew=draw(st.sampled_from((1.0, 3.0))),
        ties=draw(st.booleans()),
        shuffle=draw(st.booleans()),
        weights_dtype=draw(st.sampled_from((torch.float32, torch.bfloat16))),
        ids_dtype=draw(st.sampled_from((torch.int64, torch.int32))),
    )


def _scores(score: Score, logits: Tensor) -> Tensor:
    if score == "sigmoid":
        return torch.sigmoid(logits)
    if score == "sqrt_softplus":
        return F.softplus(logits).sqrt()
    return torch.softmax(logits, dim=-1)


def _mask_groups(choice: Tensor, top_k: int) -> Tensor:
    """Forbid the weaker half of the expert groups, where the rest still has ``top_k`` experts."""
    experts = choice.shape[-1]
    groups = next((n for n in (4, 2) if experts % n == 0 and experts // 2 >= top_k), 1)
    if groups == 1:
        return choice
    grouped: Tensor = choice.unflatten(-1, (groups, -1))
    order = torch.sort(grouped.amax(-1), dim=-1, descending=True, stable=True).indices
    forbidden = torch.zeros(grouped.shape[:-1], dtype=torch.bool).scatter(-1, order[..., groups // 2 :], True)
    return grouped.masked_fill(forbidden.unsqueeze(-1), -torch.inf).flatten(-2)


def _rows(values: Sequence[int] | None, default: int, shape: tuple[int, ...]) -> Tensor:
    if values is None:
        return torch.full(shape, default, dtype=torch.int8)
    return torch.tensor([int(value) for value in values], dtype=torch.int8).expand(shape).clone()


def _written(value: object) -> str:
    """Write an argument as Python code, ``Role.OPEN`` rather than ``<Role.OPEN: 2>``."""
    if isinstance(value, tuple):
        return f"[{', '.join(_written(item) for item in value)}]"
    return f"{type(value).__name__}.{value.name}" if isinstance(value, Role | Phase) else repr(value)
