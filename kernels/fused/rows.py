"""What the rows of a batch may do, and what each token wants of its own slots."""

import triton
import triton.language as tl

PADDING = tl.constexpr(0)
OPEN = tl.constexpr(2)
UNITS = tl.constexpr(1099511627776.0)  # 2**40, see lynx.routing
TINY = tl.constexpr(1.1754943508222875e-38)
INF = tl.constexpr(float("inf"))
EXPERT_BITS = tl.constexpr(9)  # an expert's id, where other things share its number: E is 512 at most
EXPERT_MASK = tl.constexpr(511)

# Places in the settings, a float32 tensor on the device: they may differ per layer and change between steps.
RANK = tl.constexpr(0)
RATIO = tl.constexpr(1)
MASS = tl.constexpr(2)
BUDGET = tl.constexpr(3)  # negative: all candidates but DROP
DROP = tl.constexpr(4)
DEMAND_PROTECT = tl.constexpr(5)
PROTECT = tl.constexpr(6)
MIN_TOKENS = tl.constexpr(7)
ON_PREFILL = tl.constexpr(8)
ON_DECODE = tl.constexpr(9)
SCALE = tl.constexpr(10)
COVER = tl.constexpr(11)


@triton.jit
def either(a, b):
    """Combine bits."""
    return a | b


@triton.jit
def column(tile, j, jj):
    """Column `jj` of a tile `(BT, BK)`."""
    return tl.sum(tl.where(j[None, :] == jj, tile, 0), 1)


@triton.jit
def sum_slots(tile, j, slots_per_token):
    """Sum of each row of a tile `(BT, BK)` of floats, slot after slot: the layout of the threads changes no bit."""
    total = column(tile, j, 0)
    for jj in range(1, slots_per_token):
        total += column(tile, j, jj)
    return total


@triton.jit
def sum_parts(tile):
    """Sum of each row of numbers from 0 to 1, in integers: exact, so it has no order; NaN where one of them is."""
    total = tl.sum((tile * UNITS).to(tl.int64), 1).to(tl.float32) * (1.0 / UNITS)
    return tl.where(tl.max((tile != tile).to(tl.int32), 1) > 0, float("nan"), total)


@triton.jit
def parts_of(weight, BT: tl.constexpr, BK: tl.constexpr):
    """Combine weights `(BT, BK)`, none below 0, in integer units of the row's largest."""
    largest = tl.maximum(tl.max(weight, 1), TINY)
    return (tl.div_rn(weight, tl.broadcast_to(largest[:, None], (BT, BK))) * UNITS).to(tl.int64)


@triton.jit
def read_rows(
    start, choice, logits, weights, role, phase, settings, end,
    E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Read what the rows of a tile may do.

    Returns:
        Scores `(BT, BE)`, -inf from row `end` on; and bool `(BT,)`: padding (what is no row included), open,
        unsound, in decode.
    """
    t = start + tl.arange(0, BT)
    e = tl.arange(0, BE)
    j = tl.arange(0, BK)
    inside = t < end
    here = inside[:, None] & (e < E)[None, :]
    scores = tl.load(choice + t[:, None] * E + e[None, :], here, other=-INF)
    raw = tl.load(logits + t[:, None] * E + e[None, :], here, other=-INF)
    slots = inside[:, None] & (j < K)[None, :]
    given = tl.load(weights + t[:, None] * K + j[None, :], slots, other=0.0).to(tl.float32)
    faults = tl.sum(tl.where((scores < INF) & (raw < INF), 0, 1), 1) + tl.sum(tl.where(tl.abs(given) < INF, 0, 1), 1)
    what = tl.load(role + t, inside, other=PADDING)
    decode = tl.load(phase + t, inside, other=0) == 1
    padding = what == PADDING
    unsound = (faults > 0) & (padding == 0)
    acts = tl.where(decode, tl.load(settings + ON_DECODE), tl.load(settings + ON_PREFILL)) > 0.0
    is_open = (what == OPEN) & acts & (unsound == 0)
    return scores, padding, is_open, unsound, decode


@triton.jit
def read_slots(
    start, choice, ids, weights, is_open, settings, end,
    E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
    BY_RANK: tl.constexpr, BY_RATIO: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    """Read a tile's own slots and what each token wants of them.

    Returns:
        `(BT, BK)` each: the expert (0 for the host's own kind), whether it is routed, the combine weight, the share of
        the token's mass, the rank among the token's own, and whether a rule by rank, ratio or mass wants it.
    """
    t = start + tl.arange(0, BT)
    j = tl.arange(0, BK)
    at = t[:, None] * K + j[None, :]
    slots = (t < end)[:, None] & (j < K)[None, :]
    given = tl.load(ids + at, slots, other=-1)
    routed = (given >= 0) & (given < E)
    expert = tl.where(routed, given, 0).to(tl.int32)
    weight = tl.maximum(tl.where(routed, tl.load(weights + at, slots, other=0.0).to(tl.float32), 0.0), 0.0)
    parts = parts_of(weight, BT, BK)
    total = tl.maximum(tl.sum(parts, 1), 1).to(tl.float32)
    mass = tl.div_rn(parts.to(tl.float32), tl.broadcast_to(total[:, None], (BT, BK)))

    value = tl.load(choice + t[:, None] * E + expert, slots, other=-INF)
    mine, other = value[:, :, None], value[:, None, :]
    better = (other > mine) | ((other == mine) & (expert[:, None, :] < expert[:, :, None]))
    better = (better | (routed == 0)[:, :, None]) & routed[:, None, :]
    rank = tl.sum(better.to(tl.int32), 2)

    want = slots & (j < 0)[None, :]
    if BY_RANK:
        want = want | (rank.to(tl.float32) < tl.load(settings + RANK))
    if BY_RATIO:
        want = want | (mass >= (tl.load(settings + RATIO) * tl.max(mass, 1))[:, None])
    if BY_MASS:
        before = tl.sum(tl.where(better, parts[:, None, :], 0), 2).to(tl.float32)
        want = want | (before < (tl.load(settings + MASS) * total)[:, None])
    routed = routed & slots
    return expert, routed, weight, mass, rank, want & routed & is_open[:, None]
