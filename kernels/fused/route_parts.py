"""The route kernel in two launches, for batches that would keep one program too long.

Every program takes a part of PART rows. The first launch hears each part; in the second, every program puts together
what all parts said, decides for the batch as all others do, and re-routes its own rows. The program that finishes last,
by an integer ticket, adds up the counters and the plan in the order of the parts: which one it is does not show.
"""

import triton
import triton.language as tl

from lynx.kernels.fused.batch import hear_rows, keep
from lynx.kernels.fused.ledger import add_counts, put_experts, put_slots
from lynx.kernels.fused.reroute import reroute_rows
from lynx.kernels.fused.rows import MIN_TOKENS
from lynx.kernels.fused.weigh import own_top_k


@triton.jit(do_not_specialize=["T", "slots_per_token"])
def hear_kernel(
    choice, logits, ids, weights, role, phase, priority, settings,
    heard_parts, demand_parts, opened, ticket, T, slots_per_token,
    E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
    SCORE: tl.constexpr, RENORMALISE: tl.constexpr, REPICK: tl.constexpr, REFILL: tl.constexpr, SHARE: tl.constexpr,
    BY_RANK: tl.constexpr, BY_RATIO: tl.constexpr, BY_MASS: tl.constexpr, BY_DEMAND: tl.constexpr,
    UTILITY: tl.constexpr, HAS_PRIORITY: tl.constexpr, HAS_IDS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Write what each part says: bits `(parts, E)`, demand `(parts, E)` and the number of open rows `(parts,)`."""
    part = tl.program_id(0)
    e = tl.arange(0, BE)
    begin = part * PART
    end = tl.minimum(begin + PART, T)
    if not HAS_IDS:
        own_top_k(
            choice, logits, ids, weights, settings, begin, end, slots_per_token,
            E, K, BT, BE, BK, SCORE, RENORMALISE,
        )  # fmt: skip
        tl.debug_barrier()
    heard, demand, open_rows = hear_rows(
        choice, logits, ids, weights, role, phase, priority, settings, begin, end, slots_per_token,
        E, K, BT, BE, BK, BY_RANK, BY_RATIO, BY_MASS, BY_DEMAND, UTILITY, HAS_PRIORITY,
    )  # fmt: skip
    tl.store(heard_parts + part * E + e, heard, e < E)
    if BY_DEMAND:
        tl.store(demand_parts + part * E + e, demand, e < E)
    tl.store(opened + part, open_rows)
    if part == 0:
        tl.store(ticket, 0)


@triton.jit(do_not_specialize=["T", "slots_per_token"])
def reroute_kernel(
    choice, logits, ids, weights, role, phase, settings, heard_parts, demand_parts, opened, ticket,
    new_ids, new_weights, lost_slots, plan, counts, mass_sums, worst_shares,
    used_parts, rows_parts, tallies, shares, T, slots_per_token,
    E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
    SCORE: tl.constexpr, RENORMALISE: tl.constexpr, REPICK: tl.constexpr, REFILL: tl.constexpr, SHARE: tl.constexpr,
    BY_RANK: tl.constexpr, BY_RATIO: tl.constexpr, BY_MASS: tl.constexpr, BY_DEMAND: tl.constexpr,
    UTILITY: tl.constexpr, HAS_PRIORITY: tl.constexpr, HAS_IDS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Re-route every part; see `route_kernel`."""
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    e = tl.arange(0, BE)
    heard = tl.zeros((BE,), tl.int32)
    demand = tl.zeros((BE,), tl.int64)
    open_rows = tl.zeros((), tl.int32)
    for p in range(parts):
        heard |= tl.load(heard_parts + p * E + e, e < E, other=0)
        if BY_DEMAND:
            demand += tl.load(demand_parts + p * E + e, e < E, other=0)
        open_rows += tl.load(opened + p)
    allowed, woken = keep(heard, demand, settings, BY_DEMAND, BE)
    if not SHARE:
        allowed = woken
    enough = open_rows.to(tl.float32) >= tl.load(settings + MIN_TOKENS)
    begin = part * PART
    used, prefill, decode, mass_prefill, mass_decode, worst_prefill, worst_decode, rows = reroute_rows(
        choice, logits, ids, weights, role, phase, settings, new_ids, new_weights, lost_slots,
        plan + 2 + 2 * E + T * K, allowed, enough, begin, tl.minimum(begin + PART, T), slots_per_token,
        E, K, BT, BE, BK, SCORE, RENORMALISE, REPICK, REFILL, SHARE, BY_RANK, BY_RATIO, BY_MASS,
    )  # fmt: skip
    tl.store(used_parts + part * E + e, used, e < E)
    tl.store(rows_parts + part * E + e, rows, e < E)
    tl.store(tallies + part * 2, prefill)
    tl.store(tallies + part * 2 + 1, decode)
    tl.store(shares + part * 4, mass_prefill)
    tl.store(shares + part * 4 + 1, mass_decode)
    tl.store(shares + part * 4 + 2, worst_prefill.to(tl.float64))
    tl.store(shares + part * 4 + 3, worst_decode.to(tl.float64))

    tl.debug_barrier()  # all of this program's stores come before its ticket
    place = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()  # and all of its loads below after it
    if place == parts - 1:
        finish(
            new_ids, plan, counts, mass_sums, worst_shares, used_parts, rows_parts, tallies, shares, parts, T,
            E, K, BT, BE, BK, PART,
        )  # fmt: skip


@triton.jit
def finish(
    new_ids, plan, counts, mass_sums, worst_shares, used_parts, rows_parts, tallies, shares, parts, T,
    E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Add up the counters and finish the plan, part by part."""
    e = tl.arange(0, BE)
    used = tl.zeros((BE,), tl.int32)
    rows = tl.zeros((BE,), tl.int32)
    prefill = tl.zeros((), tl.int64)
    decode = tl.zeros((), tl.int64)
    mass_prefill = tl.zeros((), tl.float64)
    mass_decode = tl.zeros((), tl.float64)
    worst_prefill = tl.full((), 1.0, tl.float64)
    worst_decode = tl.full((), 1.0, tl.float64)
    for p in range(parts):
        used |= tl.load(used_parts + p * E + e, e < E, other=0)
        rows += tl.load(rows_parts + p * E + e, e < E, other=0)
        prefill += tl.load(tallies + p * 2)
        decode += tl.load(tallies + p * 2 + 1)
        mass_prefill += tl.load(shares + p * 4)
        mass_decode += tl.load(shares + p * 4 + 1)
        worst_prefill = tl.minimum(worst_prefill, tl.load(shares + p * 4 + 2))
        worst_decode = tl.minimum(worst_decode, tl.load(shares + p * 4 + 3))
    add_counts(
        counts, mass_sums, worst_shares, used, prefill, decode, mass_prefill, mass_decode,
        worst_prefill.to(tl.float32), worst_decode.to(tl.float32),
    )  # fmt: skip
    first, total = put_experts(plan, rows, E, BE)
    for p in range(parts):
        put_slots(plan, new_ids, first, total, p * PART, tl.minimum((p + 1) * PART, T), T, E, K, BT, BE, BK)
        first += tl.load(rows_parts + p * E + e, e < E, other=0)
