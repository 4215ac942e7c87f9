"""Routings made from others: rows reordered, experts renumbered, batches stacked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lynx.routing import Role, Routing

_PER_ROW = ("role", "phase", "priority")
_PER_EXPERT = ("choice", "logits")
_PER_SLOT = ("ids", "weights")


def tensors(routing: Routing) -> dict[str, Tensor]:
    """Return the tensors of a routing by name."""
    named = {name: getattr(routing, name) for name in (*_PER_EXPERT, *_PER_SLOT, *_PER_ROW)}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def take_rows(routing: Routing, index: Tensor) -> Routing:
    """Take rows by number or mask, in that order."""
    return _with(routing, {name: tensor[index] for name, tensor in tensors(routing).items()})


def join_rows(first: Routing, second: Routing) -> Routing:
    """Append the rows of a second routing to those of a first."""
    others = tensors(second)
    return _with(first, {name: torch.cat([tensor, others[name]]) for name, tensor in tensors(first).items()})


def stack(routings: list[Routing]) -> Routing:
    """Stack routings of one shape as independent batches."""
    named = [tensors(routing) for routing in routings]
    return _with(routings[0], {name: torch.stack([batch[name] for batch in named]) for name in named[0]})


def renumber(routing: Routing, new_ids: Tensor) -> Routing:
    """Give expert ``e`` the number ``new_ids[e]``."""
    old_ids = new_ids.argsort()
    return replace(
        routing,
        choice=routing.choice[..., old_ids],
        logits=routing.logits[..., old_ids],
        ids=new_ids[routing.ids.long()].to(routing.ids.dtype),
    )


def garbage(routing: Routing, rows: int) -> Routing:
    """Make padding rows that are as bad as padding can be: NaN, infinities, ids of nobody and of everybody."""
    copy = take_rows(routing, torch.zeros(rows, dtype=torch.long))
    for name in ("choice", "logits", "weights", "priority"):
        tensor = getattr(copy, name)
        if tensor is not None:
            tensor[::2] = torch.nan
            tensor[1::2] = torch.inf
    copy.ids[::2] = -1
    copy.ids[1::2] = 0
    copy.role[:] = int(Role.PADDING)
    return copy


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in every bit, NaN included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.is_floating_point():
        whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
        one, other = one.contiguous().view(whole), other.contiguous().view(whole)
    return torch.equal(one, other)


def _with(routing: Routing, changes: dict[str, Any]) -> Routing:
    return replace(routing, **changes)
