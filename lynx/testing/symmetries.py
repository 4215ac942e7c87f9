"""What must make no difference. Each function yields what is wrong."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lynx.rerouting import Rerouted
from lynx.routing import Role
from lynx.strategy import SelectionStrategy
from lynx.testing.case import Case
from lynx.testing.transforms import garbage, join_rows, renumber, same_bits, stack, take_rows, tensors


def same_batch_same_answer(case: Case) -> Iterator[str]:
    """The same batch gives the same result again, also when the strategy is bound anew."""
    for again in (case.selection, case.bind(case.strategy)):
        yield from _differences(case.run(case.routing, again), case.result, "the second answer")


def inputs_not_changed(case: Case) -> Iterator[str]:
    """Selecting writes to none of its inputs, nor to what they are known by; the core's copy is not asked for."""
    routing = case.spec.build()
    inputs = tensors(routing) | {name: getattr(routing, name) for name in ("slot_mass", "slot_rank", "slot_ids")}
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    case.run(routing)
    if isinstance(case.strategy, SelectionStrategy) and case.selection.bound is case.strategy:
        case.strategy.select(routing)
    for name, tensor in inputs.items():
        if not same_bits(tensor, before[name]):
            yield f"routing.{name} was written to"


def order_of_tokens(case: Case) -> Iterator[str]:
    """A batch in another order gives the same rows in that order."""
    for order in (torch.arange(case.spec.tokens).flip(0), _shuffled(case, case.spec.tokens)):
        result = case.run(take_rows(case.routing, order))
        yield from _differences(result, _rows(case.result, order), f"the batch in the order {order.tolist()}")


def numbering_of_experts(case: Case) -> Iterator[str]:
    """Experts under other numbers are selected alike. Only between equals does the number decide: the lowest stays.

    What counts as equal is the strategy's to say, so a bare preference for low numbers passes for a tie.
    """
    if any(len(set(row.choice) - {-torch.inf}) < sum(x > -torch.inf for x in row.choice) for row in case.open_rows):
        return  # equals in the router's own eyes
    new_ids = _shuffled(case, case.spec.experts)
    result = case.run(renumber(case.routing, new_ids))
    number = new_ids.tolist()
    used = set().union(*(row.used for row in case.open_rows))
    ids, weights = new_ids.argsort()[result.ids.long()], result.weights
    rows = [row.index for row in case.open_rows]
    used_anew = set(ids[rows][weights[rows] != 0].flatten().tolist())
    if used == used_anew:
        if not torch.equal(ids, case.result.ids.long()):
            yield f"experts renumbered to {number}: ids are {ids.tolist()}, were {case.result.ids.tolist()}"
        coarse = weights.dtype.itemsize < 4
        if not torch.allclose(weights.float(), case.result.weights.float(), rtol=2e-2 if coarse else 1e-4):
            yield f"experts renumbered to {number}: weights differ"
    elif not _were_ties(used - used_anew, used_anew - used, number):
        yield f"experts renumbered to {number}: in use are {sorted(used_anew)} (old numbers), were {sorted(used)}"


def padding_is_silent(case: Case) -> Iterator[str]:
    """Padding rows change nothing for others, whatever is in them, NaN included, and come back as they were."""
    live = case.routing.role != Role.PADDING
    count = int(live.sum())
    if not count:
        return
    without = take_rows(case.routing, live)
    yield from _differences(case.run(without), _rows(case.result, live), "the batch without its padding")
    noisy = join_rows(without, garbage(without, 3))
    result = case.run(noisy)
    yield from _differences(_rows(result, torch.arange(count)), _rows(case.result, live), "with NaN in padding rows")
    if not (same_bits(result.ids, noisy.ids) and same_bits(result.weights, noisy.weights)):
        tail = slice(count, None)
        if not (same_bits(result.ids[tail], noisy.ids[tail]) and same_bits(result.weights[tail], noisy.weights[tail])):
            yield "padding rows did not come back as they were"


def rows_that_are_not_finite_stay_exact(case: Case) -> Iterator[str]:
    """A token whose logits are NaN keeps the model's routing, and counts for others as an EXACT one."""
    if not case.open_rows:
        return
    row = case.open_rows[-1].index
    broken = case.spec.build()
    broken.logits[row] = broken.choice[row] = torch.nan
    role = case.routing.role.clone()
    role[row] = int(Role.EXACT)
    exact = replace(case.routing, role=role)
    yield from _differences(case.run(broken), case.run(exact), f"with NaN logits in row {row}")


def shift_of_logits(case: Case) -> Iterator[str]:
    """For a softmax, logits that are all higher by a constant are the same logits."""
    if case.layer.rule.score not in ("softmax", "softmax_over_chosen"):
        return
    # whole numbers, so that the sum is exact in float32
    shift = _shuffled(case, case.spec.tokens).unsqueeze(-1) * 3.0 - 5.0
    result = case.run(replace(case.routing, logits=case.routing.logits + shift, choice=case.routing.choice + shift))
    if not torch.equal(result.ids, case.result.ids):
        ids, wanted = result.ids.tolist(), case.result.ids.tolist()
        yield f"logits shifted by {shift.flatten().tolist()}: ids are {ids}, not {wanted}"
    coarse = result.weights.dtype.itemsize < 4
    if not torch.allclose(result.weights.float(), case.result.weights.float(), rtol=2e-2 if coarse else 1e-4):
        yield f"logits shifted by {shift.flatten().tolist()}: weights differ"


def leading_dimensions(case: Case) -> Iterator[str]:
    """Independent batches in one call give what each gives alone; one after the other, if the strategy remembers."""
    sibling = replace(case.spec, seed=case.spec.seed + 1).build()
    result = case.run(stack([case.routing, sibling]))
    after = copy.deepcopy(case.selection)
    in_turn = (after(case.routing), after(sibling)) if case.strategy.remembers() else (case.result, case.run(sibling))
    for index, alone in enumerate(in_turn):
        part = Rerouted(*(getattr(result, name)[index] for name in _FIELDS))
        yield from _differences(part, alone, f"batch {index} of two in one call")


_FIELDS = ("ids", "weights", "lost", "lost_ids", "lost_weights")


def _shuffled(case: Case, count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(case.spec.seed))


def _rows(result: Rerouted, index: Tensor) -> Rerouted:
    return Rerouted(*(getattr(result, name)[index] for name in _FIELDS))


def _differences(got: Rerouted, wanted: Rerouted, what: str) -> Iterator[str]:
    for name in _FIELDS:
        one, other = getattr(got, name), getattr(wanted, name)
        if not same_bits(one, other):
            yield f"{what}: {name} are {one.tolist()}, not {other.tolist()}"


def _were_ties(gone: set[int], come: set[int], number: list[int]) -> bool:
    """Whether those that left and those that came can be paired as equals of which the lowest number stays."""

    def place(left: int, tried: set[int]) -> bool:
        for new in come - tried:
            if left < new and number[new] < number[left]:
                tried.add(new)
                if new not in partner or place(partner[new], tried):
                    partner[new] = left
                    return True
        return False

    partner: dict[int, int] = {}
    return len(gone) == len(come) and all(place(left, set()) for left in gone)
