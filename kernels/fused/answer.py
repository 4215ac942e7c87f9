# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Who answers for lost slots, and how much of each token's mass that is: between the route kernel and the stand-ins'.

One program walks the batch in tiles of rows. Weights are in the arithmetic of `lynx.standins`, single IEEE operations
in float32; the mass is summed in integers, so that neither tiles nor threads change a bit of a row.

Tiles: `t` rows of BT, `j` slots of BK (powers of two; what is beyond T or k is masked).
"""

import triton
import triton.language as tl

from lynx.kernels.fused.rows import INF, either, parts_of

# What is said of a slot, in bits.
LOST = tl.constexpr(1)
KEPT = tl.constexpr(2)
UNKNOWN = tl.constexpr(4)  # lost, and its expert has no stand-in


@triton.jit
def add_and_most(a0, a1, a2, a3, b0, b1, b2, b3):
    """Add up two numbers and take the largest of two, for all rows in one reduction."""
    return a0 + b0, a1 + b1, tl.maximum(a2, b2), tl.maximum(a3, b3)


@triton.jit(do_not_specialize=["T", "E", "E_known"])
def answer_kernel(
    own_ids,  # (T, k)
    own_weights,  # (T, k)
    ids,  # (T, k), after re-routing
    weights,  # (T, k), after re-routing
    lost_slots,  # (T, k) bool
    choice,  # (T, E)
    known,  # (E_known,) bool
    phase,  # (T,) int8
    new_ids,  # (T, k), not written where something is re-picked
    new_weights,  # (T, k)
    answered,  # (T, k) in float32
    lost_ids,  # (T, k)
    counted,  # (2, 2) in float64: sums and the largest, by phase
    T,
    E,
    E_known,
    RE_PICKED: tl.constexpr,
    STOOD_IN: tl.constexpr,  # the rest to 1
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Share out what lost slots gave, row by row, and add what stand-ins answer for to the counters."""
    # All is read before anything is written, so that it comes at once: a store holds back the loads behind it.
    j = tl.arange(0, BK)
    sum_prefill = tl.load(counted)
    sum_decode = tl.load(counted + 1)
    most_prefill = tl.load(counted + 2)
    most_decode = tl.load(counted + 3)
    for start in range(0, T, BT):
        t = start + tl.arange(0, BT)
        at = t[:, None] * K + j[None, :]
        slots = (t < T)[:, None] & (j < K)[None, :]
        named = tl.load(own_ids + at, slots, other=0).to(tl.int64)
        gone = tl.load(lost_slots + at, slots, other=0) != 0
        weight = tl.load(weights + at, slots, other=0.0)
        own = tl.load(own_weights + at, slots, other=0.0).to(tl.float32)
        stage = tl.load(phase + t, t < T, other=-1)
        if RE_PICKED == 0.0:
            given = tl.load(ids + at, slots, other=0)
        routed = slots & (named >= 0) & (named < E)
        expert = tl.where(routed, named, 0).to(tl.int32)
        lost = routed & gone
        kept = routed & (lost == 0)
        unknown = lost & (tl.load(known + expert, lost & (expert < E_known), other=0) == 0)
        if RE_PICKED == 0.0:
            value = tl.load(choice + t[:, None] * E + expert, kept, other=-INF)
        said = lost.to(tl.int32) * LOST | kept.to(tl.int32) * KEPT | unknown.to(tl.int32) * UNKNOWN
        rows = tl.reduce(said, 1, either) == (LOST | KEPT)  # some lost, some kept, and none of the lost unknown
        answers = rows[:, None] & lost

        re_picked, stood_in = RE_PICKED * weight.to(tl.float32), STOOD_IN * own
        mixed = tl.where(lost, re_picked, re_picked + stood_in)
        tl.store(new_weights + at, tl.where(rows[:, None] & routed, mixed.to(weight.dtype), weight), slots)
        shares = tl.where(answers, stood_in, 0.0)
        tl.store(answered + at, shares, slots)
        tl.store(lost_ids + at, tl.where(lost, expert, 0).to(lost_ids.dtype.element_ty), slots)
        if RE_PICKED == 0.0:  # a lost slot repeats the row's best kept expert, at weight 0
            best = kept & ((value < tl.max(value, 1)[:, None]) == 0)
            lowest = tl.min(tl.where(best, expert, E), 1)
            tl.store(new_ids + at, tl.where(answers, lowest[:, None].to(given.dtype), given), slots)

        parts = parts_of(tl.maximum(tl.where(routed, own, 0.0), 0.0), BT, BK)
        total = tl.maximum(tl.sum(parts, 1), 1).to(tl.float32)
        mass = tl.div_rn(tl.sum(tl.where(shares != 0.0, parts, 0), 1).to(tl.float32), total)
        in_prefill, in_decode = tl.where(stage == 0, mass, 0.0), tl.where(stage == 1, mass, 0.0)
        add_prefill, add_decode, prefill, decode = tl.reduce(
            (in_prefill.to(tl.float64), in_decode.to(tl.float64), in_prefill, in_decode), 0, add_and_most
        )
        sum_prefill += add_prefill
        sum_decode += add_decode
        most_prefill = tl.maximum(most_prefill, prefill.to(tl.float64))
        most_decode = tl.maximum(most_decode, decode.to(tl.float64))
    tl.store(counted, sum_prefill)
    tl.store(counted + 1, sum_decode)
    tl.store(counted + 2, most_prefill)
    tl.store(counted + 3, most_decode)
