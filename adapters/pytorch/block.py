"""What stands in a block in place of its forward, and the block's own that it calls where nothing is to be changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lynx.errors import AttachError
from lynx.kernels import Plan
from lynx.routing import Routing
from lynx.rows import Rows, current_step, read_rows
from lynx.selection import LayerSelection


class Reading(Protocol):
    """How a block decides and what it computes: read from its code, or given by its author."""

    def route(self, block: nn.Module, hidden: Tensor) -> Routing:
        """Decide for hidden states ``(..., H)`` as the block does."""
        ...

    def run(self, block: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor, plan: Plan | None) -> Tensor:
        """Combine hidden states ``(T, H)`` by ids and weights ``(T, k)`` to ``(T, H)``."""
        ...

    def finish(self, block: nn.Module, hidden: Tensor, routed: Tensor, logits: Tensor) -> Any:
        """Make of ``(T, H)`` what the block returns for ``(..., H)``."""
        ...


@dataclass(slots=True)
class Shared:
    """What the blocks of one model share.

    Attributes:
        max_decode_q: Longest step that counts as decode where nobody has said the phase.
        paused: Run the blocks' own forwards.
        told: Whether :func:`lynx.step` has ever been used around them.
    """

    max_decode_q: int
    paused: bool = False
    told: bool = False


@dataclass(slots=True, eq=False)
class BlockForward:
    """The forward of an attached block.

    Steps in which no row could change run the block's own forward, bit for bit: training, pauses, prefill, batches that
    are too small, strategies that change nothing. All others run routing, selection and the kept experts.

    Attributes:
        block: The block.
        reading: How it decides and computes.
        selection: The layer's selection.
        shared: What all blocks share.
        acts_on_prefill: Whether the strategy has anything to say in prefill.
    """

    block: nn.Module
    reading: Reading
    selection: LayerSelection
    shared: Shared
    acts_on_prefill: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stand for the block's forward."""
        block, selection = self.block, self.selection
        if block.training or self.shared.paused:
            return self._own(args, kwargs)
        hidden = self._hidden(args, kwargs)
        rows = self._rows(hidden)
        if rows is None:
            return self._own(args, kwargs)
        decided = self.reading.route(block, hidden)
        routing = Routing(
            decided.choice,
            decided.logits,
            decided.ids,
            decided.weights,
            rows.role,
            rows.phase,
            decided.rule,
            decided.priority,
        )
        if (rows.all_prefill and not self.acts_on_prefill) or routing.ids.shape[0] < selection.min_tokens:
            selection.observe(routing)
            return self._own(args, kwargs)
        result = selection(routing)
        if selection.inert:
            return self._own(args, kwargs)
        flat = hidden.reshape(-1, hidden.shape[-1])
        routed = self.reading.run(block, flat, result.ids, result.weights, result.plan)
        if result.answered is not None and selection.standins is not None:
            routed = selection.standins.add(routed, flat, result.lost_ids, result.answered)
        return self.reading.finish(block, hidden, routed, routing.logits)

    def _own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own: Callable[..., Any] = type(self.block).forward
        return own(self.block, *args, **kwargs)

    def _hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        given = [*args, *kwargs.values()]
        if len(given) != 1 or not isinstance(given[0], Tensor):
            raise AttachError(
                f"block {self.selection.info.name!r} is called with {len(given)} arguments; Lynx stands in for blocks "
                "that take hidden states alone. Detach it, or leave it out with `exclude`."
            )
        hidden: Tensor = given[0]
        return hidden

    def _rows(self, hidden: Tensor) -> Rows | None:
        said = current_step()
        if not torch.compiler.is_compiling() and said is not None:  # compiled code would guard what it reads
            self.shared.told = True
        rows = read_rows(hidden.shape[:-1], hidden.device, self.shared.max_decode_q, said)
        if rows is None and not self.shared.told:
            raise AttachError(
                f"block {self.selection.info.name!r} sees hidden states {tuple(hidden.shape)} and cannot tell prefill "
                "from decode, so nothing would be selected; call the model inside `with lynx.step('prefill')` or "
                "`with lynx.step('decode')`."
            )
        return rows


def standing_in(block: nn.Module) -> BlockForward | None:
    """Return what stands in for a block's forward, if it is Lynx's."""
    stands = getattr(vars(block).get("forward"), "__self__", None)
    return stands if isinstance(stands, BlockForward) else None
