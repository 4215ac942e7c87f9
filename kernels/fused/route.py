"""The route kernel: one MoE layer's selection for one batch, from scores to an execution plan, in one launch.

One program walks the batch in tiles of rows, twice: first to hear what every token wants, then, once the batch's kept
experts are known, to re-route each token. A third, short walk puts the slots in order for the plan. (Where ids are not
given, one more walk finds them.) What is compared is compared in the same arithmetic as in `lynx.routing` and
`lynx.keep`, integers or single IEEE operations, so that the same experts come out; only combine weights may differ, by
float32 rounding. Sums are of integers or in the order of slots: tiles and threads change no bit.

Tiles: `t` rows of BT, `j` slots of BK, `e` experts of BE (powers of two; what is beyond T, k or E is masked).
"""

import triton
import triton.language as tl

from lynx.kernels.fused.batch import OWN, hear_rows, hear_tile, keep
from lynx.kernels.fused.ledger import add_counts, put_experts, put_slots, put_tile
from lynx.kernels.fused.reroute import reroute_rows, reroute_tile, rows_within
from lynx.kernels.fused.rows import MIN_TOKENS, either
from lynx.kernels.fused.weigh import own_top_k


@triton.jit(do_not_specialize=["T", "slots_per_token"])
def route_kernel(
    choice, logits, ids, weights, role, phase, priority, settings,
    new_ids, new_weights, lost_slots, plan, counts, mass_sums, worst_shares, T, slots_per_token,
    E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
    SCORE: tl.constexpr, RENORMALISE: tl.constexpr, REPICK: tl.constexpr, REFILL: tl.constexpr, SHARE: tl.constexpr,
    BY_RANK: tl.constexpr, BY_RATIO: tl.constexpr, BY_MASS: tl.constexpr, BY_DEMAND: tl.constexpr,
    UTILITY: tl.constexpr, HAS_PRIORITY: tl.constexpr, HAS_IDS: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Select and re-route one batch of T rows; one program.

    `slots_per_token` is K again, as a number that the compiler does not know: unrolled loops take too many registers.
    With ONE_TILE, BT rows hold the batch: what was read of them stays in registers.
    """
    if not HAS_IDS:
        own_top_k(choice, logits, ids, weights, settings, 0, T, slots_per_token, E, K, BT, BE, BK, SCORE, RENORMALISE)
        tl.debug_barrier()
    least = tl.load(settings + MIN_TOKENS)
    if ONE_TILE:
        scores, padding, is_open, unsound, is_decode, expert, routed, mass, rank, want, said, cast = hear_tile(
            0, choice, logits, ids, weights, role, phase, priority, settings, T, slots_per_token,
            E, K, BT, BE, BK, BY_RANK, BY_RATIO, BY_MASS, BY_DEMAND, UTILITY, HAS_PRIORITY,
        )  # fmt: skip
        allowed, woken = keep(tl.reduce(said, 0, either), tl.sum(cast, 0), settings, BY_DEMAND, BE)
        if not SHARE:
            allowed = woken
        enough = tl.sum(is_open.to(tl.int32), 0).to(tl.float32) >= least
        use, prefill, decode, mass_prefill, mass_decode, worst_prefill, worst_decode, runs, on, members = reroute_tile(
            0, scores, padding, is_open, unsound, is_decode, expert, routed, mass, rank, want, (said & OWN) > 0,
            logits, ids, weights, settings, new_ids, new_weights, lost_slots, allowed, enough, T, slots_per_token,
            E, K, BT, BE, BK, SCORE, RENORMALISE, REPICK, REFILL, SHARE,
        )  # fmt: skip
        within = rows_within(runs, on, members, tl.zeros((BE,), tl.int32), BT, BE, BK)
        used = tl.reduce(use, 0, either)
        first, total = put_experts(plan, tl.sum(members, 0), E, BE)
        at = tl.arange(0, BT)[:, None] * K + tl.arange(0, BK)[None, :]
        inside = (tl.arange(0, BT) < T)[:, None] & (tl.arange(0, BK) < K)[None, :]
        slots = plan + 2 + 2 * E
        put_tile(slots, slots + T * K, at, inside, within, runs, on, first, total, BT, BK)
    else:
        heard, demand, open_rows = hear_rows(
            choice, logits, ids, weights, role, phase, priority, settings, 0, T, slots_per_token,
            E, K, BT, BE, BK, BY_RANK, BY_RATIO, BY_MASS, BY_DEMAND, UTILITY, HAS_PRIORITY,
        )  # fmt: skip
        allowed, woken = keep(heard, demand, settings, BY_DEMAND, BE)
        if not SHARE:
            allowed = woken
        used, prefill, decode, mass_prefill, mass_decode, worst_prefill, worst_decode, rows = reroute_rows(
            choice, logits, ids, weights, role, phase, settings, new_ids, new_weights, lost_slots,
            plan + 2 + 2 * E + T * K, allowed, open_rows.to(tl.float32) >= least, 0, T, slots_per_token,
            E, K, BT, BE, BK, SCORE, RENORMALISE, REPICK, REFILL, SHARE, BY_RANK, BY_RATIO, BY_MASS,
        )  # fmt: skip
        first, total = put_experts(plan, rows, E, BE)
        tl.debug_barrier()  # ids and places are read back
        put_slots(plan, new_ids, first, total, 0, T, T, E, K, BT, BE, BK)
    add_counts(
        counts, mass_sums, worst_shares, used, prefill, decode, mass_prefill, mass_decode, worst_prefill, worst_decode
    )
