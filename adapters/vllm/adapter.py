"""The adapter between the core and a model that vLLM has loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from lynx.adapter import Discovery, FoundLayer, Installation
from lynx.adapters.serving import no_priorities, no_teacher_forcing
from lynx.adapters.vllm.answers import BehindExperts, hash_of
from lynx.adapters.vllm.hook import Hook, hooks, retired
from lynx.adapters.vllm.routers import RouterRules, find_rules, has_room, set_hook
from lynx.adapters.vllm.rows import StepRows
from lynx.adapters.vllm.runner import Watched, watched
from lynx.config import Config
from lynx.errors import AttachError, ConfigError
from lynx.routing import WeightRule
from lynx.selection import LayerSelection
from lynx.strategy import LayerInfo
from lynx.tpot import TpotControl

LOOKED_FOR = "MoE layers of vLLM whose routers were made while Lynx was configured"


class VllmAdapter:
    """Takes models of vLLM whose routers have room for a hook, which Lynx's vLLM plugin makes."""

    name = "vllm"

    def recognises(self, model: Any) -> bool:
        """Say whether such a router is in the module tree."""
        return isinstance(model, nn.Module) and any(True for _ in _layers(model))

    def discover(self, model: nn.Module) -> Discovery:
        """Find the layers and ask their routers for their rules."""
        modules = list(_layers(model))
        layers = []
        for index, (name, layer) in enumerate(modules):
            rules, refused = None, _refused(layer)
            if not refused:
                try:
                    rules = _rules(layer)
                except Exception as error:  # whatever a router of its own kind says to random logits
                    refused = f"its router could not be asked ({type(error).__name__}: {error}); leave it out"
            rule, notes = (rules.weights, rules.notes) if rules is not None else (WeightRule(repick=False), ())
            experts, size = (num_experts(layer), _expert_bytes(layer)) if hasattr(layer, "moe_config") else (0, 0)
            info = LayerInfo(name, index, experts, layer.router.top_k, rule, size, len(modules))
            layers.append(FoundLayer(info, layer, notes, refused))
        return Discovery(self, tuple(layers), LOOKED_FOR, "vLLM's own")

    def experts_hash(self, model: nn.Module, layer: FoundLayer) -> str:
        """Return by what a layer's experts are known again; see :class:`lynx.adapter.TakesStandIns`."""
        return hash_of(layer.router, layer.info.name)

    def prepare(
        self,
        model: nn.Module,
        config: Config,
        selections: Sequence[tuple[FoundLayer, LayerSelection]],
        replaced: Installation | None,
    ) -> VllmInstallation:
        """Check the configuration.

        Raises:
            ConfigError: Lynx is asked to run the experts, which vLLM's own kernels do; or to hold a time on several
                ranks.
            AttachError: This is not a whole model as vLLM loaded it, or it goes on calling other hooks.
        """
        if config.experts == "lynx":
            raise ConfigError("experts='lynx' cannot run inside vLLM, whose kernels run what is active; leave it out.")
        mine = watched.get(model)
        if mine is None:
            raise AttachError(f"this {type(model).__name__} is not a model as vLLM loaded it; attach to that one.")
        if mine.captured or mine.traced:
            raise AttachError(
                f"this engine has {'captured CUDA graphs' if mine.captured else 'compiled its model'} and goes on "
                "calling what was attached when it started; start it with this strategy in its configuration, or with "
                "--enforce-eager."
            )
        if config.tpot_ms is not None and mine.ranks > 1:
            raise ConfigError(
                "tpot_ms cannot hold a time under tensor parallelism: each rank would measure its own and choose other "
                "experts than the rest; leave it out, and choose fixed targets."
            )
        rows = StepRows(mine.width, mine.device, config.max_decode_q)
        found = []
        for layer, selection in selections:
            rules = _rules(layer.router)
            real = getattr(layer.router.router, "num_logical_experts", layer.info.num_experts)
            router = layer.router.router
            found.append((layer.router, Hook(selection, rules.choice, rules.weights, router, real, rows)))
        return VllmInstallation(found, rows, mine)


