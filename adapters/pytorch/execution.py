"""Run a block's experts for ids and weights of one's own: its modules, slices of its stacked weights, or kernels.

Symbols: T tokens, k slots per token, E experts, H hidden size, I expert size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lynx.adapters.pytorch.anatomy import Stacked, at
from lynx.kernels import ExpertWeights, Plan, choose_backend, run_experts
from lynx.kernels.gates import GATES, Gate


class Experts(Protocol):
    """One block's experts."""

    def __call__(self, block: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor, plan: Plan | None) -> Tensor:
        """Combine ``(T, H)`` hidden states by ids and weights ``(T, k)`` to ``(T, H)``."""
        ...


@dataclass(frozen=True, slots=True)
class ExpertModules:
    """Experts that are modules: each active one is called once, with its rows.

    Attributes:
        path: Path of the ModuleList in the block.
    """

    path: str

    def __call__(self, block: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor, plan: Plan | None) -> Tensor:
        """See :class:`Experts`."""
        return run_one_by_one(list(at(block, self.path)), hidden, ids, weights)


@dataclass(frozen=True, slots=True)
class SlicedExperts:
    """Stacked weights with a gate of their own, which the kernels do not take: one active expert after the other."""

    stacked: Stacked
    activation: str

    def __call__(self, block: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor, plan: Plan | None) -> Tensor:
        """See :class:`Experts`."""
        assert self.stacked.gate is not None
        form = ACTIVATIONS[self.activation]
        stacks = [at(block, name) for name in (self.stacked.gate, self.stacked.up, self.stacked.down)]
        matrices = [stack if self.stacked.transposed else stack.mT for stack in stacks]
        experts = [_Slice(form, *(stack[e] for stack in matrices)) for e in range(len(matrices[0]))]
        return run_one_by_one(experts, hidden, ids, weights)


@dataclass(frozen=True, slots=True)
class StackedExperts:
    """Stacked weights as Lynx's kernels take them, where they lie."""

    stacked: Stacked
    activation: str

    def __call__(self, block: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor, plan: Plan | None) -> Tensor:
        """See :class:`Experts`."""
        experts = self.weights(block)
        if torch.compiler.is_compiling() and choose_backend(experts, hidden.shape[0]).backend == "loop":
            return run_all(experts, hidden, ids, weights)
        return run_experts(hidden, ids, weights, experts, plan=plan)

    def weights(self, block: nn.Module) -> ExpertWeights:
        """Read the block's weights; done anew each time, as offloaded weights come and go."""
        return ExpertWeights(
            gate_up=at(block, self.stacked.up),
            down=at(block, self.stacked.down),
            activation=FORMULAS[self.activation],
            transposed=self.stacked.transposed,
            gate=self.activation if self.activation in GATES else None,
        )


@dataclass(frozen=True, slots=True)
class _Slice:
    """One expert of stacked weights, ``(H, I)``, ``(H, I)`` and ``(I, H)``."""

    form: Callable[[Tensor], Tensor]
    gate: Tensor
    up: Tensor
    down: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return (self.form(rows @ self.gate) * (rows @ self.up)) @ self.down


@dataclass(frozen=True, slots=True)
class UpFirst:
    """A gated activation whose halves are the other way round: ``up * form(gate)`` of ``[up, gate]``."""

    form: Callable[[Tensor], Tensor]

    def __call__(self, rows: Tensor) -> Tensor:
        """Compute it, ``(S, 2I) -> (S, I)``."""
        up, gate = rows.chunk(2, dim=-1)
        return up * self.form(gate)


@dataclass(frozen=True, slots=True)
class GateFirst:
    """A gated activation that :data:`lynx.kernels.gates.GATES` has no name for."""

    form: Callable[[Tensor], Tensor]

    def __call__(self, rows: Tensor) -> Tensor:
        """Compute it, ``(S, 2I) -> (S, I)``."""
        gate, up = rows.chunk(2, dim=-1)
        return self.form(gate) * up


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": GATES["gelu_tanh"],
    "relu": F.relu,
    "relu2": GATES["relu2"],
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""Nonlinearities of experts, by name; also those that a gate of its own goes through."""

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    **GATES,
    "relu": F.relu,
    "reglu": GateFirst(F.relu),
    "glu": GateFirst(torch.sigmoid),
    **{f"{name}_up_first": UpFirst(form) for name, form in ACTIVATIONS.items()},
}
"""What stands between the two products of stacked experts, by name."""


def formulas(stacked: Stacked, gated: bool) -> list[str]:
    """The activations that stacked experts could have."""
    if stacked.gate is not None:
        return list(ACTIVATIONS)
    return [name for name, form in FORMULAS.items() if _is_gated(form) == gated]


def inner(stacked: Stacked, activation: str, rows: Tensor, up: Tensor, gate: Tensor | None) -> Tensor:
    """Compute what goes into the down projection, ``(T, I)``, of one expert with matrices ``(H, I)``."""
    if gate is not None:
        return ACTIVATIONS[activation](rows @ gate) * (rows @ up)
    return FORMULAS[activation](rows @ up)


def run_one_by_one(experts: Sequence[Callable[[Tensor], Any]], hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Call each expert that holds a slot with non-zero weight once, with its rows, and add up in order of experts.

    That is the order and the arithmetic of most loops that are written by hand. The rows of each expert are read on the
    host, as such loops do too. Compiled code must know its shapes: there, every expert runs over all rows.
    """
    E, (T, k) = len(experts), ids.shape
    flat = ids.reshape(-1).long()
    used = (weights.reshape(-1) != 0) & (flat >= 0) & (flat < E)
    expert = torch.where(used, flat, E)
    factors = weights.to(hidden.dtype)
    output = torch.zeros_like(hidden)
    if torch.compiler.is_compiling():
        dense = hidden.new_zeros(T, E + 1).scatter_add(-1, expert.view(T, k), factors)
        for e, run in enumerate(experts):
            output = output + torch.where(dense[:, e : e + 1] != 0, run(hidden) * dense[:, e : e + 1], 0)
        return output
    order = expert.sort(stable=True).indices
    counts = torch.zeros(E + 1, dtype=torch.long, device=ids.device).scatter_add(0, expert, torch.ones_like(expert))
    start = 0
    for run, count in zip(experts, counts.tolist(), strict=False):
        if count:
            slots = order[start : start + count]
            rows = slots // k
            output.index_add_(0, rows, run(hidden[rows]) * factors.reshape(-1)[slots].unsqueeze(-1))
        start += count
    return output


def run_all(experts: ExpertWeights, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Run every expert over all rows and combine what ids and weights say: static shapes, and nothing saved."""
    E = experts.num_experts
    up, down = (w if experts.transposed else w.mT for w in (experts.gate_up, experts.down))
    rows = hidden.to(up.dtype).expand(E, *hidden.shape)
    outputs = experts.activation(rows @ up) @ down  # (E, T, H)
    precise = torch.promote_types(outputs.dtype, torch.float32)
    dense = weights.new_zeros(hidden.shape[0], E, dtype=precise).scatter_add(-1, ids.long(), weights.to(precise))
    weighted = torch.where(dense.T.unsqueeze(-1) != 0, outputs.to(precise) * dense.T.unsqueeze(-1), 0)
    return weighted.sum(0).to(hidden.dtype)


def _is_gated(form: Any) -> bool:
    return form.gated if isinstance(form, Gate) else isinstance(form, (UpFirst, GateFirst))
