"""Every token of the batch gets its best experts among those that are kept: the second half of the route kernel."""

import triton
import triton.language as tl

from lynx.kernels.fused.rows import EXPERT_BITS, EXPERT_MASK, INF, PROTECT, column, either, read_rows, read_slots
from lynx.kernels.fused.weigh import combine_weights


@triton.jit
def spread(expert, routed, slots_per_token, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr):
    """Bool `(BT, BE)`: which experts are a row's own."""
    e = tl.arange(0, BE)
    own = tl.where(routed, expert, -1)
    mine = tl.zeros((BT, BE), tl.int32)
    for jj in range(slots_per_token):
        mine |= (column(own, tl.arange(0, BK), jj)[:, None] == e[None, :]).to(tl.int32)
    return mine > 0


@triton.jit
def next_best(scores, allowed, mine, expert, lost, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr):
    """Find each lost slot's replacement: the row's best allowed experts that it lacks, in order along the slots.

    Returns:
        `(BT, BK)` each: the expert, and whether there is one.
    """
    e = tl.arange(0, BE)
    left = tl.where(allowed[None, :] & (mine == 0), scores, -INF)
    nth = tl.cumsum(lost.to(tl.int32), 1) - 1
    fresh = expert
    filled = tl.zeros((BT, BK), tl.int32)
    for n in range(tl.max(tl.sum(lost.to(tl.int32), 1), 0)):
        best = tl.max(left, 1)
        first = tl.min(tl.where(left == best[:, None], e[None, :], BE), 1)
        hit = lost & (nth == n) & (best > -INF)[:, None]
        fresh = tl.where(hit, first[:, None], fresh)
        filled |= hit.to(tl.int32)
        left = tl.where(e[None, :] == first[:, None], -INF, left)
    return fresh, filled > 0


@triton.jit
def tally(a0, a1, a2, a3, a4, a5, b0, b1, b2, b3, b4, b5):
    """Add up four numbers and take the least of two, for all rows in one reduction."""
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, tl.minimum(a4, b4), tl.minimum(a5, b5)


