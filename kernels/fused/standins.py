# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""The kernels of stand-ins: lost slots' hidden states down to the rank, and from there into the layer's output.

Symbols: T tokens, k slots per token, E experts, H hidden size, r rank, S = T * k slots.

Both read no more than the stand-ins of lost slots, each slot by itself: there are few of them, and what several tokens
read of one expert comes from the cache. Every number is summed by one program in one order.
"""

import triton
import triton.language as tl


@triton.jit
def _expert_and_share(ids, weights, slot, E):
    """A slot's expert, and the weight of its stand-in; 0 where there is none to answer."""
    expert = tl.load(ids + slot).to(tl.int64)
    share = tl.load(weights + slot).to(tl.float32)
    return expert, tl.where((expert >= 0) & (expert < E), share, 0.0)


@triton.jit(do_not_specialize=["r"])
def standin_inner_kernel(
    hidden,  # (T, H)
    ids,  # (T, k)
    weights,  # (T, k)
    inner,  # (E, r, H)
    out,  # (S, r) in float32; slots that are not lost are not written
    E,
    H,
    r,
    expert_stride,  # elements from one expert's rows to the next's
    TOP_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Multiply the hidden state of each lost slot by its stand-in's inner rows and by its weight."""
    slot = tl.program_id(0)
    expert, share = _expert_and_share(ids, weights, slot, E)
    if share != 0.0:
        n = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        rows = inner + expert * expert_stride + n * H
        token = hidden + (slot // TOP_K) * H
        total = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
        for first in tl.range(0, H, BLOCK_H):
            h = first + tl.arange(0, BLOCK_H)
            x = tl.load(token + h, mask=h < H, other=0.0).to(tl.float32)
            w = tl.load(rows[:, None] + h[None, :], mask=(n < r)[:, None] & (h < H)[None, :], other=0.0)
            total += x[None, :] * w.to(tl.float32)
        tl.store(out + slot * r + n, tl.sum(total, 1) * share, mask=n < r)


@triton.jit(do_not_specialize=["r"])
def standin_outer_kernel(
    output,  # (T, H)
    ids,  # (T, k)
    weights,  # (T, k)
    inner,  # (S, r) in float32, weighted
    outer,  # (E, r, H)
    bias,  # (E, H)
    out,  # (T, H), of the dtype of `output`
    E,
    H,
    r,
    expert_stride,  # elements from one expert's rows to the next's
    TOP_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Add to each token's output what the stand-ins of its lost slots give; a token without any keeps its bits."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    result = tl.load(output + token * H + column, mask=column < H, other=0.0)
    shifts = tl.zeros((BLOCK_H,), tl.float32)
    lost = 0
    # Unrolled, and without a branch: the loads wait for memory together. A slot that is not lost has no columns.
    for j in tl.static_range(TOP_K):
        expert, share = _expert_and_share(ids, weights, token * TOP_K + j, E)
        here = column < tl.where(share != 0.0, H, 0)
        shifts += share * tl.load(bias + expert * H + column, mask=here, other=0.0).to(tl.float32)
        lost |= (share != 0.0).to(tl.int32)
    total = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    for first in tl.range(0, r, BLOCK_R):
        n = first + tl.arange(0, BLOCK_R)
        for j in tl.static_range(TOP_K):
            slot = token * TOP_K + j
            expert, share = _expert_and_share(ids, weights, slot, E)
            there = n < tl.where(share != 0.0, r, 0)
            z = tl.load(inner + slot * r + n, mask=there, other=0.0)
            rows = outer + expert * expert_stride + n * H
            w = tl.load(rows[:, None] + column[None, :], mask=there[:, None] & (column < H)[None, :], other=0.0)
            total += z[:, None] * w.to(tl.float32)
    if lost != 0:
        result = (result.to(tl.float32) + (shifts + tl.sum(total, 0))).to(out.dtype.element_ty)
    tl.store(out + token * H + column, result, mask=column < H)
