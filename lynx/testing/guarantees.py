"""What the core owes every row, whatever a strategy says. Each function yields what is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from lynx.routing import Role
from lynx.strategy import SelectionStrategy
from lynx.testing.case import Case, Row
from lynx.testing.transforms import same_bits


def shapes_and_dtypes_unchanged(case: Case) -> Iterator[str]:
    """What comes out can stand where the router's own output stood."""
    for name in ("ids", "weights"):
        before, after = getattr(case.routing, name), getattr(case.result, name)
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            yield f"{name} were {before.dtype} {tuple(before.shape)}, are {after.dtype} {tuple(after.shape)}"


def ids_in_range(case: Case) -> Iterator[str]:
    """Every id names one of the ``E`` experts."""
    for row in case.rows:
        if not all(0 <= e < case.layer.num_experts for e in row.new_ids):
            yield f"row {row.index} has ids {row.new_ids}, with E={case.layer.num_experts}"


def no_expert_twice(case: Case) -> Iterator[str]:
    """No row has an expert in two slots with non-zero weight, and each has at least one expert."""
    for row in case.rows:
        used = [e for e, w in zip(row.new_ids, row.new_weights, strict=True) if w != 0.0]
        if not used or len(set(used)) < len(used):
            yield f"row {row.index} uses the experts {used}"


def exact_and_padding_rows_untouched(case: Case) -> Iterator[str]:
    """Only OPEN rows change."""
    for row in case.rows:
        if row.role != Role.OPEN and not _verbatim(case, row):
            yield f"{row.role.name} row {row.index} had {row.ids} {row.weights}, has {row.new_ids} {row.new_weights}"


def rows_that_lose_nothing_come_back_verbatim(case: Case) -> Iterator[str]:
    """A row whose own experts all stay active gets its original ids and weights, bit for bit."""
    for row in case.open_rows:
        if set(row.ids) <= row.active and not _verbatim(case, row):
            yield f"row {row.index} lost nothing; had {row.ids} {row.weights}, has {row.new_ids} {row.new_weights}"


def protected_experts_stay(case: Case) -> Iterator[str]:
    """Each token keeps its best `protect` experts, in their slots."""
    for row in case.open_rows:
        kept = {new for old, new in zip(row.ids, row.new_ids, strict=True) if old == new}
        lost = [e for e in row.ranked[: case.protect] if e not in kept]
        if lost:
            yield f"row {row.index} lost {lost}, of its best {row.ranked}, with protect={case.protect}"


def re_picks_are_the_best_active_experts(case: Case) -> Iterator[str]:
    """Lost slots get the best of what is active, in order, ties by lowest id, never a forbidden expert."""
    for row in case.open_rows:
        lost = [e for e in row.ids if e not in row.active]
        spare = row.spare
        if len(lost) == len(row.ids) and not spare:  # it keeps its own best
            lost.remove(row.ranked[0])
        kept = [old == new for old, new in zip(row.ids, row.new_ids, strict=True)]
        if [e for e, stays in zip(row.ids, kept, strict=True) if not stays] != lost:
            yield f"row {row.index} had {row.ids}, has {row.new_ids}; only {lost} are not active"
        full = zip(row.new_ids, kept, row.empty, strict=True)
        picked = [e for e, stays, empty in full if not stays and not empty]
        if picked != spare[: len(lost)]:
            yield f"row {row.index} lost {lost}, got {picked}; the best active experts are {spare}"


def empty_slots_repeat_the_best_kept_expert(case: Case) -> Iterator[str]:
    """What could not be filled repeats the row's best kept expert at weight 0."""
    for row in case.open_rows:
        empty = row.empty
        held = [e for e, hole in zip(row.new_ids, empty, strict=True) if not hole]
        own = [e for e in row.ranked if e in held]
        best = (own or row.spare or [-1])[0]
        for slot, hole in enumerate(empty):
            if hole and (row.new_ids[slot] != best or row.new_weights[slot] != 0.0):
                got = f"expert {row.new_ids[slot]} at weight {row.new_weights[slot]}"
                yield f"row {row.index}, empty slot {slot} holds {got}; the best kept expert is {best}"


def weights_follow_the_models_rule(case: Case) -> Iterator[str]:
    """New weights are finite and those that the router would have given to the experts that a row now has."""
    tolerance = 2e-2 if case.routing.weights.dtype.itemsize < 4 else 1e-4
    for row in case.open_rows:
        if not all(math.isfinite(w) for w in row.new_weights):
            yield f"row {row.index} has weights {row.new_weights}"
        elif row.new_ids != row.ids:
            wanted = _weights(case, row)
            if not all(math.isclose(g, w, rel_tol=tolerance) for g, w in zip(row.new_weights, wanted, strict=True)):
                yield f"row {row.index} with {row.new_ids} has weights {row.new_weights}, by the rule {wanted}"


def losses_are_told(case: Case) -> Iterator[str]:
    """Every own slot left out is named with its original weight; all else is 0."""
    lost_ids, lost_weights = case.result.lost_ids.tolist(), case.result.lost_weights.tolist()
    for row in case.rows:
        lost = [old != new for old, new in zip(row.ids, row.new_ids, strict=True)]
        ids = [e if gone else 0 for e, gone in zip(row.ids, lost, strict=True)]
        weights = [w if gone else 0.0 for w, gone in zip(row.weights, lost, strict=True)]
        told = (case.result.lost[row.index].tolist(), lost_ids[row.index], lost_weights[row.index])
        if told != (lost, ids, weights):
            yield f"row {row.index} lost {ids} at {weights}; told were {told}"


def floor_is_kept(case: Case) -> Iterator[str]:
    """Each token keeps the share of its own weight that `floor` promises, at every floor."""
    cases = [case]
    if isinstance(case.strategy, SelectionStrategy):
        cases += [replace(case, strategy=case.with_option("floor", floor)) for floor in (0.45, 0.85)]
    for tried in cases:
        for row in tried.open_rows:
            kept = [w for old, new, w in zip(row.ids, row.new_ids, row.weights, strict=True) if old == new]
            share = math.fsum(kept) / math.fsum(row.weights)
            if share < tried.floor - 1e-5:
                yield f"row {row.index} of weights {row.weights} keeps {share:.6f} of it, with floor={tried.floor}"


def _verbatim(case: Case, row: Row) -> bool:
    before, after = case.routing, case.result
    return torch.equal(before.ids[row.index], after.ids[row.index]) and same_bits(
        before.weights[row.index], after.weights[row.index]
    )


def _weights(case: Case, row: Row) -> list[float]:
    """The router's own rule, in float64."""
    rule = case.layer.rule
    renormalise = rule.renormalise or rule.score == "softmax_over_chosen"
    scores = _scores(rule.score, row.logits)
    if not rule.repick:
        scores = dict(zip(row.ids, row.weights, strict=True))
    held = [0.0 if hole else scores[e] for e, hole in zip(row.new_ids, row.empty, strict=True)]
    if renormalise:
        return [score / sum(held) * rule.scale for score in held]
    return held if not rule.repick else [score * rule.scale for score in held]


def _scores(score: str, logits: list[float]) -> dict[int, float]:
    if score == "sigmoid":
        return {e: 1.0 / (1.0 + math.exp(-x)) for e, x in enumerate(logits)}
    if score == "sqrt_softplus":
        return {e: math.sqrt(math.log1p(math.exp(x))) for e, x in enumerate(logits)}
    powers = [math.exp(x - max(logits)) for x in logits]
    return {e: power / sum(powers) for e, power in enumerate(powers)}
