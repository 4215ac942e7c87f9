"""Launches of the experts' kernels: buffers, settings and grids.

Each function takes its settings from `lynx.kernels.tune` unless it is given others. Symbols as in `fused.experts`.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from lynx.kernels import tune
from lynx.kernels.backends import interpreted
from lynx.kernels.fused.experts import combine_kernel, down_kernel, gate_up_kernel
from lynx.kernels.fused.plan import plan_kernel
from lynx.kernels.gates import GATES, Gate
from lynx.kernels.plan import Plan

# What one program can sort in registers without spilling.
PLAN_MAX_SLOTS = 256 * 16
PLAN_MAX_EXPERTS = 512


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make every output and scratch buffer of this file; tests put one in its place that poisons them."""
    return torch.empty(*shape, dtype=dtype, device=device)


def plan(ids: Tensor, weights: Tensor, num_experts: int, settings: tune.Settings | None = None) -> Tensor:
    """Make the buffer of a `Plan` in one launch.

    Args:
        ids: `(T, k)`, any integer type.
        weights: `(T, k)`.
        num_experts: E, at most 512; T * k at most 4096.
        settings: `tile`, the slots times experts looked at together, and `num_warps`.
    """
    device, (T, k) = ids.device, ids.shape
    chosen = settings or tune.settings("plan", T, tune.generation_of(device))
    buffer = empty(Plan.size(num_experts, T * k), dtype=torch.int32, device=device)
    with on(device):
        plan_kernel[(1,)](
            ids.contiguous(),
            weights.contiguous(),
            buffer,
            T * k,
            num_experts,
            **plan_constants(chosen, num_experts),
            **options(chosen),
        )
    return buffer


def gate_up(
    hidden: Tensor,
    plan: Tensor,
    top_k: int,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    gate: str | None,
    settings: tune.Settings | None = None,
) -> Tensor:
    """Project the rows of every run slot up, and apply the gate if one is named.

    Args:
        hidden: `(T, H)`, of the weights' dtype.
        plan: The buffer of the plan.
        top_k: k.
        weight: `(E, C, H)`, or `(E, H, C)` if transposed.
        bias: `(E, C)`, or None.
        transposed: Which of the two.
        gate: A name in `GATES`, or None to give all C columns as they are.
        settings: `block_m`, `block_n`, `block_k`, `num_warps`, `num_stages`, `programs_per_processor`.

    Returns:
        Rows in the plan's order `(S, C)`, or `(S, C / 2)` after a gate; rows from R on are uninitialised.
    """
    (T, H), E = hidden.shape, weight.shape[0]
    N = up_columns(weight, transposed, gate)
    chosen = settings or _projection("gate_up", T, weight)
    out = empty(T * top_k, N, dtype=weight.dtype, device=hidden.device)
    with on(hidden.device):
        gate_up_kernel[_grid(chosen, T * top_k, E, N, hidden.device)](
            hidden.contiguous(),
            plan,
            weight,
            None if bias is None else bias.contiguous(),
            out,
            top_k,
            E,
            H,
            N,
            weight.stride(0),
            **gate_constants(gate),
            **product_constants(chosen, H, N, transposed, bias is not None),
            UPCAST=interpreted(),
            **options(chosen),
        )
    return out


def up_columns(weight: Tensor, transposed: bool, gate: str | None) -> int:
    """How many columns `gate_up` gives."""
    C = weight.shape[2 if transposed else 1]
    return C // 2 if gate is not None and GATES[gate].gated else C


