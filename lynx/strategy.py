"""The strategy interface: what an author of a selection method writes, and what the core makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, Self, final, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor

from lynx.errors import ConfigError, StrategyError
from lynx.keep import ByMass, KeepRule
from lynx.routing import Phase, Routing, WeightRule
from lynx.validation import Options

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """What is known of one MoE layer at attach.

    Attributes:
        name: Module path of the router in the model.
        index: Place among the model's MoE layers, from 0.
        num_experts: ``E``, routed experts.
        top_k: ``k``, slots per token.
        rule: The router's weight rule.
        expert_bytes: Bytes of one expert's weights, 0 where unknown.
        num_layers: How many MoE layers the model has.
    """

    name: str
    index: int
    num_experts: int
    top_k: int
    rule: WeightRule
    expert_bytes: int = 0
    num_layers: int = 1


@dataclass(frozen=True, slots=True)
class Knob:
    """The option of a strategy that trades experts for quality.

    Attributes:
        option: Name of the option.
        fewest: Its value that keeps the fewest experts.
        full: Its value at which the strategy changes nothing; ``"k"`` and ``"E"`` stand for the layer's counts.
    """

    option: str
    fewest: float | Literal["k", "E"]
    full: float | Literal["k", "E"]

    def steps(self, layer: LayerInfo, count: int) -> list[float]:
        """Return up to ``count`` values from ``fewest`` to ``full``, whole numbers where both ends are."""
        ends = [{"k": layer.top_k, "E": layer.num_experts}.get(str(end), end) for end in (self.fewest, self.full)]
        low, high = float(ends[0]), float(ends[1])
        values = [low + (high - low) * step / max(count - 1, 1) for step in range(count)]
        if all(isinstance(end, int) for end in ends):
            return list(dict.fromkeys(round(value) for value in values))
        return values


@dataclass(frozen=True, slots=True)
class Keep:
    """A strategy's decision with protection applied.

    Attributes:
        active: ``(1, E)`` bool where the batch shares it, ``(T, E)`` where every token has its own.
        refill: Whether a token's lost slots get its next best active experts; a bool, or bool ``(T, 1)`` per row.
    """

    active: Tensor
    refill: bool | Tensor


@runtime_checkable
class BoundStrategy(Protocol):
    """A strategy bound to one layer; the only thing the hot path calls."""

    def keep(self, routing: Routing) -> Keep:
        """Decide for one batch."""
        ...


@runtime_checkable
class Placed(Protocol):
    """A bound strategy with tensors of its own, which are put on the layer's device at attach."""

    def place(self, device: torch.device) -> None:
        """Make or move them."""
        ...


def place(bound: BoundStrategy, device: torch.device) -> None:
    """Put what a bound strategy keeps on a device, if it keeps anything."""
    if isinstance(bound, Placed):
        bound.place(device)


@runtime_checkable
class Steered(Protocol):
    """A bound strategy with a target that can be moved between steps, as :class:`lynx.tpot.TpotControl` does."""

    def steer(self, position: float) -> None:
        """Put the target between the configured one, 0, and exact routing, 1; must not wait for the device."""
        ...


def steered(bound: BoundStrategy) -> list[Steered]:
    """Find what can be steered in a bound strategy: itself, or those that a bound wrapper names by ``inner()``."""
    if isinstance(bound, Steered):
        return [bound]
    inner = getattr(bound, "inner", None)
    return [found for each in inner() for found in steered(each)] if callable(inner) else []


class BaseStrategy(Options):
    """What strategies and wrappers have in common. Authors subclass :class:`SelectionStrategy`."""

    name: str
    knob: ClassVar[Knob | None] = None
    inert: ClassVar[bool] = False
    """Whether it never changes anything: a host then runs its own code, bit for bit, where it would run another's."""

    @classmethod
    def described(cls) -> str:
        """Return what error messages call the strategy."""
        return f"strategy {cls.registered_name()!r}"

    @classmethod
    def registered_name(cls) -> str:
        """Return the name under which the class is found, the default of its ``name`` field."""
        default = cls.model_fields["name"].default
        return default if isinstance(default, str) else cls.__name__

    @classmethod
    def example(cls) -> Self:
        """Return an instance for documentation and for the contract suite; override where options are required."""
        return cls.build({})

    def acts_on(self, phase: Phase) -> bool:
        """Whether rows in ``phase`` may be re-routed; all others are EXACT. A bare strategy acts on decode only."""
        return phase == Phase.DECODE

    def remembers(self) -> bool:
        """Whether a decision depends on the steps before it. Steps that come in one call are then taken in order."""
        return False

    def bind(self, layer: LayerInfo) -> BoundStrategy:
        """Prepare for one layer, once, at attach; raise :class:`lynx.ConfigError` if the options do not fit it."""
        return self

    def check_at_most(self, option: str, most: Literal["k", "E"], layer: LayerInfo) -> None:
        """Raise :class:`lynx.ConfigError` if an option counts more experts than a layer has.

        Args:
            option: Name of the option.
            most: Whether it counts a token's experts (``k``) or the layer's (``E``).
            layer: The layer.
        """
        value, limit = getattr(self, option), layer.top_k if most == "k" else layer.num_experts
        if value > limit:
            raise ConfigError(
                f"strategy {self.name!r}: {option}={value}, but layer {layer.name!r} has {most}={limit}; "
                f"give {option} at most {limit}."
            )

    def keep(self, routing: Routing) -> Keep:
        """Decide which experts stay active for one batch."""
        raise NotImplementedError


