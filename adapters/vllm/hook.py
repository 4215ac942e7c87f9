"""What stands behind a router of vLLM: the selection of its layer, and the op by which compiled code calls it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lynx.adapters.rules import ChoiceRule, choice_scores
from lynx.adapters.vllm.rows import StepRows
from lynx.log import logger
from lynx.routing import Phase, Routing, WeightRule
from lynx.selection import LayerSelection


@dataclass(frozen=True, slots=True)
class Hook:
    """One layer's selection, as its router calls it.

    Attributes:
        selection: The layer's selection.
        choice: What the router ranks experts by.
        rule: How it weighs them.
        router: The router; what it adds to scores for the choice is read from it each time, as weights may be loaded
            anew.
        real: How many of the experts are ones to run. What the router gives to experts behind them (zero experts) it
            has turned into slots of weight 0, which stay as they are.
        rows: What the rows of the step under way may do; all layers share it.
        lost: With stand-ins, what this step has left out, until the experts have run: at most one pair of experts
            ``(T, k)`` and the weights of their stand-ins ``(T, k)``.
    """

    selection: LayerSelection
    choice: ChoiceRule
    rule: WeightRule
    router: Any
    real: int
    rows: StepRows
    lost: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, logits: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and ids ``(T, k)`` after selection; the given ones where the step is to be left alone."""
        from vllm.forward_context import is_forward_context_available

        self.lost.clear()
        idle = self.rows.silent or not is_forward_context_available()
        rows = None if idle else self._kinds(logits.shape[0])
        if rows is None:
            return weights, ids
        role, phase = rows
        values, given = logits.float(), ids
        nothing_open = self._nothing_open()
        bias = self.router.e_score_correction_bias if self.choice.bias else None
        choice = values if nothing_open else choice_scores(self.choice, values, bias)
        if self.real < choice.shape[-1]:
            choice = choice.index_fill(-1, torch.arange(self.real, choice.shape[-1], device=ids.device), -torch.inf)
            given = ids.masked_fill(weights == 0, -1)
        routing = Routing(
            choice=choice,
            logits=values,
            ids=given,
            weights=weights,
            role=torch.where((ids < 0).all(-1), 0, role),  # rows that vLLM has marked as padding itself
            phase=phase,
            rule=self.rule,
            priority=self.rows.votes[: logits.shape[0]],
        )
        if nothing_open:
            self.selection.observe(routing)
            return weights, ids
        result = self.selection(routing)
        if result.answered is not None:
            self.lost.append((result.lost_ids, result.answered))
        return result.weights, result.ids if given is ids else torch.where(given < 0, ids, result.ids)

    def take_lost(self) -> tuple[Tensor, Tensor] | None:
        """Return what stand-ins have to answer for in this step, and forget it."""
        return self.lost.pop() if self.lost else None

    def _nothing_open(self) -> bool:
        """Whether the host knows that the strategy has nothing to decide, so that a long prefill costs little.

        Not while a graph is captured, which will serve other steps.
        """
        if self.rows.deciding or Phase.PREFILL not in self.selection.exact_phases:
            return False
        return not _in_graph()

    def _kinds(self, tokens: int) -> tuple[Tensor, Tensor] | None:
        kinds = self.rows.read(tokens)
        if kinds is None:
            _say_once(f"a step of {tokens} rows, more than vLLM said there are")
        elif tokens < self.rows.total and not _in_graph():
            _say_once("layers that see a part of a step's rows, and Lynx does not know which")
            return None
        return kinds


def _in_graph() -> bool:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context

    captured: bool = get_forward_context().cudagraph_runtime_mode != CUDAGraphMode.NONE
    return captured or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _say_once(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        logger.warning("lynx.steps_left_exact", reason=reason)


_said: set[str] = set()

hooks: list[Hook | None] = []
"""All hooks of this process, by the number that the op carries."""

retired: list[Hook] = []
"""Hooks that were taken out. Captured graphs may still read and write their tensors, which must not be freed."""


@torch.library.custom_op("lynx::vllm_select", mutates_args=())
def select(logits: Tensor, weights: Tensor, ids: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Call a hook; opaque to torch.compile, which traces through routers on some platforms."""
    hook = hooks[number]
    new_weights, new_ids = (weights, ids) if hook is None else hook(logits, weights, ids)
    # an op's outputs must not be its inputs
    return (weights.clone() if new_weights is weights else new_weights), (ids.clone() if new_ids is ids else new_ids)


@select.register_fake
def _(logits: Tensor, weights: Tensor, ids: Tensor, number: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weights), torch.empty_like(ids)
