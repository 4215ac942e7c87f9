"""What the rows of a step may do, from SGLang's own description of it. Not run on an engine yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lynx.routing import Phase, Role

PHASES = {
    "DECODE": Phase.DECODE,
    "EXTEND": Phase.PREFILL,
    "MIXED": Phase.PREFILL,  # nothing on the device tells which of its rows decode
    "SPLIT_PREFILL": Phase.PREFILL,
}
"""By the name of SGLang's forward mode. Verification, drafts and diffusion are not here: their steps stay exact."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one step.

    Attributes:
        role: ``(T,)`` int8: PADDING or OPEN; the core turns rows EXACT by their phase.
        phase: ``(T,)`` int8.
    """

    role: Tensor
    phase: Tensor


def current_batch() -> Any:
    """Return SGLang's ``ForwardBatch`` of the step under way, or None.

    The context of a step holds one method of it, which knows the batch; with two overlapping batches, the one whose
    turn it is.
    """
    from sglang.srt.model_executor.forward_context import get_forward_context, has_forward_context

    if not has_forward_context():
        return None
    return getattr(getattr(get_forward_context(), "moe_num_token_non_padded", None), "__self__", None)


def read_rows(batch: Any, tokens: int, device: torch.device, non_padded: Tensor | None = None) -> Rows | str:
    """Work out roles and phases of a step; no wait for the device.

    Rows behind ``non_padded`` are padding. SGLang counts them under expert parallelism only; without the count a graph
    is filled up to its size all the same, and such rows write to the cache's slot 0, which no request ever has.

    Args:
        batch: SGLang's ``ForwardBatch``.
        tokens: ``T``, padding included.
        device: Where the rows are.
        non_padded: How many rows are none, as a tensor, or None.

    Returns:
        The rows; or in a few words why they cannot be told, in which case the step must be left alone.
    """
    mode = getattr(batch.forward_mode, "name", str(batch.forward_mode))
    phase = PHASES.get(mode)
    if phase is None:
        return f"steps in the mode {mode}"
    padding = torch.zeros(tokens, dtype=torch.bool, device=device)
    if non_padded is not None:
        padding = torch.arange(tokens, device=device) >= non_padded
    slots = getattr(batch, "out_cache_loc", None)
    if slots is not None:
        if len(slots) != tokens:
            return "steps whose MoE layers see other rows than those of their requests"
        padding = padding | (slots == 0)
    role = torch.where(padding, int(Role.PADDING), int(Role.OPEN)).to(torch.int8)
    return Rows(role, torch.full((tokens,), int(phase), dtype=torch.int8, device=device))