class SelectionStrategy(BaseStrategy):
    """A selection method: its options are pydantic fields, its behaviour is :meth:`rule` or :meth:`select`.

    A subclass gives ``name`` a default and overrides one of the two. The core calls it, checks what comes back and
    guarantees everything else (see "How it works"), so a strategy can be wrong about quality, never about correctness.

    Attributes:
        protect: Each token's best ``protect`` experts always stay; 0 is for research.
        refill: What a token's lost slots get: ``re-pick`` its next best active experts, ``none`` nothing.
        floor: Each token's best experts stay until they hold this share of its own weight, whatever the method says;
            1 changes nothing.
    """

    protect: int = Field(1, ge=0, description="each token's best `protect` experts always stay")
    refill: Literal["re-pick", "none"] = Field("re-pick", description="what lost slots get")
    floor: float = Field(0.0, ge=0, le=1, description="share of its own weight that each token keeps at least")

    def rule(self) -> KeepRule | None:
        """Return a declarative keep rule, if the method is one."""
        return None

    def select(self, routing: Routing) -> Tensor:
        """Say which experts stay active.

        Args:
            routing: The batch; must not be changed.

        Returns:
            ``(E,)`` bool shared by the batch, or ``(T, E)`` for methods without sharing.
        """
        rule = self.rule()
        if rule is None:
            raise StrategyError(f"{type(self).__name__} overrides neither rule() nor select(); override one of them.")
        return rule.keep(routing)

    @final
    def keep(self, routing: Routing) -> Keep:
        """Check what :meth:`select` returned and add the protected experts, and those of the floor."""
        # An author's code gets a copy: it may write into it, and what the core re-routes stays the model's own.
        written_here = type(self).select is not SelectionStrategy.select
        active = self.select(routing.copied() if written_here else routing)
        full = routing.choice.shape
        shared = (*full[:-2], full[-1])
        if not isinstance(active, Tensor) or active.dtype != torch.bool or active.shape not in (full, shared):
            got = f"{active.dtype} {tuple(active.shape)}" if isinstance(active, Tensor) else type(active).__name__
            raise StrategyError(
                f"strategy {self.name!r} returned {got}; select() must return a bool tensor of shape "
                f"{tuple(shared)}, shared by the batch, or {tuple(full)}, one row per token."
            )
        return self.secured(routing, active)

    @final
    def secured(self, routing: Routing, active: Tensor) -> Keep:
        """Add what each token is promised: its best `protect` experts, and those of the floor.

        Args:
            routing: The batch.
            active: ``(E,)`` bool shared by the batch, or ``(T, E)``.
        """
        alone = active.shape == routing.choice.shape
        protected = routing.protected(self.protect)
        active = active | (protected if alone else protected.any(-2))
        if self.floor > 0.0:
            active = active | ByMass(self.floor, share=not alone).keep(routing)
        return Keep(active if alone else active.unsqueeze(-2), self.refill == "re-pick")


class Wrapper(BaseStrategy):
    """A strategy that only chooses between others; `protect` and `refill` are those of the chosen one."""

    def children(self) -> Sequence[BaseStrategy]:
        """Return the wrapped strategies."""
        raise NotImplementedError

    def remembers(self) -> bool:
        """Whether one of the wrapped strategies does."""
        return any(child.remembers() for child in self.children())

    def refuse_phased_children(self) -> None:
        """Raise where a wrapped strategy chooses phases itself: only the outermost can say which rows are open."""
        for child in self.children():
            if type(child).acts_on is not BaseStrategy.acts_on:
                raise ConfigError(f"put {child.name!r} outside: phases are chosen before layers and batch sizes.")