class VllmInstallation:
    """The hooks in one model."""

    experts = "model"

    def __init__(self, layers: list[tuple[Any, Hook]], rows: StepRows, model: Watched) -> None:
        self._layers, self._rows, self._model = layers, rows, model
        self._numbers: list[int] = []
        self._behind: list[BehindExperts] = []
        self._tpot: TpotControl | None = None

    @property
    def paused(self) -> bool:
        """While True, the model's own routing is let through."""
        return self._rows.silent

    @paused.setter
    def paused(self, value: bool) -> None:
        self._rows.silent = value

    def start(self) -> None:
        """Give every router its hook."""
        self._model.rows, self._model.tpot = self._rows, self._tpot
        for layer, hook in self._layers:
            hook.selection.place(_device(layer))
            self._numbers.append(len(hooks))
            hooks.append(hook)
            set_hook(layer.router, self._numbers[-1])
            if hook.selection.standins is not None:
                self._behind.append(BehindExperts(layer.routed_experts, self._numbers[-1]))

    def remove(self) -> None:
        """Take the hooks out; compiled code calls nothing any more, and captured graphs see padding alone."""
        self._rows.silent = True
        self._model.rows = self._model.tpot = None
        for layer, _ in self._layers:
            set_hook(layer.router)
        for behind in self._behind:
            behind.remove()
        self._behind.clear()
        for number in self._numbers:
            retired.extend(filter(None, hooks[number : number + 1]))
            hooks[number] = None
        self._numbers.clear()

    def time_by(self, tpot: TpotControl) -> None:
        """Tell a control when decode steps begin."""
        self._tpot = tpot

    def teacher_forced(self, prompt_columns: int) -> AbstractContextManager[None]:
        """Raise: an engine has no whole-sequence forward of this kind."""
        no_teacher_forcing("vLLM")

    def priorities(self, values: tuple[float | None, ...], copies: int) -> AbstractContextManager[None]:
        """Raise: batches are the engine's."""
        no_priorities("vLLM", "give a request its priority, by extra_args={'lynx': {'priority': 2.0}}.")


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The MoE layers with room for a hook, by module path."""
    for name, module in model.named_modules():
        if has_room(getattr(module, "router", None)):
            yield name, module


def _rules(layer: Any) -> RouterRules:
    return find_rules(layer.router, num_experts(layer), layer.moe_config.hidden_dim, _device(layer))


def num_experts(layer: Any) -> int:
    """How many experts a layer's router chooses from: copies for load balancing not counted, zero experts counted."""
    bias = getattr(layer.router, "e_score_correction_bias", None)
    return int(len(bias) if bias is not None else layer.moe_config.num_logical_experts)


def _device(layer: Any) -> torch.device:
    device: torch.device = next(layer.parameters()).device
    return device


def _expert_bytes(layer: Any) -> int:
    """Bytes of one expert's weights on this rank."""
    stacked = [p for p in layer.parameters() if p.ndim == 3 and len(p) == layer.moe_config.num_local_experts]
    return sum(p[0].nbytes for p in stacked)


def _refused(layer: Any) -> str:
    """Say why a layer cannot be taken; empty if it can."""
    if not hasattr(layer, "is_monolithic") or not hasattr(layer, "moe_config"):
        return f"{type(layer).__name__} is not one of vLLM's usual MoE layers; leave it out under `layers`"
    if getattr(layer.moe_config, "is_sequence_parallel", False):
        return "it sees a part of a step's rows (sequence parallelism); turn that off"
    if layer.is_monolithic:
        return (
            f"its experts run by {type(layer.routed_experts.quant_method).__name__}, whose kernel routes by itself; "
            "choose another one with --moe-backend (triton, for instance)"
        )
    if getattr(layer.router, "bias_vl", None) is not None:
        return "its router has a second bias for images; leave it out under `layers`"
    if getattr(layer.router, "_hash_indices_table", None) is not None:
        return "its experts are chosen by token id, not by a router; leave it out under `layers`"
    return ""
