"""The transformers adapter: hooks on backbone and routers, and optionally Lynx's experts implementation."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lynx.adapter import Discovery, FoundLayer, Installation
from lynx.adapters.transformers import experts as experts_room
from lynx.adapters.transformers.adapted import copies, one_per_layer
from lynx.adapters.transformers.answers import ModuleExperts, module_experts
from lynx.adapters.transformers.decisions import hook_layer, is_ours
from lynx.adapters.transformers.dense import DenseExperts, runs_all
from lynx.adapters.transformers.discovery import (
    LOOKED_FOR,
    RouterLayer,
    describe,
    find_routers,
    outermost,
    passed_over,
    pretrained_models,
    told_from_outside,
)
from lynx.adapters.transformers.hooks import (
    CallBegins,
    CallEnds,
    RouterHook,
    StepBegins,
    StepContext,
    parameter_names,
)
from lynx.adapters.transformers.priorities import Priorities
from lynx.adapters.transformers.silence import StepEnds
from lynx.adapters.transformers.step import stop_ids
from lynx.adapters.transformers.without_cache import WithoutCache
from lynx.config import Config
from lynx.errors import AttachError, ConfigError
from lynx.routing import Phase
from lynx.selection import LayerSelection
from lynx.tpot import TpotControl


class TransformersAdapter:
    """Takes any model that holds a transformers ``PreTrainedModel`` with MoE layers."""

    name = "transformers"

    def recognises(self, model: Any) -> bool:
        """Say whether there is a PreTrainedModel in the module tree."""
        return isinstance(model, nn.Module) and bool(pretrained_models(model))

    def discover(self, model: nn.Module) -> Discovery:
        """Find and probe all routers."""
        sites = one_per_layer(find_routers(model), dict(model.named_modules()))
        if not sites:
            return Discovery(self, tuple(told_from_outside(model)), LOOKED_FOR)
        layers = tuple(describe(site, index, len(sites)) for index, site in enumerate(sites))
        why_not = next((reason for site in sites if (reason := experts_room.why_not(site.experts))), "")
        words = f"the model's own ({why_not})" if why_not else "the model's own, or Lynx's"
        return Discovery(self, layers, LOOKED_FOR, words, passed_over(model, sites))

    def experts_of(self, model: nn.Module, layer: FoundLayer) -> ModuleExperts:
        """Return the experts of a layer by themselves, as :class:`lynx.adapter.HoldsExperts` says."""
        return module_experts(layer, cast("RouterLayer", layer).site.experts)

    def prepare(
        self,
        model: nn.Module,
        config: Config,
        selections: Sequence[tuple[FoundLayer, LayerSelection]],
        replaced: Installation | None,
    ) -> TransformersInstallation:
        """Check everything that can stand against attaching."""
        pairs = cast("Sequence[tuple[RouterLayer, LayerSelection]]", selections)
        modules = [layer.site.experts for layer, selection in pairs if _may_run(layer, selection)]
        experts = experts_room.choose(config.experts, modules) if modules else "model"
        backends = experts_room.backends_of(modules) if experts == experts_room.IMPLEMENTATION else ""
        for layer, _ in pairs:
            for hook in layer.router._forward_hooks.values():
                own = isinstance(replaced, TransformersInstallation) and replaced.owns(hook)
                if is_ours(hook) and not own:
                    raise AttachError(
                        f"router {layer.info.name!r} is attached through another module; detach that one first "
                        "(lynx.detach). If this is a copy of an attached model, copy it while it is not attached."
                    )
        if config.tpot_ms is not None and _is_parallel(model):
            raise ConfigError(
                "tpot_ms cannot hold a time under tensor or expert parallelism: each process would measure its own "
                "and choose other experts than the rest; leave it out, and choose fixed targets."
            )
        for layer, selection in pairs:
            selection.place(device_of(layer.router))  # it may refuse, while the strategy before is still on
        return TransformersInstallation(model, pairs, config.max_decode_q, experts, backends)


class TransformersInstallation:
    """The hooks in one model.

    Attributes:
        experts: Which implementation runs the experts, ``model`` or ``lynx``.
        experts_backend: What Lynx's runs on; empty for the model's own.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: Sequence[tuple[RouterLayer, LayerSelection]],
        max_decode_q: int,
        experts: str,
        experts_backend: str,
    ) -> None:
        self.experts = experts
        self.experts_backend = experts_backend
        self._context = StepContext(max_decode_q)
        self._handles: list[RemovableHandle] = []
        self._switch = experts_room.ExpertsSwitch()
        self._model = weakref.ref(model)  # the hooks must not keep the model alive
        self._planned: tuple[nn.Module, Sequence[tuple[RouterLayer, LayerSelection]]] | None = (model, pairs)

    def owns(self, hook: object) -> bool:
        """Say whether a hook is one of this installation's."""
        return is_ours(hook, self._context)

    def start(self) -> None:
        """Register all hooks and the experts implementation, or nothing."""
        assert self._planned is not None
        planned, self._planned = self._planned, None
        try:
            self._hook(*planned)
        except BaseException:
            self.remove()
            raise

    @property
    def paused(self) -> bool:
        """Whether the model's own routing is let through."""
        return self._context.paused

    @paused.setter
    def paused(self, value: bool) -> None:
        self._context.paused = value

    def _hook(self, model: nn.Module, pairs: Sequence[tuple[RouterLayer, LayerSelection]]) -> None:
        """Register all hooks, and the experts implementation if Lynx's is to run."""
        # Compiled code goes past hooks that were not there when it was traced, and nothing guards against that.
        torch.compiler.reset()
        context = self._context
        for root in outermost(pretrained_models(model)):
            context.stop_ids += stop_ids(root)
            self._before(root, CallBegins(context, parameter_names(root)))
            self._after(root, CallEnds(context))
        modules = dict(model.named_modules())
        routers: dict[str, list[RouterHook]] = {}
        for layer, selection in pairs:
            selection.place(device_of(layer.router))
            acts_on_prefill = Phase.PREFILL not in selection.exact_phases
            seat = self._seat(layer, selection)
            routers_of = copies(layer.site, modules)
            hook = hook_layer(layer, routers_of, selection, context, acts_on_prefill, seat, self._handles)
            routers.setdefault(layer.site.backbone, []).append(hook)
        for name, hooks in routers.items():
            watch = None if any(hook.acts_on_prefill for hook in hooks) else WithoutCache()
            times = name == next(iter(routers))
            self._before(modules[name], StepBegins(context, parameter_names(modules[name]), watch, times))
            answering = tuple(hook for hook in hooks if hook.answers is not None)
            self._after(modules[name], StepEnds(context, hooks, answering))

    def _seat(self, layer: RouterLayer, selection: LayerSelection) -> experts_room.Seat | DenseExperts | None:
        """Switch a layer's experts over if Lynx's are to run them."""
        if self.experts != experts_room.IMPLEMENTATION or not _may_run(layer, selection):
            return None
        (seat,) = self._switch.set([layer.site.experts])
        return seat

    def remove(self) -> None:
        """Take all hooks out, last first, and restore the experts implementation."""
        self._switch.undo()
        while self._handles:
            self._handles.pop().remove()
        self._remove_from_copies()
        self._context.step = self._context.tokens = self._context.tpot = None
        torch.compiler.reset()

    def _remove_from_copies(self) -> None:
        """Take the hooks out of copies of routers that were put into the model since, as PEFT does."""
        model = self._model()
        for module in model.modules() if model is not None else ():
            for key, hook in list(module._forward_hooks.items()):
                if self.owns(hook):
                    del module._forward_hooks[key]
                    module._forward_hooks_with_kwargs.pop(key, None)

    def time_by(self, tpot: TpotControl) -> None:
        """Tell a control when decode steps begin."""
        self._context.tpot = tpot

    @contextmanager
    def teacher_forced(self, prompt_columns: int) -> Iterator[None]:
        """See :meth:`lynx.Handle.teacher_forced`."""
        before, self._context.prompt_columns = self._context.prompt_columns, prompt_columns
        try:
            yield
        finally:
            self._context.prompt_columns = before

    @contextmanager
    def priorities(self, values: tuple[float | None, ...], copies: int) -> Iterator[None]:
        """See :meth:`lynx.Handle.priorities`."""
        before, self._context.priorities = self._context.priorities, Priorities(values, copies)
        try:
            yield
        finally:
            self._context.priorities = before

    def _before(self, module: nn.Module, hook: Any) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module: nn.Module, hook: Any) -> None:
        self._handles.append(module.register_forward_hook(hook, always_call=True))


def _may_run(layer: RouterLayer, selection: LayerSelection) -> bool:
    """Whether Lynx may run a layer's experts: under `exact`, a model that runs all of them goes on doing so."""
    return getattr(selection.bound, "name", "") != "exact" or not runs_all(layer.site.experts)


def _is_parallel(model: nn.Module) -> bool:
    """Whether other processes have parts of a model, and must choose as this one does."""
    return any(
        getattr(module, "_hf_tp_plan", None) is not None or getattr(module, "_is_expert_parallel", False)
        for module in model.modules()
    )


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters or buffers are; the CPU if it has none, or has them offloaded."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))