@triton.jit
def reroute_tile(
    start, scores, padding, is_open, unsound, decode, expert, routed, mass, rank, want, mine,
    logits, ids, weights, settings, new_ids, new_weights, lost_slots, allowed, enough, end, slots_per_token,
    E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
    SCORE: tl.constexpr, RENORMALISE: tl.constexpr, REPICK: tl.constexpr, REFILL: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Re-route a tile of rows, given what was read of them; write new ids, weights and what was lost.

    Experts are `allowed` `(BE,)`, and rows are re-routed only if there are `enough` open ones.

    Returns:
        For the counters: bits of use `(BT, BE)`, counts of rows in prefill and in decode, their kept mass, its worst;
        for the plan: which slots run `(BT, BK)` and on what, and how many of a row's on each expert `(BT, BE)`.
    """
    e = tl.arange(0, BE)
    j = tl.arange(0, BK)
    t = start + tl.arange(0, BT)
    at = t[:, None] * K + j[None, :]
    slots = (t < end)[:, None] & (j < K)[None, :]
    is_open = is_open & (tl.zeros((BT,), tl.int32) + enough.to(tl.int32) > 0)
    given = tl.load(ids + at, slots, other=-1)
    given_weight = tl.load(weights + at, slots, other=0.0)
    own_weight = given_weight.to(tl.float32)

    kept = tl.reshape(tl.gather(allowed.to(tl.int32), tl.reshape(expert, (BT * BK,)), 0), (BT, BK)) > 0
    if not SHARE:
        alone = (want | (routed & (rank.to(tl.float32) < tl.load(settings + PROTECT)))).to(tl.int32)
        alike = (expert[:, None, :] == expert[:, :, None]) & routed[:, None, :]  # an expert named twice is kept twice
        kept = kept | (tl.sum(tl.where(alike, alone[:, None, :], 0), 2) > 0)
    lost = routed & is_open[:, None] & (kept == 0)
    fresh, filled = expert, lost & (kept > 0)
    if REPICK and REFILL:
        fresh, filled = next_best(scores, allowed, mine, expert, lost, BT, BE, BK)

    # A row that would be left without any expert keeps its own best one.
    some = tl.sum((routed & ((lost == 0) | filled)).to(tl.int32), 1) > 0
    lost = lost & (some[:, None] | (rank > 0))
    filled = filled & lost
    kept_rank = tl.where(routed & (lost == 0), rank, E)
    best_rank = tl.min(kept_rank, 1)
    best_kept = tl.max(tl.where(kept_rank == best_rank[:, None], expert, -1), 1)
    nth = tl.cumsum(lost.to(tl.int32), 1)
    best_fresh = tl.max(tl.where(lost & (nth == 1), fresh, -1), 1)
    best = tl.where(best_rank < E, best_kept, best_fresh)
    new = tl.where(lost, tl.where(filled, fresh, best[:, None]), expert)
    values = combine_weights(
        own_weight, new, routed, lost, filled, logits, settings, t, end, slots_per_token,
        E, K, BT, BE, BK, SCORE, RENORMALISE, REPICK,
    )  # fmt: skip

    sound = tl.sum(tl.where((tl.abs(values) < INF) | (slots == 0), 0, 1), 1) == 0
    lost = lost & sound[:, None]
    changed = tl.sum(lost.to(tl.int32), 1) > 0
    # what loses nothing goes out as it came in, bit for bit
    out_ids = tl.where(changed[:, None] & routed, new.to(given.dtype), given)
    out_weights = tl.where(changed[:, None], values.to(given_weight.dtype), given_weight)
    tl.store(new_ids + at, out_ids, slots)
    tl.store(new_weights + at, out_weights, slots)
    tl.store(lost_slots + at, lost.to(tl.int8), slots)

    share = 1.0 - tl.sum(tl.where(lost, mass, 0.0).to(tl.float64), 1).to(tl.float32)
    share = tl.minimum(tl.maximum(share, 0.0), 1.0)
    exact = (padding == 0) & (is_open == 0)
    flags = padding.to(tl.int64) | (exact.to(tl.int64) << 12) | (is_open.to(tl.int64) << 24)
    flags = flags | (changed.to(tl.int64) << 36) | (unsound.to(tl.int64) << 48)
    flags = tl.where(t < end, flags, 0)
    in_prefill, in_decode = is_open & (decode == 0), is_open & decode
    rows_prefill, rows_decode, mass_prefill, mass_decode, worst_prefill, worst_decode = tl.reduce(
        (
            tl.where(decode, 0, flags),
            tl.where(decode, flags, 0),
            tl.where(in_prefill, share, 0.0).to(tl.float64),
            tl.where(in_decode, share, 0.0).to(tl.float64),
            tl.where(in_prefill, share, 1.0),
            tl.where(in_decode, share, 1.0),
        ),
        0,
        tally,
    )

    who = ((padding == 0).to(tl.int32) | (is_open.to(tl.int32) << 1)) << tl.where(decode, 2, 0)
    before = tl.where(routed & (own_weight != 0.0), who[:, None], 0)
    runs = routed & (out_weights.to(tl.float32) != 0.0)
    after = tl.where(runs, who[:, None] << 4, 0)
    runs_on = tl.where(routed, out_ids, 0).to(tl.int32)
    # in one number, as fetching a column takes all threads: both experts, eight bits of use, whether it runs
    said = runs_on | (expert << EXPERT_BITS) | ((before | after) << 2 * EXPERT_BITS)
    said = said | (runs.to(tl.int32) << 2 * EXPERT_BITS + 8)
    used = tl.zeros((BT, BE), tl.int32)
    members = tl.zeros((BT, BE), tl.int32)
    for jj in range(slots_per_token):
        one = column(said, j, jj)
        use = (one >> 2 * EXPERT_BITS) & 255
        same = (one & EXPERT_MASK)[:, None] == e[None, :]
        used |= tl.where(((one >> EXPERT_BITS) & EXPERT_MASK)[:, None] == e[None, :], (use & 15)[:, None], 0)
        used |= tl.where(same, (use & 240)[:, None], 0)
        members += tl.where(same, (one >> 2 * EXPERT_BITS + 8)[:, None], 0)
    return (
        used, rows_prefill, rows_decode, mass_prefill, mass_decode, worst_prefill, worst_decode,
        runs, runs_on, members,
    )  # fmt: skip


@triton.jit
def rows_within(runs, runs_on, members, rows_of, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr):
    """Each slot's row among those of its expert `(BT, BK)`, `rows_of` `(BE,)` of which lie in earlier tiles."""
    j = tl.arange(0, BK)
    earlier = tl.cumsum(members, 0) - members + rows_of[None, :]
    place = tl.arange(0, BT)[:, None] * BE + runs_on
    within = tl.gather(tl.reshape(earlier, (BT * BE,)), tl.reshape(place, (BT * BK,)), 0)
    twice = (runs_on[:, None, :] == runs_on[:, :, None]) & runs[:, None, :] & (j[None, None, :] < j[None, :, None])
    return tl.reshape(within, (BT, BK)) + tl.sum(twice.to(tl.int32), 2)


@triton.jit
def reroute_rows(
    choice, logits, ids, weights, role, phase, settings, new_ids, new_weights, lost_slots, place,
    allowed, enough, begin, end, slots_per_token,
    E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
    SCORE: tl.constexpr, RENORMALISE: tl.constexpr, REPICK: tl.constexpr, REFILL: tl.constexpr, SHARE: tl.constexpr,
    BY_RANK: tl.constexpr, BY_RATIO: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    """Re-route rows `begin` to `end`, tile by tile, and write to `place` each slot's row among those of its expert.

    Returns:
        For the counters: use of each expert in bits `(BE,)`, counts of rows in prefill and in decode, their kept mass
        and its worst; for the plan: how many slots run on each expert `(BE,)`.
    """
    j = tl.arange(0, BK)
    used = tl.zeros((BE,), tl.int32)
    rows_of = tl.zeros((BE,), tl.int32)
    rows_prefill = tl.zeros((), tl.int64)
    rows_decode = tl.zeros((), tl.int64)
    mass_prefill = tl.zeros((), tl.float64)
    mass_decode = tl.zeros((), tl.float64)
    worst_prefill = tl.full((), 1.0, tl.float32)
    worst_decode = tl.full((), 1.0, tl.float32)
    for start in range(begin, end, BT):
        scores, padding, is_open, unsound, decode = read_rows(
            start, choice, logits, weights, role, phase, settings, end, E, K, BT, BE, BK
        )
        expert, routed, _, mass, rank, want = read_slots(
            start, choice, ids, weights, is_open, settings, end, E, K, BT, BE, BK, BY_RANK, BY_RATIO, BY_MASS
        )
        mine = scores < INF  # not looked at, unless
        if REPICK and REFILL:
            mine = spread(expert, routed, slots_per_token, BT, BE, BK)
        tile, rows_0, rows_1, mass_0, mass_1, worst_0, worst_1, runs, runs_on, members = reroute_tile(
            start, scores, padding, is_open, unsound, decode, expert, routed, mass, rank, want, mine,
            logits, ids, weights, settings, new_ids, new_weights, lost_slots, allowed, enough, end, slots_per_token,
            E, K, BT, BE, BK, SCORE, RENORMALISE, REPICK, REFILL, SHARE,
        )  # fmt: skip
        within = rows_within(runs, runs_on, members, rows_of, BT, BE, BK)
        t = start + tl.arange(0, BT)
        tl.store(place + t[:, None] * K + j[None, :], tl.where(runs, within, -1), (t < end)[:, None] & (j < K)[None, :])
        used |= tl.reduce(tile, 0, either)
        rows_of += tl.sum(members, 0)
        rows_prefill += rows_0
        rows_decode += rows_1
        mass_prefill += mass_0
        mass_decode += mass_1
        worst_prefill = tl.minimum(worst_prefill, worst_0)
        worst_decode = tl.minimum(worst_decode, worst_1)
    return used, rows_prefill, rows_decode, mass_prefill, mass_decode, worst_prefill, worst_decode, rows_of
