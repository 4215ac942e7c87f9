"""What the rows of a step may do, from vLLM's own description of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lynx.routing import Phase, Role


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one step.

    Attributes:
        role: ``(T,)`` int8: PADDING, EXACT where a request asked for it, else OPEN; the core turns more rows EXACT.
        phase: ``(T,)`` int8.
    """

    role: Tensor
    phase: Tensor


def read_rows(
    metadata: Any, tokens: int, device: torch.device, max_decode_q: int = 1, exact: Tensor | None = None
) -> Rows | str:
    """Work out roles and phases of a step; no wait for the device.

    A request is in decode if it has no more than ``max_decode_q`` tokens here and some in the cache. So is the last
    part of a prompt that was split, if it is that short: nothing tells the two apart. Rows behind the last request are
    padding.

    Args:
        metadata: ``attn_metadata`` of vLLM's forward context: by layer, or a list of such (micro-batches).
        tokens: ``T``, padding included.
        device: Where the rows are.
        max_decode_q: Longest query that counts as decode.
        exact: Bool, one for each request: those that asked for exact routing.

    Returns:
        The rows; or in a few words why they cannot be told, in which case the step must be left alone.
    """
    if metadata is None:
        return "a step without requests"
    if isinstance(metadata, list):
        return "micro-batches (DBO)"
    per_layer = metadata.values() if isinstance(metadata, dict) else [metadata]
    # chunked local attention cuts its requests up: the one with the fewest has them whole
    known = min((m for m in per_layer if _tensors(m)), key=lambda m: len(m.seq_lens), default=None)
    if known is None:
        kinds = ", ".join(sorted({type(m).__name__ for m in per_layer})) or "nothing"
        return f"attention metadata without query_start_loc and seq_lens ({kinds})"
    starts, lengths = known.query_start_loc.to(device), known.seq_lens.to(device)
    row = torch.arange(tokens, device=device, dtype=starts.dtype)
    query = starts.diff()
    decoding = (query <= max_decode_q) & (lengths[: len(query)] > query)
    request = torch.searchsorted(starts[1:].contiguous(), row, right=True).clamp_max(len(query) - 1)
    role = torch.full((tokens,), int(Role.OPEN), dtype=torch.int8, device=device)
    if exact is not None:
        role = role.masked_fill(exact[request], int(Role.EXACT))
    role = role.masked_fill(row >= starts[-1], int(Role.PADDING))
    phase = torch.where(decoding[request], int(Phase.DECODE), int(Phase.PREFILL)).to(torch.int8)
    return Rows(role, phase)


def _tensors(metadata: Any) -> bool:
    both = (getattr(metadata, "query_start_loc", None), getattr(metadata, "seq_lens", None))
    return all(isinstance(each, Tensor) and each.ndim == 1 and len(each) for each in both)
