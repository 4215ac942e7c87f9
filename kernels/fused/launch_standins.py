"""Launches of the stand-ins' kernels, and both as a custom op: opaque to torch.compile, safe in a captured graph."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lynx.kernels import tune
from lynx.kernels.fused import launch
from lynx.kernels.fused.standins import standin_inner_kernel, standin_outer_kernel

MAX_BLOCK_R = 32


def inner(
    hidden: Tensor, ids: Tensor, weights: Tensor, weight: Tensor, settings: tune.Settings | None = None
) -> Tensor:
    """Project the hidden state of every lost slot down to the rank, and weight it.

    Args:
        hidden: `(T, H)`.
        ids: `(T, k)`, any integer type.
        weights: `(T, k)`; 0 for slots that are not lost.
        weight: The stand-ins' inner rows `(E, r, H)`.
        settings: `tile`, the elements of a stand-in looked at together, and `num_warps`.

    Returns:
        `(T * k, r)` in float32; rows of slots that are not lost are uninitialised.
    """
    (T, k), (E, r, H), device = ids.shape, weight.shape, hidden.device
    chosen = settings or tune.settings("standin_inner", T, tune.generation_of(device))
    out = launch.empty(T * k, r, dtype=torch.float32, device=device)
    if out.numel() == 0:
        return out
    rows = _in_rows(weight)
    compiled_for = constants(chosen, k, r, H)
    with launch.on(device):
        standin_inner_kernel[(T * k, triton.cdiv(r, compiled_for["BLOCK_R"]))](
            hidden.contiguous(),
            ids.contiguous(),
            weights.contiguous(),
            rows,
            out,
            E,
            H,
            r,
            rows.stride(0),
            **compiled_for,
            **launch.options(chosen),
        )
    return out


def outer(
    output: Tensor,
    ids: Tensor,
    weights: Tensor,
    inner: Tensor,
    weight: Tensor,
    bias: Tensor,
    settings: tune.Settings | None = None,
) -> Tensor:
    """Add to a layer's output what the stand-ins of lost slots give.

    Args:
        output: `(T, H)`.
        ids: `(T, k)`, any integer type.
        weights: `(T, k)`; 0 for slots that are not lost.
        inner: What `inner` gave, `(T * k, r)` in float32.
        weight: The stand-ins' outer rows `(E, r, H)`.
        bias: `(E, H)`.
        settings: As of `inner`.

    Returns:
        `(T, H)`, a new tensor with the dtype of `output`.
    """
    (T, k), (E, r, H), device = ids.shape, weight.shape, output.device
    chosen = settings or tune.settings("standin_outer", T, tune.generation_of(device))
    out = launch.empty(T, H, dtype=output.dtype, device=device)
    if out.numel() == 0:
        return out
    rows = _in_rows(weight)
    compiled_for = constants(chosen, k, r, H)
    with launch.on(device):
        standin_outer_kernel[(T, triton.cdiv(H, compiled_for["BLOCK_H"]))](
            output.contiguous(),
            ids.contiguous(),
            weights.contiguous(),
            inner,
            rows,
            bias.contiguous(),
            out,
            E,
            H,
            r,
            rows.stride(0),
            **compiled_for,
            **launch.options(chosen),
        )
    return out


def run(
    output: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor, inner_rows: Tensor, outer_rows: Tensor, bias: Tensor
) -> Tensor:
    """Both launches, one behind the other; arguments and result as of `add_standins`."""
    projected = inner(hidden, ids, weights, inner_rows)
    return outer(output, ids, weights, projected, outer_rows, bias)


@torch.library.custom_op("lynx::standins", mutates_args=())
def standins_op(
    output: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor, inner_rows: Tensor, outer_rows: Tensor, bias: Tensor
) -> Tensor:
    """Answer for lost slots, as `run`."""
    return run(output, hidden, ids, weights, inner_rows, outer_rows, bias)


@standins_op.register_fake
def _(
    output: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor, inner_rows: Tensor, outer_rows: Tensor, bias: Tensor
) -> Tensor:
    return output.new_empty(output.shape)


def constants(chosen: tune.Settings, top_k: int, rank: int, hidden_size: int) -> dict[str, int]:
    """What both kernels are compiled for."""
    block_r = min(MAX_BLOCK_R, triton.next_power_of_2(max(rank, 1)))
    block_h = max(16, min(chosen["tile"] // block_r, triton.next_power_of_2(hidden_size)))
    return {"TOP_K": top_k, "BLOCK_R": block_r, "BLOCK_H": block_h}


def _in_rows(weight: Tensor) -> Tensor:
    """The rows `(E, r, H)` so that each expert's lie in one piece; a part of the ranks of a larger tensor stays it."""
    return weight if weight.stride()[1:] == (weight.shape[2], 1) else weight.contiguous()
