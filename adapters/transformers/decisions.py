"""Hooks for routers that do not give ids and weights: some give scores for all experts, some logits alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lynx.adapters.rules import choice_scores
from lynx.adapters.transformers.answers import AnswersHook, LostSlots
from lynx.adapters.transformers.block import as_tuple
from lynx.adapters.transformers.dense import DenseExperts
from lynx.adapters.transformers.discovery import RouterLayer
from lynx.adapters.transformers.experts import Seat
from lynx.adapters.transformers.hooks import BlockBegins, RouterHook, StepContext, named_tensor
from lynx.selection import LayerSelection


@dataclass(slots=True)
class ScoresHook(RouterHook):
    """Forward hook of a router that gives scores ``(T, E)``, 0 for every expert that a token does not have.

    Attributes:
        dense: What runs the experts in place of all of them, if Lynx does.
    """

    dense: DenseExperts | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the rewritten output, or None to leave it."""
        self.fired = True
        if self.dense is not None:
            self.dense.give(None, None)
        places = self.fingerprint.output
        logits, scores = output[places.logits], output[places.weights]
        bias = self._bias(module, args, kwargs)
        # as the router did: a chosen expert's score may be rounded to 0, and then scores alone do not tell
        choice = choice_scores(self.fingerprint.choice, places.read_logits(logits), bias)
        ids = torch.topk(choice, self.fingerprint.top_k, dim=-1).indices
        weights = scores.gather(-1, ids)
        decided = self.decide(module, logits, weights, ids, bias)
        if decided is None:
            return None
        new_ids, new_weights = decided
        if self.dense is not None:
            self.dense.give(new_ids, new_weights)
        # an empty slot adds 0 to what it repeats
        spread = torch.zeros_like(scores).scatter_add(-1, new_ids, new_weights.to(scores.dtype))
        same = ((new_ids == ids) & (new_weights == weights)).all(-1, keepdim=True)
        rewritten = list(output)
        rewritten[places.weights] = torch.where(same, scores, spread)
        return tuple(rewritten)


@dataclass(slots=True)
class ExpertsHook(RouterHook):
    """Forward pre-hook of experts whose block makes ids and weights of the router's logits: puts others in their place.

    Attributes:
        logits: What the router gave last, until the experts are called.
        bias: What the block adds to scores for the choice, or None.
    """

    logits: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> Any:
        """Return the rewritten arguments, or None to leave them."""
        logits, self.logits = self.logits, None
        bias, self.bias = self.bias, None
        self.fired = logits is not None
        places = self.fingerprint.output
        values = [*args, *kwargs.values()]
        assert places.ids is not None
        if logits is None:
            return None
        logits = logits.reshape(-1, logits.shape[-1])
        decided = self.decide(module, logits, values[places.weights], values[places.ids], bias)
        if decided is None:
            return None
        values[places.ids], values[places.weights] = decided
        return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))


@dataclass(slots=True)
class LogitsHook:
    """Forward hook of a router that gives logits alone: keeps them for the hook of the experts."""

    hook: ExpertsHook

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keep the logits of a step that is known."""
        if self.hook.context.step is not None:
            self.hook.logits = as_tuple(output)[self.hook.fingerprint.output.logits]


@dataclass(slots=True)
class DecidingBlockBegins(BlockBegins):
    """Forward pre-hook of a block that decides: finds its bias."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep the bias for the hook of the experts."""
        self.hook.entered = True
        assert isinstance(self.hook, ExpertsHook)
        self.hook.bias = named_tensor(module, self.hook.fingerprint.choice.bias)


def hook_layer(
    layer: RouterLayer,
    routers: Sequence[nn.Module],
    selection: LayerSelection,
    context: StepContext,
    acts_on_prefill: bool,
    seat: Seat | DenseExperts | None,
    handles: list[RemovableHandle],
) -> RouterHook:
    """Put the hooks of one layer where its decision is.

    Args:
        layer: The layer.
        routers: Its router, and what may run in its place.
        selection: Its selection.
        context: What the hooks of a model share.
        acts_on_prefill: Whether the strategy has anything to say in prefill.
        seat: What Lynx's experts are told through, if they run.
        handles: Gets what takes the hooks out again.

    Returns:
        The hook that selects.
    """
    site, found = layer.site, layer.fingerprint
    assert found is not None
    answers = None
    if selection.standins is not None:
        assert site.experts is not None
        answers = LostSlots()
        hook_of_experts = AnswersHook(answers, selection.standins)
        handles.append(site.experts.register_forward_hook(hook_of_experts, with_kwargs=True))
    plans = seat if isinstance(seat, Seat) else None
    if found.output.by_block:
        assert site.experts is not None
        behind = ExpertsHook(context, found, selection, acts_on_prefill, plans, answers)
        handles.append(site.block.register_forward_pre_hook(DecidingBlockBegins(behind)))
        handles.extend(router.register_forward_hook(LogitsHook(behind)) for router in routers)
        handles.append(site.experts.register_forward_pre_hook(behind, with_kwargs=True))
        return behind
    hook = RouterHook(context, found, selection, acts_on_prefill, plans, answers)
    if found.output.ids is None:
        dense = seat if isinstance(seat, DenseExperts) else None
        hook = ScoresHook(context, found, selection, acts_on_prefill, answers=answers, dense=dense)
    handles.append(site.block.register_forward_pre_hook(BlockBegins(hook)))
    # Before transformers 5.24, expert parallelism is a hook that makes ids local: Lynx comes before it.
    first = getattr(site.router, "_hf_tp_plan", None) is not None
    for router in routers:
        handles.append(router.register_forward_hook(hook, prepend=first, with_kwargs=True))
    return hook


def is_ours(hook: object, context: StepContext | None = None) -> bool:
    """Whether a hook of a router was put there by Lynx, or by the installation with this context."""
    found = hook.hook if isinstance(hook, LogitsHook) else hook
    return isinstance(found, RouterHook) and (context is None or found.context is context)
