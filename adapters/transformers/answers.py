"""Experts modules by themselves, and the hook that adds what stand-ins answer to what such a module gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lynx.adapter import FoundLayer, Listening
from lynx.adapters.transformers.dense import runs_all
from lynx.adapters.transformers.experts import spread
from lynx.adapters.transformers.offload import fetch
from lynx.errors import UnsupportedModelError
from lynx.standins import LayerStandIns


@dataclass(slots=True)
class LostSlots:
    """What a layer's router has left out last, until the experts have run.

    Attributes:
        given: Experts ``(T, k)`` and the weights of their stand-ins ``(T, k)``; one thing, so that they fit.
    """

    given: tuple[Tensor, Tensor] | None = None

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Return it and forget it."""
        given, self.given = self.given, None
        return given


@dataclass(slots=True)
class AnswersHook:
    """Forward hook of experts: adds what the stand-ins of lost slots answer.

    Attributes:
        lost: The lost slots.
        standins: The layer's.
    """

    lost: LostSlots
    standins: LayerStandIns

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        """Return the output with the answers, or None to leave it."""
        given = self.lost.take()
        if given is None:
            return None
        hidden = [*args, *kwargs.values()][0]
        rows = hidden.reshape(-1, hidden.shape[-1])
        return self.standins.add(output.reshape(rows.shape), rows, *given).reshape(output.shape)


@dataclass(frozen=True, slots=True)
class ModuleExperts:
    """The experts module of one layer; see :class:`lynx.adapter.LayerExperts`."""

    module: nn.Module

    def tensors(self) -> Iterable[Tensor]:
        """Return its parameters, also where they are offloaded."""
        return (fetch(self.module, name) for name, _ in self.module.named_parameters())

    def run(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Run one expert for each row."""
        ones = torch.ones(len(ids), 1, dtype=hidden.dtype, device=hidden.device)
        outputs: Tensor
        # not the module's hooks: they may be listening
        try:
            outputs = self.module.forward(hidden, ids.unsqueeze(-1), ones)
        except (ValueError, IndexError):  # some squeeze the axis of slots away where there is one
            twice = ids.unsqueeze(-1).expand(-1, 2)
            outputs = self.module.forward(hidden, twice, torch.cat([ones, torch.zeros_like(ones)], dim=-1))
        return outputs

    def listen(self, heard: Callable[[Tensor, Tensor, Tensor], None]) -> Listening:
        """Call a function before every forward of the module."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, ids, weights = [*args, *kwargs.values()][:3]
            heard(hidden.reshape(-1, hidden.shape[-1]), ids, weights)

        return self.module.register_forward_pre_hook(before, with_kwargs=True)


def module_experts(layer: FoundLayer, experts: nn.Module | None) -> ModuleExperts:
    """Return the experts of a layer by themselves.

    Raises:
        UnsupportedModelError: They cannot be had.
    """
    reason = ""
    if experts is None:
        reason = "no experts module was found beside the router"
    elif spread(experts):
        reason = "its experts are spread over processes"
    elif runs_all(experts):
        reason = f"{type(experts).__name__} weighs what goes into experts, not what comes out"
    elif len(inspect.signature(type(experts).forward).parameters) != 4:
        reason = f"{type(experts).__name__} is not called with hidden states, ids and weights"
    if reason or experts is None:
        raise UnsupportedModelError(f"layer {layer.info.name!r} takes no stand-ins: {reason}; leave out `standins`.")
    return ModuleExperts(experts)
