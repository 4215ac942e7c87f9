"""The configurations of the route kernel that are compiled ahead of time.

A rule, a weight rule and a shape each choose what is compiled; all combinations are too many. Every shape goes with the
rule that takes the most registers, and every rule with a common shape.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from lynx.kernels.fused.launch_route import rule_options, shape_options
from lynx.kernels.fused.route import route_kernel
from lynx.kernels.fused.route_parts import hear_kernel, reroute_kernel
from lynx.kernels.route import RouteRule

_DEMAND = RouteRule(by_demand=True)
_RULES = {
    "ratio": RouteRule(by_ratio=True),
    "mass": RouteRule(by_mass=True),
    "coverage": RouteRule(by_coverage=True),
    "static": RouteRule(by_rank=True, share=False, refill=False),
    "raw": RouteRule(renormalise=False, by_ratio=True),
    "sigmoid": RouteRule("sigmoid", by_demand=True),
    "softplus": RouteRule("sqrt_softplus", by_demand=True),
    "joined": RouteRule(by_rank=True, by_ratio=True, by_mass=True, by_demand=True),
}


class _Case(NamedTuple):
    """One batch and what is done with it."""

    name: str
    T: int
    E: int
    k: int
    rule: RouteRule = _DEMAND
    host: str = "fp32"  # dtype of the host's weights
    has_ids: bool = True
    has_priority: bool = False  # as in vLLM, for strategies that count votes


def _cases() -> Iterator[_Case]:
    for E, k in ((8, 2), (64, 8), (128, 8), (256, 8), (512, 16)):
        yield _Case(f"E{E}k{k}/demand", 16, E, k)
    yield _Case("E512k16/coverage", 16, 512, 16, _RULES["coverage"])
    for name, rule in _RULES.items():
        yield _Case(f"E128k8/{name}", 16, 128, 8, rule)
    yield _Case("E128k8/one token", 1, 128, 8)
    yield _Case("E128k8/bf16", 16, 128, 8, host="bf16")
    yield _Case("E128k8/from scores", 16, 128, 8, has_ids=False)
    yield _Case("E128k8/priority", 16, 128, 8, has_priority=True)
    yield _Case("E128k8/tiles", 64, 128, 8)
    for E, k in ((128, 8), (512, 16)):
        yield _Case(f"E{E}k{k}/parts", 256, E, k)
        yield _Case(f"E{E}k{k}/parts priority", 256, E, k, has_priority=True)
        yield _Case(f"E{E}k{k}/parts coverage", 256, E, k, _RULES["coverage"])
    yield _Case("E128k8/parts raw", 256, 128, 8, _RULES["raw"])
    yield _Case("E128k8/parts from scores", 256, 128, 8, has_ids=False)


def shipped_route(target: str) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """List name, kernel, signature, compile-time values and options for a target."""
    generation = target.replace(":", "_")
    for case in _cases():
        options = shape_options(case.T, case.E, case.k, generation)
        launched = {name: options.pop(name) for name in ("num_warps", "num_stages")} | {"enable_fp_fusion": False}
        part = options.pop("PART")
        constants = {"E": case.E, "K": case.k, **options, **rule_options(case.rule)}
        constants |= {"HAS_PRIORITY": case.has_priority, "HAS_IDS": case.has_ids}
        constants |= {"ONE_TILE": options["BT"] >= case.T, "PART": part}
        if not case.has_priority:
            constants["priority"] = None
        kernels = [route_kernel] if part >= case.T else [hear_kernel, reroute_kernel]
        if case.has_priority:
            kernels = [kernel for kernel in kernels if kernel is not reroute_kernel]  # all has been heard by then
        for kernel in kernels:
            own = {name: value for name, value in constants.items() if name in kernel.arg_names}
            name = kernel.fn.__name__.removesuffix("_kernel")
            signature = {arg: "constexpr" if arg in own else _type(arg, case) for arg in kernel.arg_names}
            yield f"{name}/{case.name}", kernel, signature, own, launched


def _type(argument: str, case: _Case) -> str:
    """The type of a run-time argument; tensors come aligned from the allocator."""
    kinds = {
        "*i64:16": ("ids", "new_ids", "demand_parts", "counts", "tallies"),
        "*i8:16": ("role", "phase"),
        "*i1:16": ("lost_slots",),
        "*i32:16": ("plan", "heard_parts", "opened", "ticket", "used_parts", "rows_parts"),
        "*fp64:16": ("mass_sums", "shares"),
        f"*{case.host}:16": ("weights", "new_weights"),
        "i32": ("T", "slots_per_token"),
    }
    return next((kind for kind, names in kinds.items() if argument in names), "*fp32:16")
