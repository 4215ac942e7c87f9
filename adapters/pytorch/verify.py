"""Hold a reading against the block as it is: with its own weights, on its own device, in its own type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lynx.adapters.pytorch.block import Reading
from lynx.adapters.pytorch.reading import Unreadable
from lynx.adapters.pytorch.twin import copied

_ROWS = 8
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def hold_against(block: nn.Module, reading: Reading, hidden_size: int) -> tuple[str, ...]:
    """Compare a reading's forward with the block's own on a few random rows.

    Returns:
        Notes for the user.

    Raises:
        Unreadable: They differ.
    """
    tensors = [*block.parameters(), *block.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        return ("its weights are not here: not held against its own forward",)
    like = next((t for t in tensors if t.is_floating_point()), torch.zeros(()))
    twin = copied(block, _own)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, _ROWS // 2, hidden_size, generator=generator, device="cpu").to(like)
    wide = (hidden, hidden.reshape(_ROWS, 1, -1))  # more than one token, and one for each sequence
    try:
        for given in wide:
            _compare(twin, reading, given)
    except _CannotRun as fault:
        try:
            _compare(twin, reading, hidden.reshape(_ROWS, -1))
        except _CannotRun:
            raise Unreadable(5, f"its parts cannot be run: {fault}") from fault.__cause__
    return ()


class _CannotRun(Exception):
    """A block does not take hidden states of this shape."""


def _compare(twin: nn.Module, reading: Reading, given: Tensor) -> None:
    try:
        with torch.no_grad(), torch.autocast(given.device.type, enabled=False):
            expected, found = _main(twin(given.clone())), _main(_forward(reading, twin, given))
    except Exception as fault:  # whatever an author's code raises
        raise _CannotRun(f"{type(fault).__name__}: {fault}") from fault
    if expected.shape != found.shape:
        raise Unreadable(5, f"it returns {tuple(expected.shape)} where its reading returns {tuple(found.shape)}")
    apart = (expected - found).double().reshape(_ROWS, -1).norm(dim=-1)
    size = expected.double().reshape(_ROWS, -1).norm(dim=-1)
    off = ~(apart <= _TOLERANCE.get(given.dtype, 6e-2) * size + 1e-12)
    # a row may tie between two experts in a short type; one row in four is no tie
    if int(off.sum()) > (0 if given.dtype in (torch.float32, torch.float64) else _ROWS // 4):
        raise Unreadable(5, f"put together from its parts, its output differs in {int(off.sum())} of {_ROWS} rows")


def _forward(reading: Reading, twin: nn.Module, hidden: Tensor) -> Any:
    routing = reading.route(twin, hidden)
    rows = hidden.reshape(-1, hidden.shape[-1])
    routed = reading.run(twin, rows, routing.ids, routing.weights, None)
    return reading.finish(twin, hidden, routed, routing.logits)


def _main(output: Any) -> Tensor:
    main: Tensor = output if isinstance(output, Tensor) else output[0]
    return main


def _own(path: str, value: Tensor) -> Tensor:
    """Parameters as they lie; buffers copied, as a forward may write to them."""
    return value if isinstance(value, nn.Parameter) else value.clone()
