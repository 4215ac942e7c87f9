# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""The plan in one launch of one program, for callers whose ids did not come from the route kernel.

A stable counting sort by prefix sums over membership tiles of slots by experts: no atomics, no scratch memory.
Symbols: E experts, S slots. `lynx.kernels.plan.make_plan` is the readable form; both give the same integers.
"""

import triton
import triton.language as tl


@triton.jit
def _experts_of(ids, weights, slot, S, E):
    """The expert of each slot as int32, or -1 where the slot is not run."""
    inside = slot < S
    expert = tl.load(ids + slot, mask=inside, other=-1).to(tl.int64)
    weight = tl.load(weights + slot, mask=inside, other=0.0)
    if weights.dtype.element_ty != tl.float64:  # whose smallest numbers are zeros in float32
        weight = weight.to(tl.float32)  # the interpreter compares bfloat16 by its bits
    return tl.where((weight != 0.0) & (expert >= 0) & (expert < E), expert, -1).to(tl.int32)


@triton.jit(do_not_specialize=["S"])
def plan_kernel(
    ids,  # (S,), any integer type
    weights,  # (S,), any floating-point type
    plan,
    S,
    E,
    E_POWER: tl.constexpr,  # E rounded up to a power of two
    BLOCK_S: tl.constexpr,
):
    """Write a whole plan: count the rows of each expert, lay the active ones end to end, then place slot after slot."""
    each = tl.arange(0, E_POWER)
    rows = tl.zeros((E_POWER,), tl.int32)
    for first in tl.range(0, S, BLOCK_S):
        expert = _experts_of(ids, weights, first + tl.arange(0, BLOCK_S), S, E)
        rows += tl.sum((expert[:, None] == each[None, :]).to(tl.int32), 0)

    active = (rows > 0).to(tl.int32)
    count = tl.sum(active, 0)
    total = tl.sum(rows, 0)
    rank = tl.cumsum(active, 0) - active
    start = tl.cumsum(rows, 0) - rows
    tl.store(plan, count)
    tl.store(plan + 1 + rank, each, mask=rows > 0)
    tl.store(plan + 1 + each, -1, mask=(each >= count) & (each < E))
    tl.store(plan + 1 + E + rank, start, mask=rows > 0)
    tl.store(plan + 1 + E + each, total, mask=(each >= count) & (each < E))
    tl.store(plan + 1 + 2 * E, total)

    next_row = start  # where each expert's next slot goes
    for first in tl.range(0, S, BLOCK_S):
        slot = first + tl.arange(0, BLOCK_S)
        expert = _experts_of(ids, weights, slot, S, E)
        member = (expert[:, None] == each[None, :]).to(tl.int32)  # (BLOCK_S, E_POWER)
        until = tl.cumsum(member, 0)
        row = tl.sum(member * (next_row[None, :] + until - 1), 1)
        tl.store(plan + 2 + 2 * E + row, slot, mask=expert >= 0)
        tl.store(plan + 2 + 2 * E + slot, -1, mask=(slot >= total) & (slot < S))
        tl.store(plan + 2 + 2 * E + S + slot, tl.where(expert >= 0, row, -1), mask=slot < S)
        next_row += tl.sum(member, 0)