def down(
    inner: Tensor,
    plan: Tensor,
    combine: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    settings: tune.Settings | None = None,
) -> Tensor:
    """Project inner rows down and weight them.

    Args:
        inner: `(S, I)` in the plan's order, of the weights' dtype.
        plan: The buffer of the plan.
        combine: Combine weights `(T, k)`.
        weight: `(E, H, I)`, or `(E, I, H)` if transposed.
        bias: `(E, H)`, or None.
        transposed: Which of the two.
        settings: As of `gate_up`.

    Returns:
        Weighted rows in the plan's order `(S, H)` in float32; rows from R on are uninitialised.
    """
    (S, I), E = inner.shape, weight.shape[0]  # noqa: E741
    H = weight.shape[2 if transposed else 1]
    chosen = settings or _projection("down", combine.shape[0], weight)
    out = empty(S, H, dtype=torch.float32, device=inner.device)
    with on(inner.device):
        down_kernel[_grid(chosen, S, E, H, inner.device)](
            inner.contiguous(),
            plan,
            weight,
            None if bias is None else bias.contiguous(),
            combine.contiguous(),
            out,
            E,
            H,
            I,
            weight.stride(0),
            **product_constants(chosen, I, H, transposed, bias is not None),
            UPCAST=interpreted(),
            **options(chosen),
        )
    return out


def combine(
    rows: Tensor, plan: Tensor, num_experts: int, top_k: int, dtype: torch.dtype, settings: tune.Settings | None = None
) -> Tensor:
    """Sum the weighted rows of each token in slot order.

    Args:
        rows: `(S, H)` in float32, in the plan's order.
        plan: The buffer of the plan.
        num_experts: E.
        top_k: k.
        dtype: The dtype of the result.
        settings: `block_h`, `num_warps`.

    Returns:
        `(T, H)`.
    """
    (S, H), device = rows.shape, rows.device
    chosen = settings or tune.settings("combine", S // top_k, tune.generation_of(device))
    out = empty(S // top_k, H, dtype=dtype, device=device)
    block = min(chosen["block_h"], triton.next_power_of_2(H))
    with on(device):
        combine_kernel[(S // top_k, triton.cdiv(H, block))](
            rows, plan, out, num_experts, S, H, TOP_K=top_k, BLOCK_H=block, **options(chosen)
        )
    return out


def projection_settings(kernel: str, tokens: int, dtype: torch.dtype, generation: str) -> tune.Settings:
    """The settings of `gate_up` or `down` for a number of tokens, and weights of that dtype."""
    return tune.settings(kernel + "_float32" if dtype == torch.float32 else kernel, tokens, generation)


def gate_constants(gate: str | None) -> dict[str, Any]:
    """What `gate_up_kernel` is compiled for, as to the gate."""
    form = Gate("silu", gated=False) if gate is None else GATES[gate]
    return {
        "FORM": "none" if gate is None else form.form,
        "SCALE": form.scale,
        "LIMIT": form.limit if form.limit < math.inf else None,
        "SHIFT": form.shift,
        "GATED": form.gated,
        "INTERLEAVED": form.interleaved,
    }


def product_constants(chosen: tune.Settings, K: int, N: int, transposed: bool, bias: bool) -> dict[str, Any]:
    """What both projections are compiled for, with K elements to sum and N columns in the result."""
    return {
        "TRANSPOSED": transposed,
        "HAS_BIAS": bias,
        "EVEN_K": K % chosen["block_k"] == 0,
        "EVEN_N": N % chosen["block_n"] == 0,
        "BLOCK_M": chosen["block_m"],
        "BLOCK_N": chosen["block_n"],
        "BLOCK_K": chosen["block_k"],
    }


def plan_constants(chosen: tune.Settings, num_experts: int) -> dict[str, int]:
    """What `plan_kernel` is compiled for."""
    power = triton.next_power_of_2(num_experts)
    return {"E_POWER": power, "BLOCK_S": max(1, chosen["tile"] // power)}


def options(chosen: tune.Settings) -> dict[str, int]:
    """The compiler's own options among the settings."""
    return {name: chosen[name] for name in ("num_warps", "num_stages") if name in chosen}


def _projection(kernel: str, tokens: int, weight: Tensor) -> tune.Settings:
    return projection_settings(kernel, tokens, weight.dtype, tune.generation_of(weight.device))


def _grid(chosen: tune.Settings, S: int, E: int, N: int, device: torch.device) -> tuple[int]:
    """As many programs as run at once, unless there can never be work for so many."""
    work = min(S, E) * triton.cdiv(N, chosen["block_n"])
    return (min(work, chosen["programs_per_processor"] * tune.num_processors(device)),)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the one where the tensors are."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
