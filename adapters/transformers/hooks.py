"""The hooks that stand in a model: picklable objects, not closures, and inert when nothing is to be done."""

from __future__ import annotations

import copy
import inspect
import warnings
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from lynx.adapters.rules import choice_scores
from lynx.adapters.transformers.experts import Seat
from lynx.adapters.transformers.fingerprint import Fingerprint
from lynx.adapters.transformers.offload import fetch
from lynx.adapters.transformers.probe import ARGUMENT
from lynx.adapters.transformers.step import Step, read_step, stop_ids
from lynx.adapters.transformers.without_cache import WithoutCache
from lynx.errors import LynxWarning
from lynx.log import logger
from lynx.routing import Routing
from lynx.selection import LayerSelection


@dataclass(slots=True)
class StepContext:
    """What the hooks of one model share.

    Attributes:
        max_decode_q: Longest step on a filled cache that counts as decode.
        stop_ids: Token ids fed to sequences that have ended.
        tokens: Token ids that the outermost model was called with.
        step: The step under way, None outside of a forward.
        paused: Let the model's own routing through.
        prompt_columns: Columns of prompt under teacher forcing, None outside of it.
    """

    max_decode_q: int
    stop_ids: tuple[int, ...] = ()
    tokens: Tensor | None = None
    step: Step | None = None
    paused: bool = False
    prompt_columns: int | None = None


@dataclass(slots=True)
class CallBegins:
    """Forward pre-hook of the outermost model: keeps what the backbone may not be told.

    Special tokens are read at every call, as they are often set after the model is loaded. Those that are given to
    ``generate`` alone cannot be known.
    """

    context: StepContext
    names: tuple[str, ...]

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read token ids and special tokens."""
        self.context.tokens = (dict(zip(self.names, args, strict=False)) | kwargs).get("input_ids")
        if not torch.compiler.is_compiling():
            self.context.stop_ids = stop_ids(module)


@dataclass(slots=True)
class CallEnds:
    """Forward hook of the outermost model: forgets the call, also after an exception."""

    context: StepContext

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Let go of the token ids."""
        self.context.tokens = None


@dataclass(slots=True)
class StepBegins:
    """Forward pre-hook of a backbone: reads the step.

    Attributes:
        context: Where the step goes.
        names: Of the forward's arguments, in order.
        without_cache: What looks for generation without a cache; None if the strategy acts on prefill as well.
    """

    context: StepContext
    names: tuple[str, ...]
    without_cache: WithoutCache | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Put the step into the context, or None where nothing is to be done."""
        context = self.context
        context.step = None
        if not module.training and not context.paused:
            arguments = dict(zip(self.names, args, strict=False)) | kwargs
            context.step = read_step(
                arguments, context.max_decode_q, context.stop_ids, context.prompt_columns, context.tokens
            )
            if self.without_cache is not None and context.prompt_columns is None:
                ids = arguments.get("input_ids")
                self.without_cache.look(arguments, context.tokens if ids is None else ids)


@dataclass(slots=True)
class RouterHook:
    """Forward hook of a router: puts the selection's ids and weights in place of the router's own.

    Attributes:
        context: The step under way.
        fingerprint: Where the router's outputs are, and how it weighs.
        selection: The layer's selection.
        acts_on_prefill: Whether the strategy has anything to say in prefill.
        seat: Where the plan is left for Lynx's experts, if they run.
        ran: Whether the hook has been called.
    """

    context: StepContext
    fingerprint: Fingerprint
    selection: LayerSelection
    acts_on_prefill: bool
    seat: Seat | None = None
    ran: bool = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the rewritten output, or None to leave it."""
        step = self.context.step
        if step is None or module.training:
            return None
        places = self.fingerprint.output
        logits, weights, ids = output[places.logits], output[places.weights], output[places.ids]
        if ids.shape[:-1] != step.role.shape:
            return None  # rows that the step knows nothing of
        self.ran = True
        values = logits.float()
        routing = Routing(
            choice=choice_scores(self.fingerprint.choice, values, self._bias(module, args, kwargs)),
            logits=values,
            ids=ids,
            weights=weights,
            role=step.role.to(ids.device),
            phase=step.phase.to(ids.device),
            rule=self.fingerprint.weights,
        )
        if step.all_prefill and not self.acts_on_prefill:
            self.selection.observe(routing)
            return None
        rewritten = list(output)
        if step.columns:
            result = self.selection(_by_column(routing, step.columns))
            rewritten[places.ids], rewritten[places.weights] = _by_row(result.ids), _by_row(result.weights)
        else:
            result = self.selection(routing)
            rewritten[places.ids], rewritten[places.weights] = result.ids, result.weights
            if self.seat is not None:
                self.seat.give(result.ids, result.plan)
        return tuple(rewritten)

    def _bias(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        name = self.fingerprint.choice.bias
        if name is None:
            return None
        bias: Tensor | None = [*args, *kwargs.values()][1] if name == ARGUMENT else fetch(module, name)
        return bias

    def __deepcopy__(self, memo: dict[int, Any]) -> RouterHook:
        """Copy the hook with its model, and share it where its router alone is copied, as PEFT does.

        Alone, a copy would have a context of its own that no backbone writes to.
        """
        if id(self.context) not in memo:
            return self
        return RouterHook(*(copy.deepcopy(getattr(self, each.name), memo) for each in fields(self)))


@dataclass(slots=True)
class StepEnds:
    """Forward hook of a backbone: forgets the step, also after an exception, and looks once whether routers ran."""

    context: StepContext
    routers: list[RouterHook] = field(default_factory=list)
    looked: bool = False

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forget the step."""
        step, self.context.step = self.context.step, None
        if step is None or output is None or torch.compiler.is_compiling() or self.looked:
            return
        self.looked = True
        silent = [hook.selection.info.name for hook in self.routers if not hook.ran]
        if silent:
            logger.error("lynx.routers_silent", layers=len(silent), first=silent[0])
            message = f"{len(silent)} of {len(self.routers)} routers did not decide over this forward's tokens"
            reason = "a fused kernel may go past them (use_kernels=True)"
            warnings.warn(f"{message} ({', '.join(silent)}); nothing is selected there: {reason}", LynxWarning, 2)


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a forward's arguments, in order."""
    return tuple(inspect.signature(module.forward).parameters)


def _by_column(routing: Routing, columns: int) -> Routing:
    """Turn ``(B * q, ...)`` rows into ``q`` independent batches ``(q, B, ...)``."""

    def turn(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, columns, *tensor.shape[1:]).transpose(0, 1)

    return Routing(
        turn(routing.choice),
        turn(routing.logits),
        turn(routing.ids),
        turn(routing.weights),
        turn(routing.role),
        turn(routing.phase),
        routing.rule,
    )


def _by_row(tensor: Tensor) -> Tensor:
    """Undo :func:`_by_column`."""
    return torch.flatten(tensor.transpose(0, 1), 0, 1).contiguous()
