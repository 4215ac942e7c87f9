"""What stands between SGLang's top-k and its experts: the selection of a layer. Not run on an engine yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lynx.adapters.rules import ChoiceRule, choice_scores
from lynx.adapters.sglang.rows import Rows, current_batch, read_rows
from lynx.errors import UnsupportedModelError
from lynx.log import logger
from lynx.routing import Routing, WeightRule
from lynx.selection import LayerSelection

SEAM = "sglang.srt.layers.moe.topk._post_process_topk_ids"
"""Where logical ids come in, and those of copies (EPLB) go out. Everything with its own top-k passes here."""
NUMBER = "lynx_number"
"""On a layer's ``TopKConfig``: the number of its hook. Not by layer id, as drafts have the same ones."""
CAUGHT = "lynx_caught"
"""On a ``TopKConfig`` that is being asked: a list to which its answers go."""


@dataclass(slots=True)
class Shared:
    """What the hooks of one model share.

    Attributes:
        paused: Let the model's own routing through.
        reached: Names of the layers that have passed the seam.
        left: Reasons for which steps were left alone, each said once.
    """

    paused: bool = False
    reached: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Hook:
    """One layer's selection, as SGLang's top-k calls it.

    Attributes:
        selection: The layer's selection.
        choice: What the router ranks experts by.
        rule: How it weighs them.
        bias: What it adds to scores for the choice, ``(E,)``, or None; the model's own tensor.
        shared: What all layers share.
    """

    selection: LayerSelection
    choice: ChoiceRule
    rule: WeightRule
    bias: Tensor | None
    shared: Shared

    def __call__(
        self, logits: Tensor, weights: Tensor, ids: Tensor, non_padded: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return weights and ids ``(T, k)`` after selection; the given ones where the step is to be left alone."""
        self.shared.reached.add(self.selection.info.name)
        rows = None if self.shared.paused else self._rows(logits, ids, non_padded)
        if not isinstance(rows, Rows):
            self._say(rows)
            return weights, ids
        values = logits.float()
        routing = Routing(
            choice=choice_scores(self.choice, values, self.bias),
            logits=values,
            ids=ids,
            weights=weights,
            role=torch.where((ids < 0).all(-1), 0, rows.role),  # rows that SGLang has marked as padding itself
            phase=rows.phase,
            rule=self.rule,
        )
        result = self.selection(routing)
        return result.weights, result.ids

    def _rows(self, logits: Tensor, ids: Tensor, non_padded: Tensor | None) -> Rows | str | None:
        """The rows of the step; why they cannot be told; None where no step is under way, as when a router is asked."""
        batch = current_batch()
        if batch is None:
            return None
        if logits.shape != (len(ids), self.selection.info.num_experts):
            return "steps whose router logits are not given, or not one for each expert"
        return read_rows(batch, len(ids), ids.device, non_padded)

    def _say(self, reason: str | None) -> None:
        if reason is not None and reason not in self.shared.left:
            self.shared.left.add(reason)
            logger.warning("lynx.steps_left_exact", reason=reason)


hooks: list[Hook | None] = []
"""All hooks of this process, by the number that the op carries."""


def around(
    original: Callable[..., Any],
    topk_ids: Tensor,
    topk_weights: Tensor,
    topk_config: Any,
    router_logits: Tensor,
    layer_id: int | None = None,
    num_token_non_padded: Tensor | None = None,
    *rest: Any,
    **named: Any,
) -> Any:
    """Stand around the seam as a hook of SGLang's type AROUND; the arguments are those of its function.

    Raises:
        UnsupportedModelError: A step is under way, and no model was ever attached to.
    """
    caught = getattr(topk_config, CAUGHT, None)
    if caught is not None:
        caught.append((topk_weights.clone(), topk_ids.clone()))
    number = getattr(topk_config, NUMBER, None)
    if number is not None:
        topk_weights, topk_ids = torch.ops.lynx.sglang_select(
            router_logits, topk_weights, topk_ids, num_token_non_padded, number
        )
    elif caught is None and not hooks and current_batch() is not None:
        raise UnsupportedModelError(
            "Lynx is configured, but this SGLang runs a model that Lynx did not see loaded: it loads models in another "
            "way than 0.5.23. Use that version, or unset LYNX_CONFIG."
        )
    return original(topk_ids, topk_weights, topk_config, router_logits, layer_id, num_token_non_padded, *rest, **named)


@torch.library.custom_op("lynx::sglang_select", mutates_args=())
def select(
    logits: Tensor, weights: Tensor, ids: Tensor, non_padded: Tensor | None, number: int
) -> tuple[Tensor, Tensor]:
    """Call a hook; opaque to torch.compile, so that the kind of a step is read when it runs."""
    hook = hooks[number]
    new_weights, new_ids = (weights, ids) if hook is None else hook(logits, weights, ids, non_padded)
    # an op's outputs must not be its inputs, and SGLang writes into both
    return (weights.clone() if new_weights is weights else new_weights), (ids.clone() if new_ids is ids else new_ids)


@select.register_fake
def _(logits: Tensor, weights: Tensor, ids: Tensor, non_padded: Tensor | None, number: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weights), torch.empty_like(ids)
