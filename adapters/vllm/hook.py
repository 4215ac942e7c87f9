"""What stands behind a router of vLLM: the selection of its layer, and the op by which compiled code calls it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lynx.adapters.rules import ChoiceRule, choice_scores
from lynx.adapters.vllm.rows import Rows, read_rows
from lynx.log import logger
from lynx.routing import Routing, WeightRule
from lynx.selection import LayerSelection

_KEY = "lynx_rows"  # in a step's context: all layers share what was read of it


@dataclass(slots=True)
class Shared:
    """What the hooks of one model share.

    Attributes:
        max_decode_q: Longest query that counts as decode.
        exact: Bool, one for each request of a step: those that asked for exact routing; None if nothing tells.
        paused: Let the model's own routing through.
        left: Reasons for which steps were left alone, each said once.
    """

    max_decode_q: int
    exact: Tensor | None = None
    paused: bool = False
    left: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Hook:
    """One layer's selection, as its router calls it.

    Attributes:
        selection: The layer's selection.
        choice: What the router ranks experts by.
        rule: How it weighs them.
        bias: What it adds to scores for the choice, ``(E,)``, or None.
        real: How many of the experts are ones to run. What the router gives to experts behind them (zero experts) it
            has turned into slots of weight 0, which stay as they are.
        shared: What all layers share.
    """

    selection: LayerSelection
    choice: ChoiceRule
    rule: WeightRule
    bias: Tensor | None
    real: int
    shared: Shared

    def __call__(self, logits: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and ids ``(T, k)`` after selection; the given ones where the step is to be left alone."""
        rows = None if self.shared.paused else self._rows(logits.shape[0], ids.device)
        if rows is None:
            return weights, ids
        values = logits.float()
        choice = choice_scores(self.choice, values, self.bias)
        given = ids
        if self.real < choice.shape[-1]:
            choice = choice.index_fill(-1, torch.arange(self.real, choice.shape[-1], device=ids.device), -torch.inf)
            given = ids.masked_fill(weights == 0, -1)
        routing = Routing(
            choice=choice,
            logits=values,
            ids=given,
            weights=weights,
            role=torch.where((ids < 0).all(-1), 0, rows.role),  # rows that vLLM has marked as padding itself
            phase=rows.phase,
            rule=self.rule,
        )
        result = self.selection(routing)
        return result.weights, result.ids if given is ids else torch.where(given < 0, ids, result.ids)

    def _rows(self, tokens: int, device: torch.device) -> Rows | None:
        from vllm.config import CUDAGraphMode
        from vllm.forward_context import get_forward_context, is_forward_context_available

        if not is_forward_context_available():
            return None
        context: Any = get_forward_context()
        # A graph of a part of the model serves every phase of its size, and what is decided here is decided for good.
        if context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:
            self._leave("steps that run as piecewise CUDA graphs")
            return None
        found = context.additional_kwargs.get(_KEY)
        if found is None or found[0] != tokens:
            shared = self.shared
            found = (tokens, read_rows(context.attn_metadata, tokens, device, shared.max_decode_q, shared.exact))
            context.additional_kwargs[_KEY] = found
        rows = found[1]
        if isinstance(rows, Rows):
            return rows
        if context.attn_metadata is not None:  # there is none while memory is measured
            self._leave(rows)
        return None

    def _leave(self, reason: str) -> None:
        if reason not in self.shared.left:
            self.shared.left.add(reason)
            logger.warning("lynx.steps_left_exact", reason=reason)


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
