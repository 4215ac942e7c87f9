"""What the route kernel leaves behind beside ids and weights: the report's counters and the execution plan."""

import triton
import triton.language as tl

COLUMNS = tl.constexpr(11)  # of the counters, per phase; their order is that of lynx.counters


@triton.jit
def add_counts(
    counts, mass, worst, used, rows_prefill, rows_decode, mass_prefill, mass_decode, worst_prefill, worst_decode
):
    """Add one batch to the counters: int64 `(2, COLUMNS)`, float64 `(2,)` and float32 `(2,)`."""
    i = tl.arange(0, 32)
    step = tl.zeros((32,), tl.int64)
    for p in tl.static_range(2):
        rows = rows_prefill if p == 0 else rows_decode
        base = p * COLUMNS
        # five counts of 12 bits: padding, exact, open, changed, unsound
        exact, opened = (rows >> 12) & 4095, (rows >> 24) & 4095
        live = (exact + opened) > 0
        step = tl.where(i == base, live.to(tl.int64), step)
        step = tl.where(i == base + 1, (live & (opened == 0)).to(tl.int64), step)
        step = tl.where(i == base + 2, rows & 4095, step)
        step = tl.where(i == base + 3, exact, step)
        step = tl.where(i == base + 4, opened, step)
        # bits of `used`: before, after; in each, for prefill and decode, all live rows and open ones
        step = tl.where(i == base + 5, tl.sum((used >> (2 * p)) & 1, 0).to(tl.int64), step)
        step = tl.where(i == base + 6, tl.sum((used >> (2 * p + 4)) & 1, 0).to(tl.int64), step)
        step = tl.where(i == base + 7, tl.sum((used >> (2 * p + 1)) & 1, 0).to(tl.int64), step)
        step = tl.where(i == base + 8, tl.sum((used >> (2 * p + 5)) & 1, 0).to(tl.int64), step)
        step = tl.where(i == base + 9, (rows >> 36) & 4095, step)
        step = tl.where(i == base + 10, (rows >> 48) & 4095, step)
    inside = i < 2 * COLUMNS
    tl.store(counts + i, tl.load(counts + i, inside, other=0) + step, inside)
    tl.store(mass, tl.load(mass) + mass_prefill)
    tl.store(mass + 1, tl.load(mass + 1) + mass_decode)
    tl.store(worst, tl.minimum(tl.load(worst), worst_prefill))
    tl.store(worst + 1, tl.minimum(tl.load(worst + 1), worst_decode))


@triton.jit
def put_experts(plan, rows, E: tl.constexpr, BE: tl.constexpr):
    """Write the plan's active experts and their offsets, given how many slots run on each `(BE,)`.

    Returns:
        Each expert's first row `(BE,)`, and how many rows there are.
    """
    e = tl.arange(0, BE)
    experts = plan + 1
    offsets = experts + E
    active = (rows > 0).to(tl.int32)
    first = tl.cumsum(rows, 0) - rows
    order = tl.cumsum(active, 0) - active
    count = tl.sum(active, 0)
    total = tl.sum(rows, 0)
    tl.store(plan, count)
    tl.store(experts + order, e, active > 0)
    tl.store(experts + e, -1 + 0 * e, (e >= count) & (e < E))
    tl.store(offsets + order, first, active > 0)
    tl.store(offsets + e, total + 0 * e, (e >= count) & (e < E))
    tl.store(offsets + E, total)
    return first, total


@triton.jit
def put_tile(slots, place, at, inside, within, runs, runs_on, first, total, BT: tl.constexpr, BK: tl.constexpr):
    """Write the plan's slots of a tile: `within` its expert's rows, which begin at `first` `(BE,)`."""
    row = within + tl.reshape(tl.gather(first, tl.reshape(runs_on, (BT * BK,)), 0), (BT, BK))
    runs = runs & inside
    tl.store(place + at, tl.where(runs, row, -1), inside)
    tl.store(slots + row, at, runs)
    tl.store(slots + at, -1 + 0 * at, inside & (at >= total))


@triton.jit
def put_slots(
    plan, new_ids, first, total, begin, end, T,
    E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write the plan's slots of rows `begin` to `end`, whose places count from `first` `(BE,)` of their expert."""
    j = tl.arange(0, BK)
    slots = plan + 2 + 2 * E
    place = slots + T * K
    for start in range(begin, end, BT):
        t = start + tl.arange(0, BT)
        at = t[:, None] * K + j[None, :]
        inside = (t < end)[:, None] & (j < K)[None, :]
        within = tl.load(place + at, inside, other=-1)
        runs = within >= 0
        runs_on = tl.where(runs, tl.load(new_ids + at, inside, other=0), 0).to(tl.int32)
        put_tile(slots, place, at, inside, within, runs, runs_on, first, total, BT, BK)
