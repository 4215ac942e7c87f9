"""The hooks that stand in a model: picklable objects, not closures, and inert when nothing is to be done."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lynx.adapters.rules import choice_scores
from lynx.adapters.transformers.answers import LostSlots
from lynx.adapters.transformers.experts import Seat
from lynx.adapters.transformers.fingerprint import Fingerprint
from lynx.adapters.transformers.offload import fetch
from lynx.adapters.transformers.priorities import Priorities
from lynx.adapters.transformers.probe import ARGUMENT
from lynx.adapters.transformers.step import Step, read_step, stop_ids
from lynx.adapters.transformers.without_cache import WithoutCache
from lynx.routing import Routing
from lynx.selection import LayerSelection
from lynx.tpot import TpotControl


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
        priorities: What the sequences are worth, None where all are alike.
        tpot: What is told when steps begin, None where no time is to be held.
    """

    max_decode_q: int
    stop_ids: tuple[int, ...] = ()
    tokens: Tensor | None = None
    step: Step | None = None
    paused: bool = False
    prompt_columns: int | None = None
    priorities: Priorities | None = None
    tpot: TpotControl | None = None


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
        times: Whether it tells when steps begin; one backbone of a model does.
    """

    context: StepContext
    names: tuple[str, ...]
    without_cache: WithoutCache | None = None
    times: bool = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Put the step into the context, or None where nothing is to be done."""
        context = self.context
        context.step = None
        if not module.training and not context.paused:
            arguments = dict(zip(self.names, args, strict=False)) | kwargs
            step = read_step(arguments, context.max_decode_q, context.stop_ids, context.prompt_columns, context.tokens)
            context.step = step if step is None or context.priorities is None else context.priorities.on(step)
            if self.without_cache is not None and context.prompt_columns is None:
                ids = arguments.get("input_ids")
                self.without_cache.look(arguments, context.tokens if ids is None else ids)
        # in this order: what compiled code reads is guarded on, and it has no clock
        if not torch.compiler.is_compiling() and self.times and context.tpot is not None:
            step = context.step
            one_each = step is not None and not step.columns and step.sequences == step.role.numel()
            if step is not None and one_each and not step.all_prefill:
                context.tpot.begins(step.sequences)
            else:
                context.tpot.breaks()


@dataclass(slots=True)
class RouterHook:
    """Forward hook of a router: puts the selection's ids and weights in place of the router's own.

    Attributes:
        context: The step under way.
        fingerprint: Where the decision is, and how the router weighs.
        selection: The layer's selection.
        acts_on_prefill: Whether the strategy has anything to say in prefill.
        seat: Where the plan is left for Lynx's experts, if they run.
        answers: Where lost slots are left for the stand-ins, if there are any.
        entered: Whether the block around the router was called in this forward; kept until it has decided once, as are
            the next two.
        fired: Whether the router itself was.
        astray: Whether it was shown other rows than the step knows.
        decided: Whether it has decided over a step's rows.
    """

    context: StepContext
    fingerprint: Fingerprint
    selection: LayerSelection
    acts_on_prefill: bool
    seat: Seat | None = None
    answers: LostSlots | None = None
    entered: bool = False
    fired: bool = False
    astray: bool = False
    decided: bool = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the rewritten output, or None to leave it."""
        self.fired = True
        places = self.fingerprint.output
        assert places.ids is not None
        decision = output[places.logits], output[places.weights], output[places.ids]
        decided = self.decide(module, *decision, self._bias(module, args, kwargs))
        if decided is None:
            return None
        rewritten = list(output)
        rewritten[places.ids], rewritten[places.weights] = decided
        return tuple(rewritten)

    def decide(
        self, module: nn.Module, logits: Tensor, weights: Tensor, ids: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Select for one batch.

        Args:
            module: Tells whether it is in training.
            logits: ``(T, E)``, as the router gives them.
            weights: ``(T, k)``.
            ids: ``(T, k)``.
            bias: ``(E,)``, what the router adds to its scores for the choice, or None.

        Returns:
            Ids and weights ``(T, k)``; None where they are to be left alone.
        """
        step = self.context.step
        if self.answers is not None:
            self.answers.given = None
        if step is None or module.training:
            return None
        if ids.shape[:-1] != step.role.shape:
            self.astray = True
            return None
        self.decided = True
        values = self.fingerprint.output.read_logits(logits)
        choice = choice_scores(self.fingerprint.choice, values, bias)
        given, zero = ids, self.fingerprint.zero_experts
        if zero:
            real = choice.shape[-1] - zero
            choice = F.pad(choice[..., :real], (0, zero), value=-torch.inf)
            given = ids.masked_fill((ids >= real) | (weights == 0), -1)
        factor = named_tensor(module, self.fingerprint.expert_scale)
        plain = weights if factor is None else weights / factor[ids]
        routing = Routing(
            choice=choice,
            logits=values,
            ids=given,
            weights=plain,
            role=step.role.to(ids.device),
            phase=step.phase.to(ids.device),
            rule=self.fingerprint.weights,
            priority=None if step.priority is None else step.priority.to(ids.device),
        )
        if step.all_prefill and not self.acts_on_prefill:
            self.selection.observe(routing)
            return None
        if step.columns:
            result = self.selection(_by_column(routing, step.columns))
            new_ids, new_weights = _by_row(result.ids), _by_row(result.weights)
        else:
            result = self.selection(routing)
            new_ids, new_weights = result.ids, result.weights
            if self.seat is not None and not zero:
                self.seat.give(new_ids, result.plan)
        if self.answers is not None and result.answered is not None:
            lost = result.lost_ids, result.answered
            lost_ids, answered = (_by_row(lost[0]), _by_row(lost[1])) if step.columns else lost
            self.answers.given = lost_ids, answered if factor is None else answered * factor[lost_ids]
        if factor is not None:
            same = ((new_ids == ids) & (new_weights == plain)).all(-1, keepdim=True)
            new_weights = torch.where(same, weights, (new_weights * factor[new_ids]).to(weights.dtype))
        return torch.where(given < 0, ids, new_ids) if zero else new_ids, new_weights

    def _bias(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        name = self.fingerprint.choice.bias
        return [*args, *kwargs.values()][1] if name == ARGUMENT else named_tensor(module, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> RouterHook:
        """Copy the hook with its model, and share it where its router alone is copied, as PEFT does.

        Alone, a copy would have a context of its own that no backbone writes to.
        """
        if id(self.context) not in memo:
            return self
        return type(self)(*(copy.deepcopy(getattr(self, each.name), memo) for each in fields(self)))


@dataclass(slots=True)
class BlockBegins:
    """Forward pre-hook of the block around a router: from here on the router is expected to decide."""

    hook: RouterHook

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Say so."""
        self.hook.entered = True


def named_tensor(module: nn.Module, name: str | None) -> Tensor | None:
    """Return what stands at a path in a module, None for none."""
    return None if name is None else fetch(module, name)


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
        None if routing.priority is None else turn(routing.priority),
    )


def _by_row(tensor: Tensor) -> Tensor:
    """Undo :func:`_by_column`."""
    return torch.flatten(tensor.transpose(0, 1), 0, 1).contiguous()
