"""A strategy that keeps every expert and writes down what it is shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor

from lynx.errors import UnsupportedModelError
from lynx.routing import Phase, Role, Routing
from lynx.strategy import BaseStrategy, BoundStrategy, Keep, LayerInfo


class Recorder(BaseStrategy):
    """Keeps every expert, so that nothing changes, and writes down the decisions of all layers.

    It reads teacher-forced passes (see :meth:`lynx.Handle.teacher_forced`), in which rows come as ``(L, B)``: columns,
    then sequences. Any adapter that has them can be recorded.
    """

    name: Literal["record"] = "record"
    prompts: bool = False
    _layers: dict[int, _Layer] = PrivateAttr(default_factory=dict)

    def acts_on(self, phase: Phase) -> bool:
        """Rows of both phases are shown to it."""
        return True

    def bind(self, layer: LayerInfo) -> BoundStrategy:
        """Write a layer down from here on."""
        self._layers[layer.index] = _Layer(layer, self.prompts)
        return self._layers[layer.index]

    @property
    def layers(self) -> list[LayerInfo]:
        """The layers that are written down, in running order."""
        return [self._layers[index].info for index in sorted(self._layers)]

    def take(self, rows: int) -> dict[str, Tensor]:
        """Hand over what was written down of one pass, and forget it.

        Args:
            rows: Tokens that every layer must have decided over.

        Returns:
            For layer ``i``, in order of sequences and then of positions: ``layers.i.logits`` ``(rows, E)`` float32,
            ``layers.i.ids`` ``(rows, k)`` int16 (int32 where there are very many experts), ``layers.i.weights``
            ``(rows, k)`` as the model gives them, and ``layers.i.choice`` ``(rows, E)`` float32 where the router ranks
            by something else than its logits. On the CPU.

        Raises:
            UnsupportedModelError: A layer was shown something else.
        """
        taken = {}
        for index, layer in sorted(self._layers.items()):
            seen = [len(part["ids"]) for part in layer.shown]
            if seen != [rows]:
                raise UnsupportedModelError(
                    f"layer {layer.info.name!r} decided over {sum(seen)} tokens in {len(seen)} calls, where one pass "
                    f"read {rows}; its routing cannot be told apart by token and so not be recorded."
                )
            shown = layer.shown.pop()
            shown["ids"] = shown["ids"].to(layer.dtype_of_ids)
            taken.update({f"layers.{index}.{name}": tensor.cpu() for name, tensor in shown.items()})
        return taken


@dataclass(slots=True)
class _Layer:
    info: LayerInfo
    prompts: bool
    shown: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def dtype_of_ids(self) -> torch.dtype:
        # hosts number experts of their own kind from E on, so half of the range is left to them
        return torch.int16 if self.info.num_experts <= 2**14 else torch.int32

    def keep(self, routing: Routing) -> Keep:
        recorded = routing.role != int(Role.PADDING)
        if not self.prompts:
            recorded = recorded & (routing.phase == int(Phase.DECODE))
        # where both are one tensor, the router ranks by its logits
        ranked = {} if routing.choice.data_ptr() == routing.logits.data_ptr() else {"choice": routing.choice}
        parts = {"logits": routing.logits, "ids": routing.ids, "weights": routing.weights, **ranked}
        rows = recorded.transpose(0, -1)
        # rows of one token after the other
        self.shown.append({name: part.transpose(0, -2)[rows].detach() for name, part in parts.items()})
        return Keep(torch.ones_like(routing.choice[..., :1, :], dtype=torch.bool), False)
