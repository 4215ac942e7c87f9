"""What the batch as a whole keeps: the first half of the route kernel."""

import triton
import triton.language as tl

from lynx.kernels.fused.rows import (
    BUDGET,
    COVER,
    DEMAND_PROTECT,
    DROP,
    EXPERT_BITS,
    EXPERT_MASK,
    INF,
    PROTECT,
    UNITS,
    column,
    either,
    read_rows,
    read_slots,
)

CHUNK = tl.constexpr(32)
FEWER = tl.constexpr(4)  # at once, of numbers that take twice the registers
COVERAGE = tl.constexpr(2)  # the value of BY_DEMAND that stands for a share instead of a budget

# What is said of an expert, in bits.
WANTED = tl.constexpr(1)  # by an open row
WOKEN = tl.constexpr(2)  # by an exact row
KEPT = tl.constexpr(4)  # by a rule that every token decides for itself, or by protection
FIRST = tl.constexpr(8)  # before all others in demand
OWN = tl.constexpr(16)  # it is among the row's own, whatever the row may do


@triton.jit
def ranks_ahead(other, f, key, e):
    """Bool `(SOME, BE)`: whether expert `f` of key `other` comes before expert `e` of `key`, ties by lowest id."""
    ahead = (other[:, None] > key[None, :]) | ((other[:, None] == key[None, :]) & (f[:, None] < e[None, :]))
    return ahead


@triton.jit
def most_wanted(demand, first, candidate, settings, BE: tl.constexpr):
    """Bool `(BE,)`: the candidates with the most demand up to the budget, `first` before all, ties by lowest id."""
    e = tl.arange(0, BE)
    key = tl.where(candidate, tl.where(first, INF, demand.to(tl.float32)), -INF)
    # all pairs at once would not fit the registers
    SOME: tl.constexpr = CHUNK if BE > CHUNK else BE
    before = tl.zeros((SOME, BE), tl.int32)
    for begin in range(0, BE, SOME):
        f = begin + tl.arange(0, SOME)
        other = tl.gather(key, f, 0)
        before += ranks_ahead(other, f, key, e).to(tl.int32)
    place = tl.sum(before, 0)
    budget = tl.load(settings + BUDGET)
    limit = tl.where(budget < 0.0, tl.sum(candidate.to(tl.int32), 0).to(tl.float32) - tl.load(settings + DROP), budget)
    return candidate & (place.to(tl.float32) < limit)


@triton.jit
def covering(demand, first, candidate, woken, settings, BE: tl.constexpr):
    """Bool `(BE,)`: the fewest candidates with which a share of the demand is covered, and `first` in any case.

    What is woken comes before all others, and has covered its own.
    """
    e = tl.arange(0, BE)
    wished = demand.to(tl.float32)
    key = tl.where(candidate, tl.where(first, INF, wished), -INF)
    units = tl.maximum(wished.to(tl.int64), 0)  # as in torch, where demand is float32
    taken = tl.where(candidate, units, 0)
    SOME: tl.constexpr = FEWER if BE > FEWER else BE
    before = tl.zeros((SOME, BE), tl.int64)
    for begin in range(0, BE, SOME):
        f = begin + tl.arange(0, SOME)
        other, theirs = tl.gather(key, f, 0), tl.gather(taken, f, 0)
        before += tl.where(ranks_ahead(other, f, key, e), theirs[:, None], 0)
    covered = tl.sum(before, 0) + tl.sum(tl.where(woken, units, 0), 0)
    total = tl.maximum(tl.sum(units, 0), 1)
    needed = covered.to(tl.float32) < tl.load(settings + COVER) * total.to(tl.float32)
    return candidate & (needed | first)


