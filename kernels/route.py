"""Fused selection: what a keep rule, a weight rule and the core's guarantees come to, in one launch or two on the GPU.

The readable form of all this is the core itself: `lynx.keep` says what the batch keeps, `lynx.rerouting` gives every
token its best experts inside that, `lynx.counters` counts. The kernel is held to them: the same ids, and weights equal
to float32 rounding.

Symbols: T tokens, k slots per token, E experts.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lynx.kernels.backends import interpreted
from lynx.kernels.plan import Plan

MAX_TOKENS = 1024
MAX_EXPERTS = 512
MAX_TOP_K = 16

SCORES = ("softmax", "sigmoid", "sqrt_softplus", "softmax_over_chosen")
UTILITIES = ("own-mass", "normalised-own-mass", "count")


@dataclass(frozen=True, slots=True)
class RouteRule:
    """What a compiled route kernel depends on; everything that may differ per layer or step is in `RouteSettings`.

    Attributes:
        score: Function from logits to scores, one of `SCORES`.
        renormalise: Whether the chosen scores are divided by their sum.
        repick: False where the weight of an expert the router did not choose cannot be derived.
        refill: Whether lost slots get the next best active experts.
        share: Whether the batch shares what its tokens want; False leaves each token its own.
        by_rank: Keep by rank.
        by_ratio: Keep by ratio to the token's best.
        by_mass: Keep by cumulative mass.
        by_demand: Keep by the batch's demand, up to a budget.
        by_coverage: Keep by the batch's demand, up to a share of it; not together with `by_demand`.
        utility: What a token's wish is worth in the demand, one of `UTILITIES`.
    """

    score: str = "softmax"
    renormalise: bool = True
    repick: bool = True
    refill: bool = True
    share: bool = True
    by_rank: bool = False
    by_ratio: bool = False
    by_mass: bool = False
    by_demand: bool = False
    by_coverage: bool = False
    utility: str = "normalised-own-mass"

    def encode(self) -> list[int]:
        """Return the rule as whole numbers, the form in which a custom op takes it."""
        score, *flags, utility = astuple(self)
        return [SCORES.index(score), *map(int, flags), UTILITIES.index(utility)]

    @classmethod
    def decode(cls, numbers: list[int]) -> RouteRule:
        """Undo `encode`."""
        score, *flags, utility = numbers
        named = zip(cls.__dataclass_fields__, (SCORES[score], *map(bool, flags), UTILITIES[utility]), strict=True)
        return cls(**dict(named))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class RouteSettings:
    """The numbers of a keep rule and of a layer; on the device they are one float32 tensor, in this order.

    Attributes:
        rank: A token wants its best `rank` experts.
        ratio: A token wants the experts of at least this share of its best weight.
        mass: A token wants its best experts until their share of its weight reaches this; 2 for all of them.
        budget: How many candidates the demand rule keeps; negative keeps all but `drop`.
        drop: How many of the least wanted the demand rule leaves out.
        demand_protect: Each token's best experts that the demand rule takes first.
        protect: Each token's best experts that stay in any case.
        min_tokens: A batch of fewer open rows is left exact.
        on_prefill: 1 where rows in prefill may be re-routed, else 0.
        on_decode: 1 where rows in decode may be re-routed, else 0.
        scale: The weight rule's constant factor.
        cover: The share of the demand that the rule by coverage answers; 2 for all of it.
    """

    rank: float = 0.0
    ratio: float = 0.0
    mass: float = 0.0
    budget: float = -1.0
    drop: float = 0.0
    demand_protect: float = 1.0
    protect: float = 1.0
    min_tokens: float = 2.0
    on_prefill: float = 0.0
    on_decode: float = 1.0
    scale: float = 1.0
    cover: float = 2.0

    def tensor(self, device: torch.device | str) -> Tensor:
        """Return the settings as the kernel reads them."""
        return torch.tensor(astuple(self), dtype=torch.float32, device=device)


class Routed(NamedTuple):
    """What the route kernel made of a batch.

    Attributes:
        ids: `(T, k)`, dtype of the given ids.
        weights: `(T, k)`, dtype of the given weights.
        lost: `(T, k)` bool: own slots left out, re-picked or not.
        own_ids: `(T, k)` the own top-k, given or found.
        own_weights: `(T, k)` their weights.
        plan: Which experts run which slots.
    """

    ids: Tensor
    weights: Tensor
    lost: Tensor
    own_ids: Tensor
    own_weights: Tensor
    plan: Plan


def why_not_route(device: torch.device, num_experts: int, top_k: int) -> str:
    """Say why the route kernel cannot run for a layer on a device; empty if it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if num_experts > MAX_EXPERTS:
        return f"the route kernel takes up to {MAX_EXPERTS} experts, the layer has {num_experts}"
    if top_k > MAX_TOP_K:
        return f"the route kernel takes up to {MAX_TOP_K} slots per token, the layer has {top_k}"
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "the route kernel needs compute capability 8.0"
        return ""
    if device.type == "cpu" and interpreted():
        return ""
    return f"the route kernel needs a GPU and does not run on {device.type}"


