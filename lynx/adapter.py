"""What an adapter does for the core: find the MoE layers of a host's model and stand between router and experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from lynx.strategy import LayerInfo

if TYPE_CHECKING:
    from lynx.config import Config
    from lynx.selection import LayerSelection


@dataclass(frozen=True, slots=True)
class FoundLayer:
    """One MoE layer as an adapter sees it.

    Attributes:
        info: What the core and the strategies need to know.
        router: The host's router module.
        notes: What a user should know of this layer, for ``lynx inspect``.
        refused: Why the layer cannot be taken, or an empty string.
    """

    info: LayerInfo
    router: Any
    notes: tuple[str, ...] = ()
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Discovery:
    """What an adapter found in a model.

    Attributes:
        adapter: The adapter that looked.
        layers: The MoE layers, in the order in which they run.
        looked_for: What the adapter looked for, for the error message.
        experts: How the experts would run, in words.
        notes: What a user should know of the model as a whole, for ``lynx inspect``.
    """

    adapter: Adapter
    layers: tuple[FoundLayer, ...]
    looked_for: str
    experts: str = ""
    notes: tuple[str, ...] = ()


class Listening(Protocol):
    """What ends when it is removed, such as a hook of torch."""

    def remove(self) -> None:
        """End it."""
        ...


class LayerExperts(Protocol):
    """The experts of one layer by themselves: to be known again, to be run, and to be listened to."""

    def tensors(self) -> Iterable[Tensor]:
        """Return their weights, in an order that is always the same."""
        ...

    def run(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Return what one expert for each row makes of it: ``(N, H)`` by ids ``(N,)`` to ``(N, H)``, not weighted."""
        ...

    def listen(self, heard: Callable[[Tensor, Tensor, Tensor], None]) -> Listening:
        """Call a function in every forward of the model, until that is removed.

        Args:
            heard: Gets what the experts are given: hidden states ``(T, H)``, and the router's own ids and weights
                ``(T, k)``.
        """
        ...


class HoldsExperts(Protocol):
    """An adapter with stand-ins: in addition to :class:`Adapter`, and optional.

    Its installations add what stand-ins answer to what the experts give, with the `standins` of each layer's selection.
    """

    def experts_of(self, model: Any, layer: FoundLayer) -> LayerExperts:
        """Return the experts of a layer.

        Raises:
            UnsupportedModelError: They cannot be had; says why.
        """
        ...


class TakesStandIns(Protocol):
    """An adapter with stand-ins whose experts cannot be run by themselves: a file is made with another adapter.

    In the place of :class:`HoldsExperts`; its installations add what stand-ins answer, too.
    """

    def experts_hash(self, model: Any, layer: FoundLayer) -> str:
        """Return the hash by which the experts of a layer are known again, that of a file made for them.

        Raises:
            UnsupportedModelError: Nothing can be added to what they give; says why.
        """
        ...


class Installation(Protocol):
    """An adapter's hooks in one model; undone exactly by :meth:`remove`.

    One that sees decode steps begin, on the host, may have ``time_by(tpot)``: it is called before :meth:`start` where a
    time per output token is to be held, and the hooks then call :meth:`lynx.tpot.TpotControl.begins` and ``breaks``.
    """

    experts: str
    """Which experts implementation runs: ``model`` or ``lynx``."""
    paused: bool
    """While True, every hook lets the model's own routing through."""

    def start(self) -> None:
        """Put the selections to work, or raise and leave the model as it was."""
        ...

    def remove(self) -> None:
        """Take every hook out and restore what was changed."""
        ...

    def teacher_forced(self, prompt_columns: int) -> AbstractContextManager[None]:
        """Treat each column of a whole-sequence forward as one decode step; see :meth:`lynx.Handle.teacher_forced`."""
        ...

    def priorities(self, values: tuple[float | None, ...], copies: int) -> AbstractContextManager[None]:
        """Weigh the sequences of every forward, None for exact; see :meth:`lynx.Handle.priorities`."""
        ...


class Adapter(Protocol):
    """One host framework."""

    name: str

    def recognises(self, model: Any) -> bool:
        """Say whether the model is of this adapter's kind; cheap, imports no host that is not loaded already."""
        ...

    def discover(self, model: Any) -> Discovery:
        """Find the MoE layers; changes nothing."""
        ...

    def prepare(
        self,
        model: Any,
        config: Config,
        selections: Sequence[tuple[FoundLayer, LayerSelection]],
        replaced: Installation | None,
    ) -> Installation:
        """Check all that can stand against attaching, or raise; changes nothing.

        Args:
            model: The model.
            config: The configuration.
            selections: The layers to take, each with its selection.
            replaced: The installation that will be removed before the new one starts, if there is one.
        """
        ...
