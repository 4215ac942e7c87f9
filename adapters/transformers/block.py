"""Ask the block around a router that gives logits alone: what it makes of them is what its experts are called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lynx.adapters.transformers.probe import (
    PROBE_ROWS,
    Drawn,
    Probe,
    RouterOutput,
    UnknownRouter,
    copied,
    matrix_of,
    named_bias,
)


def probe_block(block: nn.Module, router: nn.Module, experts: nn.Module, seed: int = 0) -> Probe:
    """Run a copy of a block up to its experts and look at what they are given.

    The copy has random weights, as in :func:`lynx.adapters.transformers.probe.probe`. Of its children the router alone
    runs; the experts, which may be large, are not copied.

    Args:
        block: The module that holds both; not changed.
        router: The router in it.
        experts: The experts beside it.
        seed: Draws the random weights and hidden states.

    Raises:
        UnknownRouter: The block cannot be called, or does not give its experts ids and weights.
    """
    _, hidden_size = matrix_of(router)
    drawn = Drawn(hidden_size, seed)
    hidden = drawn(PROBE_ROWS, hidden_size)
    stand_in = copied(block, drawn.state, children=False)
    absent, reached = _Absent(), _Reached()
    said: list[Any] = []
    for name, child in block.named_children():
        twin = copied(child, drawn.state) if child is router else reached if child is experts else absent
        vars(stand_in)["_modules"][name] = twin
        if child is router:
            twin.register_forward_hook(lambda module, args, output: said.append(output))
    fault = ""
    with torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            type(stand_in).forward(stand_in, hidden.unsqueeze(0))
        except _Enough:
            pass
        except Exception as error:
            fault = f": {error}"
    given = list(enumerate(reached.given))
    ids = [i for i, item in given if _is_matrix(item) and not item.is_floating_point() and item.dtype != torch.bool]
    slots = given[ids[0]][1].shape if len(ids) == 1 else None
    weights = [i for i, item in given if _is_matrix(item) and item.is_floating_point() and item.shape == slots]
    logits = [i for i, item in enumerate(as_tuple(said[0]) if said else ()) if _is_logits(item, slots)]
    if slots is None or len(weights) != 1 or len(logits) != 1:
        raise UnknownRouter(f"{type(block).__name__} around it does not give its experts ids and weights (T, k){fault}")
    bias_name, bias = named_bias(stand_in)
    return Probe(
        RouterOutput(logits[0], weights[0], ids[0], by_block=True),
        as_tuple(said[0])[logits[0]].reshape(PROBE_ROWS, -1).float(),
        reached.given[weights[0]].float(),
        reached.given[ids[0]],
        bias,
        bias_name,
    )


def as_tuple(output: Any) -> tuple[Any, ...]:
    """Return an output that may be a single tensor as a tuple."""
    return output if isinstance(output, tuple) else (output,)


class _Enough(Exception):
    """The experts have been called; nothing behind them is of interest."""


class _Reached(nn.Module):
    """Stands for the experts: keeps what they are given and goes no further."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Any] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.given.extend([*args, *kwargs.values()])
        raise _Enough


class _Absent(nn.Module):
    """Stands for a module that adds nothing, such as shared experts."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(hidden)


def _is_matrix(item: Any) -> bool:
    return isinstance(item, Tensor) and item.ndim == 2 and len(item) == PROBE_ROWS


def _is_logits(item: Any, slots: torch.Size | None) -> bool:
    if not isinstance(item, Tensor) or slots is None or not item.is_floating_point():
        return False
    return item.numel() % PROBE_ROWS == 0 and item.shape[-1] * PROBE_ROWS == item.numel() and item.shape[-1] > slots[-1]
