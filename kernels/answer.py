"""Who answers for lost slots: re-picking, stand-ins, or both in part; shared out and counted in one launch on the GPU.

The readable form is the core's: `lynx.standins.LayerStandIns.answer` shares out, `lynx.counters.Counters.add_answered`
counts, and both run where the kernel does not. It is held to them.

Symbols: T tokens, k slots per token, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lynx.kernels.backends import MAX_TOKENS, recorded, requested, try_at_first_call, why_no_kernels

MAX_TOP_K = 32
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Answered(NamedTuple):
    """What became of a batch whose lost slots are answered for.

    Attributes:
        ids: `(T, k)`, of the dtype of the ids given; the same tensor where something is re-picked.
        weights: `(T, k)`, of the dtype of the weights given.
        answered: `(T, k)` float32: the weight of each lost slot's stand-in, 0 where there is none.
        lost_ids: `(T, k)`, of the dtype of the router's ids: the expert of each lost slot, 0 where none is lost.
    """

    ids: Tensor
    weights: Tensor
    answered: Tensor
    lost_ids: Tensor


def answer(
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
) -> Answered:
    """Share out what each lost slot gave, and count it, in one launch; static shapes, no wait for the device.

    A row is answered for that lost and kept something and whose lost experts are all known; any other keeps the ids and
    weights given, bit for bit. `takes_answer` says where this runs.

    Args:
        own_ids: `(T, k)` the router's own ids, any integer type; those outside `[0, E)` are the host's and never lost.
        own_weights: `(T, k)` their weights.
        ids: `(T, k)` after re-routing.
        weights: `(T, k)` after re-routing.
        lost: `(T, k)` bool: own slots left out, re-picked or not.
        choice: `(T, E)` float32, what the router ranks experts by.
        known: `(E,)` bool: experts that have a stand-in; those beyond its end have none.
        phase: `(T,)` int8, see `lynx.Phase`.
        counted: float64 `(2, 2)`, changed in place: by phase, the sum of the shares of their mass that rows have
            answered by stand-ins, and the largest such share.
        re_picked: How much of a lost slot re-picking answers. At 0 a lost slot repeats the row's best kept expert, ties
            by lowest id, at weight 0.

    Raises:
        ValueError: Shapes are not as above.
    """
    slots, rows = own_ids.shape, own_ids.shape[:1]
    wanted = (slots, slots, slots, slots, (*rows, choice.shape[-1]), rows, (2, 2))
    given = (own_weights, ids, weights, lost, choice, phase, counted)
    if own_ids.ndim != 2 or any(tensor.shape != shape for tensor, shape in zip(given, wanted, strict=True)):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (own_ids, *given))
        raise ValueError(f"answer takes slots (T, k) and scores (T, E), phases (T,), sums (2, 2); got {shapes}.")
    # imported here: it loads triton, which only those need who run it
    from lynx.kernels.fused import launch_answer

    # A dispatcher that only passes on costs more on the host than the launch: it is called where something traces.
    traced = torch.compiler.is_compiling() or type(own_ids) is not Tensor
    share = launch_answer.answer_op if traced else launch_answer.run
    new_ids, new_weights, answered, lost_ids = share(
        own_ids, own_weights, ids, weights, lost, choice, known, phase, counted, re_picked
    )
    return Answered(ids if re_picked else new_ids, new_weights, answered, lost_ids)


def why_not_answer(own_ids: Tensor, own_weights: Tensor, weights: Tensor) -> str:
    """Say in a few words why the kernel does not share out a batch's lost slots here; empty if it does.

    Args:
        own_ids: `(T, k)` the router's own ids.
        own_weights: `(T, k)` their weights.
        weights: `(T, k)` after re-routing.
    """
    if reason := why_no_kernels(own_ids.device):
        return reason
    if own_ids.ndim != 2:
        return "the kernel takes one step at a time"
    if own_ids.shape[0] > MAX_TOKENS:
        return f"the kernels are for at most {MAX_TOKENS} tokens, not {own_ids.shape[0]}"
    if own_ids.shape[1] > MAX_TOP_K:
        return f"the kernel takes up to {MAX_TOP_K} slots per token, the layer has {own_ids.shape[1]}"
    if own_weights.dtype not in _DTYPES or weights.dtype not in _DTYPES:
        return f"the weights are {own_weights.dtype} and {weights.dtype}, not bfloat16, float16 or float32"
    if recorded(own_weights, weights):
        return "gradients are recorded, and the kernel has none (use torch.no_grad)"
    return ""


def takes_answer(own_ids: Tensor, own_weights: Tensor, weights: Tensor, known: Tensor) -> bool:
    """Whether the kernel shares out a batch's lost slots; known without waiting for the device.

    On a GPU, or in Triton's interpreter where ``LYNX_KERNELS=triton`` asks for it. Arguments as of `why_not_answer`;
    `known` `(E,)` as of `answer`.

    Raises:
        ValueError: ``LYNX_KERNELS`` names nothing that exists.
    """
    word, device = requested(), own_ids.device
    if word not in ("auto", "triton") or (word == "auto" and device.type != "cuda") or known.device != device:
        return False
    try_at_first_call(device)
    return not why_not_answer(own_ids, own_weights, weights)
