"""The context of one forward: which rows are tokens, and what phase they are in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lynx.routing import Phase, Role

# What a backbone may call its cache: the first since transformers 5.24, which takes the second from callers all the
# same; the third in Mamba's relatives before that.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


@dataclass(slots=True)
class Step:
    """One forward pass of the backbone over ``(B, q)`` tokens.

    Attributes:
        role: ``(B * q,)`` int8, PADDING or OPEN; the core turns rows EXACT.
        phase: ``(B * q,)`` int8.
        columns: ``q`` if every column is a decode batch of its own (teacher forcing), else 0.
        all_prefill: True where the host knows that no row is in decode.
        sequences: ``B``; 0 where sequences are laid end to end.
        priority: ``(B * q,)`` float32 vote weights, or None for all 1.
    """

    role: Tensor
    phase: Tensor
    columns: int
    all_prefill: bool
    sequences: int = 0
    priority: Tensor | None = None


def read_step(
    arguments: dict[str, Any],
    max_decode_q: int = 1,
    stop_ids: Iterable[int] = (),
    prompt_columns: int | None = None,
    tokens: Tensor | None = None,
) -> Step | None:
    """Work out the step from the arguments of the backbone's forward.

    Args:
        arguments: By name.
        max_decode_q: Longest step on a filled cache that counts as decode.
        stop_ids: Token ids that ``generate`` feeds to sequences that have ended: end of sequence, then padding.
        prompt_columns: Columns of prompt under teacher forcing, None outside of it.
        tokens: ``(B, q)`` token ids, if a model further out was given them and the backbone only their embeddings.

    Returns:
        The step, or None if there are no inputs to read it from.
    """
    if arguments.get("decoder_input_ids") is not None:  # a canvas of tokens, over a cache that another model has filled
        arguments = {name.removeprefix("decoder_"): value for name, value in arguments.items()}
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    inputs = ids if isinstance(ids, Tensor) else embeds
    if not isinstance(inputs, Tensor) or inputs.ndim < 2:
        return None
    batch, q = inputs.shape[:2]
    device = inputs.device
    if isinstance(arguments.get("cu_seq_lens_q"), Tensor):
        return _read_packed(arguments, batch * q, device, max_decode_q)
    cache: Any = next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)
    past: int | Tensor = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    valid = _valid(arguments.get("attention_mask"), batch, q, past, device)

    if prompt_columns is not None:
        decode = (torch.arange(q, device=device) >= prompt_columns).expand(batch, q)
        return Step(_role(valid), _phase(decode), q, False, batch)

    if q > max_decode_q or (not isinstance(past, Tensor) and past == 0):
        return Step(_role(valid), _phase(torch.zeros_like(valid)), 0, True, batch)
    # the cache may keep its length on the device: it is not waited for
    decode = (past > 0).to(device).expand(batch, q) if isinstance(past, Tensor) else torch.ones_like(valid)
    ids = ids if isinstance(ids, Tensor) else tokens
    if ids is not None and ids.shape == (batch, q):
        # generate() goes on feeding sequences that have ended and calls them real; they must not vote
        stopped = torch.zeros_like(valid)
        for stop in stop_ids:
            stopped = stopped | (ids == stop)
        valid = valid & ~(stopped & decode)
    return Step(_role(valid), _phase(decode), 0, False, batch)


def stop_ids(model: Any) -> tuple[int, ...]:
    """Token ids that ``generate`` feeds to sequences that have ended."""
    stops: set[int] = set()
    for config in (getattr(model, "generation_config", None), model.config, model.config.get_text_config()):
        for name in ("eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            stops |= set(value) if isinstance(value, (list, tuple)) else {value} if isinstance(value, int) else set()
    return tuple(sorted(stops))


def _read_packed(arguments: dict[str, Any], rows: int, device: torch.device, max_decode_q: int) -> Step:
    """Read a batch of sequences laid end to end, as continuous batching sends them.

    A sequence is in decode if it has no more than ``max_decode_q`` tokens here and some in the cache. So is the last
    part of a prompt that was split, if it is that short: nothing tells the two apart. Rows behind the last sequence
    are padding.
    """
    ends = arguments["cu_seq_lens_q"].to(device)
    row = torch.arange(rows, device=device, dtype=ends.dtype)
    role = _role(row < ends[-1])
    if arguments.get("block_table") is not None:  # given where every sequence decodes
        return Step(role, _phase(torch.ones_like(role)), 0, False)
    cached = arguments.get("cu_seq_lens_k")
    if isinstance(cached, dict):  # one per kind of attention
        cached = next(iter(cached.values()), None)
    if not isinstance(cached, Tensor) or cached.shape != ends.shape:
        return Step(role, _phase(torch.zeros_like(role)), 0, True)
    length = ends.diff()
    decoding = (length <= max_decode_q) & (cached.to(device).diff() > length)
    sequence = torch.searchsorted(ends[1:].contiguous(), row, right=True).clamp_max(len(length) - 1)
    return Step(role, _phase(decoding[sequence]), 0, False)


def _role(valid: Tensor) -> Tensor:
    return torch.where(valid, int(Role.OPEN), int(Role.PADDING)).to(torch.int8).reshape(-1)


def _phase(decode: Tensor) -> Tensor:
    return torch.where(decode.bool(), int(Phase.DECODE), int(Phase.PREFILL)).to(torch.int8).reshape(-1)


def _valid(mask: Any, batch: int, q: int, past: int | Tensor, device: torch.device) -> Tensor:
    """``(B, q)`` bool: rows that the mask calls tokens."""
    if isinstance(mask, dict):  # one per kind of attention; windows are shorter than the positions
        masks = [mask.get("full_attention"), *mask.values()]
        mask = next((item for item in masks if isinstance(item, Tensor)), None)
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[-1] >= q:
        return (mask[:, -q:].to(device) > 0).expand(batch, q)
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-2] == q:
        # a row is a token if it may see its own position
        position = (torch.arange(q, device=mask.device) + past).clamp_max(mask.shape[-1] - 1)
        seen = mask[:, 0].gather(-1, position.view(1, q, 1).expand(mask.shape[0], q, 1)).squeeze(-1)
        return (seen if seen.dtype == torch.bool else seen == 0).to(device).expand(batch, q)
    return torch.ones((batch, q), dtype=torch.bool, device=device)
