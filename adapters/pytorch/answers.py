"""The experts of a hand-written block by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lynx.adapter import Listening
from lynx.adapters.pytorch.anatomy import Anatomy, expert_tensors
from lynx.adapters.pytorch.block import Reading


@dataclass(frozen=True, slots=True)
class BlockExperts:
    """The experts of one block; see :class:`lynx.adapter.LayerExperts`.

    Attributes:
        block: The block.
        reading: How it decides and computes.
        anatomy: What it is made of; None where its author has said how it is run.
    """

    block: nn.Module
    reading: Reading
    anatomy: Anatomy | None

    def tensors(self) -> Iterable[Tensor]:
        """Return the experts' weights; all of the block's where nobody has said which are theirs."""
        return self.block.parameters() if self.anatomy is None else expert_tensors(self.block, self.anatomy)

    def run(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Run one expert for each row."""
        ones = torch.ones(len(ids), 1, dtype=hidden.dtype, device=hidden.device)
        return self.reading.run(self.block, hidden, ids.unsqueeze(-1), ones, None)

    def listen(self, heard: Callable[[Tensor, Tensor, Tensor], None]) -> Listening:
        """Call a function before every forward of the block."""

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = [*args, *kwargs.values()][0]
            decided = self.reading.route(block, hidden)
            heard(hidden.reshape(-1, hidden.shape[-1]), decided.ids, decided.weights)

        return self.block.register_forward_pre_hook(before, with_kwargs=True)
