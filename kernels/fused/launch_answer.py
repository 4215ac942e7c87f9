"""The launch that shares out lost slots, also as a custom op: opaque to torch.compile, safe in a captured graph."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lynx.kernels.fused import launch
from lynx.kernels.fused.answer import answer_kernel

TILE = 2048  # slots that are looked at together, at the most


def run(
    own_ids: Tensor,
    own_weights: Tensor,
    ids: Tensor,
    weights: Tensor,
    lost: Tensor,
    choice: Tensor,
    known: Tensor,
    phase: Tensor,
    counted: Tensor,
    re_picked: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Say who answers for each slot, and count it; arguments as of `lynx.kernels.answer.answer`.

    Returns:
        New ids, `(0, k)` where they stay as they are; new weights; what stand-ins answer; ids of lost slots.
    """
    (T, k), E, device = own_ids.shape, choice.shape[1], own_ids.device
    new_ids = launch.empty(0 if re_picked else T, k, dtype=ids.dtype, device=device)
    new_weights = launch.empty(T, k, dtype=weights.dtype, device=device)
    answered = launch.empty(T, k, dtype=torch.float32, device=device)
    lost_ids = launch.empty(T, k, dtype=own_ids.dtype, device=device)
    if own_ids.numel():
        with launch.on(device):
            answer_kernel[(1,)](
                own_ids.contiguous(),
                own_weights.contiguous(),
                ids.contiguous(),
                weights.contiguous(),
                lost.contiguous(),
                choice.contiguous(),
                known.contiguous(),
                phase.contiguous(),
                new_ids,
                new_weights,
                answered,
                lost_ids,
                counted,
                T,
                E,
                known.shape[0],
                **constants(re_picked, T, k),
                **options(T, k),
            )
    return new_ids, new_weights, answered, lost_ids


@torch.library.custom_op("lynx::answer", mutates_args=("counted",))
def answer_op(
    own_ids: Tensor,
    own_weights: Tensor,
    ids: Tensor,
    weights: Tensor,
    lost: Tensor,
    choice: Tensor,
    known: Tensor,
    phase: Tensor,
    counted: Tensor,
    re_picked: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Say who answers for each slot, as `run`."""
    return run(own_ids, own_weights, ids, weights, lost, choice, known, phase, counted, re_picked)


@answer_op.register_fake
def _(
    own_ids: Tensor,
    own_weights: Tensor,
    ids: Tensor,
    weights: Tensor,
    lost: Tensor,
    choice: Tensor,
    known: Tensor,
    phase: Tensor,
    counted: Tensor,
    re_picked: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = own_ids.shape
    new_ids = ids.new_empty((0, shape[1]) if re_picked else shape)
    answered = weights.new_empty(shape, dtype=torch.float32)
    return new_ids, weights.new_empty(shape), answered, own_ids.new_empty(shape)


def constants(re_picked: float, tokens: int, top_k: int) -> dict[str, float]:
    """What the kernel is compiled for."""
    BT, BK = _tile(tokens, top_k)
    return {"RE_PICKED": re_picked, "STOOD_IN": 1 - re_picked, "K": top_k, "BT": BT, "BK": BK}


def options(tokens: int, top_k: int) -> dict[str, int | bool]:
    """The compiler's own options: a warp for every 256 slots, as one alone needs no shared memory.

    Without fused products and sums: each is rounded, as in torch.
    """
    BT, BK = _tile(tokens, top_k)
    return {"num_warps": max(1, BT * BK // 256), "num_stages": 1, "enable_fp_fusion": False}


def _tile(tokens: int, top_k: int) -> tuple[int, int]:
    BK = max(2, triton.next_power_of_2(top_k))
    return max(4, min(TILE // BK, triton.next_power_of_2(max(tokens, 1)))), BK
