"""Launch the route kernel."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from lynx.kernels import tune
from lynx.kernels.fused import launch
from lynx.kernels.fused.route import route_kernel
from lynx.kernels.fused.route_parts import hear_kernel, reroute_kernel
from lynx.kernels.route import RouteRule


def launch_route(inputs: tuple[Any, ...], rule: RouteRule, outputs: tuple[Tensor, ...]) -> None:
    """Fill `outputs` and add to the counters.

    Args:
        inputs: choice, logits, ids, weights, role, phase, priority, settings and the three counters, as of
            `lynx.kernels.route.route`; ids and weights are None to be found, priority is None for votes of 1.
        rule: What the kernel is compiled for.
        outputs: New ids, new weights, lost, own ids, own weights, plan.

    Raises:
        ValueError: The tune file's parts are no whole number of tiles.
    """
    choice, logits, ids, weights, role, phase, priority, settings, *counters = inputs
    new_ids, new_weights, lost, own_ids, own_weights, plan = outputs
    (T, E), K = choice.shape, new_ids.shape[1]
    options = shape_options(T, E, K, tune.generation_of(choice.device)) | rule_options(rule)
    options |= {"E": E, "K": K, "HAS_PRIORITY": priority is not None, "HAS_IDS": ids is not None}
    options["enable_fp_fusion"] = False
    part = options.pop("PART")
    if part % options["BT"]:
        raise ValueError(f"a part of {part} rows is no whole number of tiles of {options['BT']}.")
    batch = (
        choice.contiguous(),
        logits.contiguous(),
        ids.contiguous() if ids is not None else own_ids,
        weights.contiguous() if weights is not None else own_weights,
        role.contiguous(),
        phase.contiguous(),
    )
    votes = priority.contiguous() if priority is not None else None
    results = (new_ids, new_weights, lost, plan, *counters)
    with launch.on(choice.device):
        if part >= T:
            one_tile = options["BT"] >= T
            route_kernel[(1,)](*batch, votes, settings, *results, T, K, **options, ONE_TILE=one_tile)
            return
        parts = -(-T // part)

        def scratch(dtype: torch.dtype, *shape: int) -> Tensor:
            return launch.empty(parts, *shape, dtype=dtype, device=choice.device)

        heard = (scratch(torch.int32, E), scratch(torch.int64, E), scratch(torch.int32), scratch(torch.int32))
        done = (scratch(torch.int32, E), scratch(torch.int32, E), scratch(torch.int64, 2), scratch(torch.float64, 4))
        hear_kernel[(parts,)](*batch, votes, settings, *heard, T, K, **options, PART=part)
        reroute_kernel[(parts,)](*batch, settings, *heard, *results, *done, T, K, **options, PART=part)


@cache
def _rule_options(rule: RouteRule) -> dict[str, Any]:
    return {
        "SCORE": rule.score,
        "RENORMALISE": rule.renormalise or rule.score == "softmax_over_chosen",
        "REPICK": rule.repick,
        "REFILL": rule.refill,
        "SHARE": rule.share,
        "BY_RANK": rule.by_rank,
        "BY_RATIO": rule.by_ratio,
        "BY_MASS": rule.by_mass,
        "BY_DEMAND": 2 if rule.by_coverage else rule.by_demand,
        "UTILITY": rule.utility,
    }


def rule_options(rule: RouteRule) -> dict[str, Any]:
    """Return the constants of the kernel that follow from a rule."""
    return dict(_rule_options(rule))


@cache
def _shape_options(T: int, E: int, K: int, generation: str) -> dict[str, Any]:
    chosen = tune.settings("route", T, generation)
    BE, BK = max(16, triton.next_power_of_2(E)), max(2, triton.next_power_of_2(K))
    BT = max(4, min(32, triton.next_power_of_2(max(T, 1)), chosen["tile"] // BE))
    warps = chosen["num_warps"] if chosen["tile"] // 2 < BT * BE else max(1, chosen["num_warps"] // 2)
    part = max(BT, chosen["rows_per_program"])
    return {"BT": BT, "BE": BE, "BK": BK, "PART": part, "num_warps": warps, "num_stages": 1}


def shape_options(T: int, E: int, K: int, generation: str) -> dict[str, Any]:
    """Return tile sizes and warps for a batch, by the tune file of a generation of GPUs.

    PART is how many rows a program walks: one launch of one program where they are all, else two launches.
    """
    return dict(_shape_options(T, E, K, generation))
