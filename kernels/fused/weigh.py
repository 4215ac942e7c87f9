"""Scores and combine weights in the route kernel, by the weight rules of `lynx.rerouting`."""

import triton
import triton.language as tl

from lynx.kernels.fused.rows import INF, SCALE, sum_parts, sum_slots


@triton.jit
def log1p(x):
    """`log(1 + x)` for x >= 0, accurate where x is small (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * tl.div_rn(x, tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def log_score(x, most, log_sum, SCORE: tl.constexpr, RENORMALISE: tl.constexpr):
    """Logarithm of the router's score of logits `x`, as `lynx.rerouting` words it."""
    if SCORE == "sigmoid":
        return tl.minimum(x, 0.0) - log1p(tl.exp(-tl.abs(x)))
    elif SCORE == "sqrt_softplus":
        soft = tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))
        return 0.5 * tl.where(x < -20.0, x, tl.log(tl.where(x < -20.0, 1.0, soft)))
    elif SCORE == "softmax" and not RENORMALISE:
        return (x - most[:, None]) - log_sum[:, None]  # in this order nothing is lost to large logits
    else:
        return x


@triton.jit
def softmax_total(logits, t, end, E: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr):
    """Each row's largest logit `(BT,)`, and the logarithm of the sum of the exponentials below it `(BT,)`."""
    e = tl.arange(0, BE)
    row = tl.load(logits + t[:, None] * E + e[None, :], (t < end)[:, None] & (e < E)[None, :], other=-INF)
    most = tl.max(row, 1)
    most = tl.where(tl.abs(most) < INF, most, 0.0)
    return most, tl.log(sum_parts(tl.exp(row - most[:, None])))


@triton.jit
def softmax(scores):
    """Softmax of each row; -inf gets 0."""
    powers = tl.exp(scores - tl.max(scores, 1)[:, None])
    return tl.div_rn(powers, tl.broadcast_to(sum_parts(powers)[:, None], powers.shape))


@triton.jit
def own_top_k(
    choice, logits, ids, weights, settings, begin, end, slots_per_token,
    E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
    SCORE: tl.constexpr, RENORMALISE: tl.constexpr,
):  # fmt: skip
    """Write rows `begin` to `end` their own top-k by choice, ties by lowest id, and its weights by the model's rule."""
    e = tl.arange(0, BE)
    j = tl.arange(0, BK)
    for start in range(begin, end, BT):
        t = start + tl.arange(0, BT)
        here = (t < end)[:, None] & (e < E)[None, :]
        # what is forbidden to every row still ranks before what is no expert: ids stay in range
        left = tl.load(choice + t[:, None] * E + e[None, :], here, other=-INF)
        left = tl.where(left == left, left, INF)  # NaN ranks first, as when torch sorts; the row will be left as it is
        taken = tl.where(here, 0, 1)
        chosen = tl.zeros((BT, BK), tl.int32)
        for n in range(slots_per_token):
            best = tl.max(tl.where(taken == 0, left, -INF), 1)
            first = tl.min(tl.where((taken == 0) & (left == best[:, None]), e[None, :], BE), 1)
            first = tl.where(first == BE, 0, first)  # a row outside
            chosen = tl.where(j[None, :] == n, first[:, None], chosen)
            taken = tl.where(e[None, :] == first[:, None], 1, taken)
        slots = (t < end)[:, None] & (j < K)[None, :]
        most = tl.zeros((BT,), tl.float32)
        log_sum = most
        if SCORE == "softmax" and not RENORMALISE:
            most, log_sum = softmax_total(logits, t, end, E, BT, BE)
        mine = tl.load(logits + t[:, None] * E + chosen, slots, other=-INF)
        scores = log_score(mine, most, log_sum, SCORE, RENORMALISE)
        values = softmax(tl.where(slots, scores, -INF)) if RENORMALISE else tl.exp(scores)
        at = t[:, None] * K + j[None, :]
        tl.store(ids + at, chosen.to(ids.dtype.element_ty), slots)
        tl.store(weights + at, (values * tl.load(settings + SCALE)).to(weights.dtype.element_ty), slots)


@triton.jit
def combine_weights(
    own, new, routed, lost, filled, logits, settings, t, end, slots_per_token,
    E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
    SCORE: tl.constexpr, RENORMALISE: tl.constexpr, REPICK: tl.constexpr,
):  # fmt: skip
    """Weigh the chosen experts by the model's own rule, float32 `(BT, BK)`; see `lynx.rerouting`."""
    chosen = routed & ((lost == 0) | filled)
    scale = tl.load(settings + SCALE)
    if not REPICK:
        values = tl.where(chosen, own, 0.0)
        if RENORMALISE:
            total = sum_slots(values, tl.arange(0, BK), slots_per_token)
            values = tl.div_rn(values, tl.broadcast_to(total[:, None], (BT, BK))) * scale
    else:
        most = tl.zeros((BT,), tl.float32)
        log_sum = most
        if SCORE == "softmax" and not RENORMALISE:
            most, log_sum = softmax_total(logits, t, end, E, BT, BE)
        there = tl.load(logits + t[:, None] * E + tl.where(routed, new, 0), (t < end)[:, None] & routed, other=0.0)
        values = log_score(there, most, log_sum, SCORE, RENORMALISE)
        if RENORMALISE:
            values = softmax(tl.where(chosen, values, -INF)) * scale
        else:
            values = tl.where(lost, tl.exp(values) * scale, own)
    return tl.where(chosen, values, tl.where(routed, 0.0, own))
