"""Selection as a function of logits, for a forward that its author writes: no model, no adapter, no hooks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lynx.config import make_strategy
from lynx.errors import ConfigError
from lynx.report import Report, make_report
from lynx.rerouting import own_top_k
from lynx.routing import Routing, WeightRule
from lynx.rows import Step, current_step, read_rows
from lynx.selection import LayerSelection
from lynx.strategy import LayerInfo


class Selection:
    """A strategy bound to one layer of one's own, for :func:`select`. Make it once, with the layer.

    Args:
        strategy: As for :func:`lynx.attach`.
        num_experts: ``E``.
        top_k: ``k``.
        rule: How the layer turns logits into combine weights.
        name: The layer's name in reports.
        index: Its place among the model's MoE layers.
        num_layers: How many there are.
        min_tokens: A batch of fewer OPEN rows is left exact.
        max_decode_q: Longest step that counts as decode where nobody has said the phase.
        **options: Options of the strategy.

    Raises:
        ConfigError: The strategy or an option is wrong, or does not fit the layer.
    """

    def __init__(
        self,
        strategy: Any,
        /,
        *,
        num_experts: int,
        top_k: int,
        rule: WeightRule | None = None,
        name: str = "layer",
        index: int = 0,
        num_layers: int = 1,
        min_tokens: int = 2,
        max_decode_q: int = 1,
        **options: Any,
    ) -> None:
        if not 1 <= top_k <= num_experts:
            raise ConfigError(f"top_k is between 1 and num_experts={num_experts}; got {top_k}.")
        self.info = LayerInfo(name, index, num_experts, top_k, rule or WeightRule(), num_layers=num_layers)
        self.strategy = make_strategy(strategy, **options)
        self.max_decode_q = max_decode_q
        self.layer = LayerSelection(self.info, self.strategy, min_tokens)

    def to(self, device: torch.device | str) -> Selection:
        """Put what selection needs on a device, as before a CUDA graph is captured; else done by the first call."""
        self.layer.place(torch.device(device))
        return self

    def report(self) -> Report:
        """Read the counters and say what selection did; waits for the device."""
        layers = [(self.info, self.layer.counters.failures, self.layer.counters.read())]
        return make_report(self.strategy.model_dump(mode="json"), "model", layers)

    def reset(self) -> None:
        """Set all counters to zero."""
        self.layer.counters.reset()


def select(
    logits: Tensor,
    selection: Selection,
    *,
    bias: Tensor | None = None,
    choice: Tensor | None = None,
    phase: Any = None,
    valid: Tensor | None = None,
    exact: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn router logits into expert ids and combine weights under a strategy; takes the place of a router's top-k.

    Static shapes and no wait for the device, so that ``torch.compile`` traces it whole and a CUDA graph may hold it.
    Rows in prefill, and batches that are too small, get the router's own decision. It does not know whether the module
    around it is in training mode: while training, route as before.

    Args:
        logits: Router logits ``(B, q, E)`` or ``(T, E)``.
        selection: The strategy, bound to this layer.
        bias: ``(E,)``, added to the scores for the choice of experts but not to weights.
        choice: ``(..., E)`` what experts are ranked by, ``-inf`` for forbidden ones, where scores and ``bias`` are not
            all of it (groups of experts, for instance).
        phase: As for :func:`lynx.step`, which is asked for what is not given here.
        valid: As for :func:`lynx.step`.
        exact: As for :func:`lynx.step`.

    Returns:
        int64 ids ``(..., k)`` and weights ``(..., k)`` with the dtype of ``logits``. A slot that was lost without a
        replacement repeats the token's best expert with weight 0.

    Raises:
        ConfigError: The logits are of another number of experts, or nothing tells the phase of flat ones.

    Example:
        >>> import torch, lynx
        >>> selection = lynx.Selection("batch-union", top=1, num_experts=8, top_k=2)
        >>> ids, weights = lynx.select(torch.randn(4, 1, 8), selection)
        >>> ids.shape
        torch.Size([4, 1, 2])
    """
    info = selection.info
    if logits.shape[-1] != info.num_experts:
        raise ConfigError(f"the logits are of {logits.shape[-1]} experts, the selection of {info.num_experts}.")
    around = current_step()
    if around is not None:
        phase = around.phase if phase is None else phase
        valid = around.valid if valid is None else valid
        exact = around.exact if exact is None else exact
    leading = logits.shape[:-1]
    rows = read_rows(leading, logits.device, selection.max_decode_q, Step(phase, valid, exact))
    if rows is None:
        raise ConfigError(
            f"nothing tells whether logits {tuple(logits.shape)} are prefill or decode; pass (B, q, E), give `phase`, "
            "or call it inside lynx.step(phase)."
        )
    values = logits.reshape(-1, info.num_experts).float()
    if choice is not None:
        ranked = choice.reshape(-1, info.num_experts).float()
    else:
        ranked = values if bias is None else _scores(info.rule, values) + bias.float()
    ids, weights = own_top_k(ranked, values, info.top_k, info.rule)
    weights = weights.to(logits.dtype)
    routing = Routing(ranked, values, ids, weights, rows.role, rows.phase, info.rule)
    result = selection.layer(routing)
    shape = (*leading, info.top_k)
    return result.ids.reshape(shape), result.weights.reshape(shape)


def _scores(rule: WeightRule, logits: Tensor) -> Tensor:
    if rule.score == "sigmoid":
        return torch.sigmoid(logits)
    if rule.score == "sqrt_softplus":
        return F.softplus(logits).sqrt()
    return torch.softmax(logits, dim=-1)