@triton.jit
def hear_tile(
    start, choice, logits, ids, weights, role, phase, priority, settings, end, slots_per_token,
    E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
    BY_RANK: tl.constexpr, BY_RATIO: tl.constexpr, BY_MASS: tl.constexpr, BY_DEMAND: tl.constexpr,
    UTILITY: tl.constexpr, HAS_PRIORITY: tl.constexpr,
):  # fmt: skip
    """Read a tile of rows and gather what they say of each expert.

    Returns:
        What `read_rows` and `read_slots` give; then, for each row and expert, bits `(BT, BE)` and votes in integer
        units `(BT, BE)`.
    """
    e = tl.arange(0, BE)
    j = tl.arange(0, BK)
    scores, padding, is_open, unsound, decode = read_rows(
        start, choice, logits, weights, role, phase, settings, end, E, K, BT, BE, BK
    )
    expert, routed, weight, mass, rank, want = read_slots(
        start, choice, ids, weights, is_open, settings, end, E, K, BT, BE, BK, BY_RANK, BY_RATIO, BY_MASS
    )
    own = routed & is_open[:, None]
    exact = routed & ((padding == 0) & (is_open == 0))[:, None]
    kept = want | (own & (rank.to(tl.float32) < tl.load(settings + PROTECT)))
    bits = own.to(tl.int32) * WANTED | exact.to(tl.int32) * WOKEN | kept.to(tl.int32) * KEPT
    bits = bits | routed.to(tl.int32) * OWN
    votes = tl.zeros((BT, BK), tl.int64)
    if BY_DEMAND:
        first = own & (rank.to(tl.float32) < tl.load(settings + DEMAND_PROTECT))
        bits = bits | first.to(tl.int32) * FIRST
        wish = mass
        if UTILITY == "own-mass":
            wish = weight
        elif UTILITY == "count":
            wish = tl.where(routed, 1.0, 0.0)
        if HAS_PRIORITY:
            t = start + tl.arange(0, BT)
            wish = wish * tl.load(priority + t, t < end, other=0.0)[:, None]
        votes = tl.where(own, (wish * UNITS).to(tl.int64), 0)
    said = expert | (bits << EXPERT_BITS)  # in one number, as fetching a column takes all threads
    heard = tl.zeros((BT, BE), tl.int32)
    cast = tl.zeros((BT, BE), tl.int64)
    for jj in range(slots_per_token):
        one = column(said, j, jj)
        same = (one & EXPERT_MASK)[:, None] == e[None, :]
        heard |= tl.where(same, (one >> EXPERT_BITS)[:, None], 0)
        if BY_DEMAND:
            cast += tl.where(same, column(votes, j, jj)[:, None], 0)
    return scores, padding, is_open, unsound, decode, expert, routed, mass, rank, want, heard, cast


@triton.jit
def hear_rows(
    choice, logits, ids, weights, role, phase, priority, settings, begin, end, slots_per_token,
    E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
    BY_RANK: tl.constexpr, BY_RATIO: tl.constexpr, BY_MASS: tl.constexpr, BY_DEMAND: tl.constexpr,
    UTILITY: tl.constexpr, HAS_PRIORITY: tl.constexpr,
):  # fmt: skip
    """Walk rows `begin` to `end` and gather what they say of each expert.

    Returns:
        Bits `(BE,)`, the demand `(BE,)` in integer units, and how many rows are open.
    """
    heard = tl.zeros((BE,), tl.int32)
    demand = tl.zeros((BE,), tl.int64)
    open_rows = tl.zeros((), tl.int32)
    for start in range(begin, end, BT):
        _, _, is_open, _, _, _, _, _, _, _, tile, cast = hear_tile(
            start, choice, logits, ids, weights, role, phase, priority, settings, end, slots_per_token,
            E, K, BT, BE, BK, BY_RANK, BY_RATIO, BY_MASS, BY_DEMAND, UTILITY, HAS_PRIORITY,
        )  # fmt: skip
        open_rows += tl.sum(is_open.to(tl.int32), 0)
        heard |= tl.reduce(tile, 0, either)
        if BY_DEMAND:
            demand += tl.sum(cast, 0)
    return heard, demand, open_rows


@triton.jit
def keep(heard, demand, settings, BY_DEMAND: tl.constexpr, BE: tl.constexpr):
    """Decide for the batch.

    Returns:
        Bool `(BE,)` experts that are kept or woken, and bool `(BE,)` experts woken by exact rows.
    """
    woken = (heard & WOKEN) > 0
    kept = (heard & KEPT) > 0
    if BY_DEMAND:
        candidate = ((heard & WANTED) > 0) & (woken == 0)
        if BY_DEMAND == COVERAGE:
            kept = kept | covering(demand, (heard & FIRST) > 0, candidate, woken, settings, BE)
        else:
            kept = kept | most_wanted(demand, (heard & FIRST) > 0, candidate, settings, BE)
    return kept | woken, woken