def route(
    choice: Tensor,
    logits: Tensor,
    role: Tensor,
    phase: Tensor,
    rule: RouteRule,
    settings: Tensor,
    counters: tuple[Tensor, Tensor, Tensor],
    *,
    top_k: int,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    priority: Tensor | None = None,
) -> Routed:
    """Select and re-route one batch, in one launch up to 64 tokens and in two above.

    Args:
        choice: `(T, E)` float32, what the router ranks experts by; -inf is forbidden.
        logits: `(T, E)` float32, from which combine weights are computed.
        role: `(T,)` int8, see `lynx.Role`.
        phase: `(T,)` int8, see `lynx.Phase`.
        rule: What the kernel is compiled for.
        settings: `RouteSettings.tensor()`, on the device.
        counters: Sums to add to: int64 `(2, 11)`, float64 `(2,)`, float32 `(2,)`; see `lynx.counters`.
        top_k: k.
        ids: `(T, k)` the router's own experts; None takes the best k by `choice`, ties by lowest id.
        weights: `(T, k)` their weights; None computes them by the weight rule. Given together with `ids`.
        priority: `(T,)` float32 vote weights, None for all 1.

    Raises:
        ValueError: The batch is larger than the kernel takes, only one of `ids` and `weights` is given, or shapes or
            dtypes are not as above.
    """
    if (ids is None) != (weights is None):
        raise ValueError("give both of `ids` and `weights`, or none of them.")
    if choice.shape[0] > MAX_TOKENS:
        raise ValueError(f"route takes up to {MAX_TOKENS} tokens, got {choice.shape[0]}.")
    slots, rows = (choice.shape[0], top_k), choice.shape[:1]
    wanted = {"logits": choice.shape, "ids": slots, "weights": slots, "role": rows, "phase": rows, "priority": rows}
    for name, tensor in zip(wanted, (logits, ids, weights, role, phase, priority), strict=True):
        if tensor is not None and tensor.shape != wanted[name]:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, must be {tuple(wanted[name])}.")
    if choice.dtype != torch.float32 or logits.dtype != torch.float32:
        raise ValueError(f"choice and logits must be float32, not {choice.dtype} and {logits.dtype}.")
    # A dispatcher that only passes on costs more on the host than the launch: it is called where something traces.
    traced = torch.compiler.is_compiling() or type(choice) is not Tensor
    inputs = (choice, logits, ids, weights, role, phase, priority, settings, *counters)
    outputs = torch.ops.lynx.route(*inputs, rule.encode(), top_k) if traced else _launch(inputs, rule, top_k)
    new_ids, new_weights, lost, own_ids, own_weights, plan = outputs
    if ids is not None and weights is not None:
        own_ids, own_weights = ids, weights
    return Routed(new_ids, new_weights, lost, own_ids, own_weights, Plan(plan, choice.shape[1], lost.numel()))


def _outputs(choice: Tensor, ids: Tensor | None, weights: Tensor | None, top_k: int) -> tuple[Tensor, ...]:
    shape = (choice.shape[0], top_k)
    new_ids = choice.new_empty(shape, dtype=torch.int64 if ids is None else ids.dtype)
    new_weights = choice.new_empty(shape, dtype=torch.float32 if weights is None else weights.dtype)
    found = shape if ids is None else (0, top_k)
    return (
        new_ids,
        new_weights,
        choice.new_empty(shape, dtype=torch.bool),
        new_ids.new_empty(found),
        new_weights.new_empty(found),
        choice.new_empty(Plan.size(choice.shape[1], choice.shape[0] * top_k), dtype=torch.int32),
    )


def _launch(inputs: tuple[Any, ...], rule: RouteRule, top_k: int) -> tuple[Tensor, ...]:
    # imported here: it loads triton, which only those need who run it
    from lynx.kernels.fused.launch_route import launch_route

    choice, _, ids, weights, *_ = inputs
    outputs = _outputs(choice, ids, weights, top_k)
    launch_route(inputs, rule, outputs)
    return outputs


@torch.library.custom_op("lynx::route", mutates_args=("counts", "mass", "worst"))
def _route(
    choice: Tensor,
    logits: Tensor,
    ids: Tensor | None,
    weights: Tensor | None,
    role: Tensor,
    phase: Tensor,
    priority: Tensor | None,
    settings: Tensor,
    counts: Tensor,
    mass: Tensor,
    worst: Tensor,
    rule: list[int],
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (choice, logits, ids, weights, role, phase, priority, settings, counts, mass, worst)
    return _launch(inputs, RouteRule.decode(rule), top_k)  # type: ignore[return-value]


@_route.register_fake
def _(choice: Tensor, logits: Tensor, ids: Any, weights: Any, *rest: Any) -> tuple[Tensor, ...]:
    return _outputs(choice, ids, weights, rest[-1])
