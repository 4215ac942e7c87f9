"""What Lynx's layer is timed against, all on the same weights, ids and combine weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from layers import Layer
from torch import Tensor

Run = Callable[[Layer, Tensor, Tensor, Tensor], Tensor]  # layer, hidden (T, H), ids (T, k), weights (T, k) -> (T, H)


def grouped_mm(layer: Layer, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Run torch's grouped_mm as transformers calls it."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    done: Tensor = grouped_mm_experts_forward(layer.module, hidden, ids, weights)
    return done


def batched_mm(layer: Layer, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Run transformers' batched_mm, which gathers an expert's weights for every slot."""
    from transformers.integrations.moe import batched_mm_experts_forward

    done: Tensor = batched_mm_experts_forward(layer.module, hidden, ids, weights)
    return done


def vllm_fused(layer: Layer, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Run vLLM's Triton kernels."""
    from vllm.model_executor.layers.fused_moe import fused_experts

    own = layer.weights
    done: Tensor = fused_experts(hidden, own.gate_up, own.down, weights.float(), ids.int())
    return done


PEERS: dict[str, Run] = {"grouped_mm": grouped_mm, "batched_mm": batched_mm, "vllm_fused": vllm_fused}


def refused(name: str, layer: Layer, slots: int) -> str:
    """Say why a peer does not run here; empty if it does.

    Ask once for all that is compared, after `machine.free_memory`: what fits depends on the memory that is free.

    Args:
        name: Its name in `PEERS`.
        layer: What it would run.
        slots: `S = T * k`.
    """
    device = layer.weights.down.device
    if name == "batched_mm":
        # of both projections: those of the first are still there when those of the second are gathered
        gathered = slots * (layer.weights.gate_up[0].nbytes + layer.weights.down[0].nbytes)
        room = _room(device)
        if gathered > room:
            return f"it would gather too many weights ({gathered / 1e9:.1f} GB, room for {room / 1e9:.1f} GB)"
    if name == "vllm_fused":
        if importlib.util.find_spec("vllm") is None:
            return "not available here: vllm is not installed"
        if device.type != "cuda":
            return "not available here: vllm's kernels need a GPU"
        if layer.weights.transposed or layer.weights.gate != "swiglu":
            return "vllm's call for unquantised experts takes no such layout or gate"
    return ""


def differs(result: Tensor, expected: Tensor) -> str:
    """Say by how much two outputs `(T, H)` differ, if it is more than rounding; empty if it is not."""
    exact = expected.double()
    error = ((result.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()
    allowed = 1e-3 if result.dtype == torch.float32 else 2e-2
    # not `error > allowed`: NaN must not pass
    return "" if error <= allowed else f"its output differs by {error:.1e} of the norm"


def attempt(work: Callable[[], Any]) -> tuple[Any, str]:
    """Do something that may not be possible here; its result, or why there is none."""
    try:
        return work(), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:200]


def _room(device: torch.device) -> int:
    """What a contender may gather: a third of a GPU's free memory, half a gigabyte elsewhere, where it takes long."""
    return torch.cuda.mem_get_info(device)[0] // 3 if device.type == "cuda" else 5 * 10**8
