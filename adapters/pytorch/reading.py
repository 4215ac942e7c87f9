"""What is known of a hand-written MoE block, and how its forward is put together from that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lynx.adapters.pytorch.anatomy import Anatomy, at
from lynx.adapters.pytorch.execution import ExpertModules, SlicedExperts, StackedExperts
from lynx.adapters.pytorch.routers import Matrix, Router
from lynx.kernels import Plan
from lynx.routing import Routing


class Unreadable(Exception):
    """A block cannot be taken; the message says why.

    Attributes:
        depth: How far it was understood: of several readings that failed, the deepest has the reason.
    """

    def __init__(self, depth: int, reason: str) -> None:
        super().__init__(reason)
        self.depth = depth


@dataclass(frozen=True, slots=True)
class Output:
    """What a block returns.

    Attributes:
        flat: Whether hidden states come back as ``(T, H)`` though they went in as ``(B, q, H)``.
        kind: ``tensor``, ``tuple`` or ``list``.
        extras: What follows the hidden states: ``logits`` or a constant, with the shape without its rows.
    """

    flat: bool
    kind: str
    extras: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class BlockReading:
    """All that is known of a block.

    Attributes:
        anatomy: What it is made of.
        router: Its router.
        experts: How its experts are run.
        shared: Modules that every token runs through.
        shared_gate: The module whose sigmoid weighs them, or None.
        residual: Whether the block adds its input.
        output: What it returns.
    """

    anatomy: Anatomy
    router: Router
    experts: ExpertModules | StackedExperts | SlicedExperts
    shared: tuple[str, ...]
    shared_gate: str | None
    residual: bool
    output: Output

    def route(self, block: nn.Module, hidden: Tensor) -> Routing:
        """Decide for hidden states ``(..., H)`` as the block does."""
        return self.router(block, hidden)

    def run(self, block: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor, plan: Plan | None) -> Tensor:
        """Run the experts for ids and weights ``(T, k)``."""
        return self.experts(block, hidden, ids, weights, plan)

    def finish(self, block: nn.Module, hidden: Tensor, routed: Tensor, logits: Tensor) -> Any:
        """Add what every token runs through, and return it as the block does.

        Args:
            block: The block.
            hidden: ``(..., H)``, what it was called with.
            routed: ``(T, H)``, from the experts.
            logits: ``(T, E)``.
        """
        rows = hidden.reshape(routed.shape)
        if self.shared:
            shared = sum((at(block, path)(rows) for path in self.shared[1:]), at(block, self.shared[0])(rows))
            if self.shared_gate is not None:
                shared = torch.sigmoid(at(block, self.shared_gate)(rows)) * shared
            routed = routed + shared
        if self.residual:
            routed = rows + routed
        output = routed if self.output.flat else routed.reshape(hidden.shape)
        if self.output.kind == "tensor":
            return output
        extras = [self._extra(kind, value, hidden, logits) for kind, value in self.output.extras]
        return (output, *extras) if self.output.kind == "tuple" else [output, *extras]

    def _extra(self, kind: str, value: Any, hidden: Tensor, logits: Tensor) -> Any:
        if kind == "constant":
            return value.to(hidden.device) if isinstance(value, Tensor) else value
        logits = logits.to(hidden.dtype)
        return logits.reshape(*hidden.shape[:-1], -1) if value == "wide" else logits

    def described(self) -> tuple[str, ...]:
        """Say in words what was found, for ``lynx inspect``."""
        router, anatomy = self.router, self.anatomy
        words = [f"router `{router.path}`" + ("" if router.ids is None else " decides")]
        if isinstance(router.logits, Matrix):
            words[0] += f", logits from `{router.logits.weight}`"
        if router.choice.bias is not None:
            words.append(f"chosen by {router.choice.score} + `{router.choice.bias}`")
        if router.choice.groups > 1:
            words.append(f"from {router.choice.kept_groups} of {router.choice.groups} groups")
        if anatomy.stacked is None:
            words.append(f"{anatomy.num_experts} modules in `{anatomy.modules}`")
        else:
            named = (("gate", anatomy.stacked.gate), ("up", anatomy.stacked.up), ("down", anatomy.stacked.down))
            stacked = ", ".join(f"{part} `{name}`" for part, name in named if name is not None)
            activation = getattr(self.experts, "activation", "")
            words.append(f"stacked {stacked}{' (transposed)' if anatomy.stacked.transposed else ''}, {activation}")
        if self.shared:
            gate = f" under `{self.shared_gate}`" if self.shared_gate else ""
            words.append(f"shared {', '.join(f'`{path}`' for path in self.shared)}{gate}")
        if self.residual:
            words.append("adds its input")
        return (*words, *router.notes)
