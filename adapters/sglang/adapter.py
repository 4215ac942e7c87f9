"""The adapter between the core and a model that SGLang has loaded. Not run on an engine yet."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from lynx.adapter import Discovery, FoundLayer, Installation
from lynx.adapters.serving import no_priorities, no_teacher_forcing
from lynx.adapters.sglang.hook import NUMBER, Hook, Shared, hooks
from lynx.adapters.sglang.routers import RouterRules, find_rules
from lynx.config import Config
from lynx.errors import ConfigError
from lynx.selection import LayerSelection
from lynx.strategy import LayerInfo

LOOKED_FOR = "SGLang's TopK modules"
_HOMES = {"TopK": "sglang.srt.layers.moe.topk", "HashTopK": "sglang.srt.layers.moe.hash_topk"}
_KERNEL = "choose another kernel with --moe-runner-backend (triton, for instance)"
_REFUSED = {
    "BYPASSED": f"its experts' kernel routes by itself (output format BYPASSED); {_KERNEL}",
    "TRITON_KERNEL": f"its routing is made for the kernels of triton_kernels (output format TRITON_KERNEL); {_KERNEL}",
    "PACKED": f"its routing is packed before Lynx sees it (output format PACKED); {_KERNEL}",
}


class SglangAdapter:
    """Takes models of SGLang, where Lynx's SGLang plugin stands around the routing of their TopK modules."""

    name = "sglang"

    def recognises(self, model: Any) -> bool:
        """Say whether such a module is in the module tree."""
        return isinstance(model, nn.Module) and any(True for _ in _layers(model))

    def discover(self, model: nn.Module) -> Discovery:
        """Find the layers and ask their routers for their rules."""
        modules = list(_layers(model))
        layers = []
        for index, (name, topk) in enumerate(modules):
            (experts, hidden), reason = _gate(model, name), _refused(topk)
            if not reason and not experts:
                reason = "no gate or router beside it tells its number of experts; leave it out under `layers`"
            rules = RouterRules(refused=reason) if reason else find_rules(topk, experts, hidden, _device(model))
            k = 0 if reason else topk.topk_config.top_k - topk.topk_config.num_shared_topk_slots
            info = LayerInfo(name, index, experts, k, rules.weights, _expert_bytes(model, name), len(modules))
            layers.append(FoundLayer(info, topk, rules.notes, rules.refused))
        return Discovery(self, tuple(layers), LOOKED_FOR, "SGLang's own")

    def prepare(
        self,
        model: nn.Module,
        config: Config,
        selections: Sequence[tuple[FoundLayer, LayerSelection]],
        replaced: Installation | None,
    ) -> SglangInstallation:
        """Check the configuration.

        Raises:
            ConfigError: It asks for what SGLang runs in its own way, experts or speculative verification as decode; or
                for a time to be held.
        """
        if config.experts == "lynx":
            raise ConfigError(
                "experts='lynx' cannot run inside SGLang, whose kernels run what is active; leave it out."
            )
        if config.max_decode_q != 1:
            raise ConfigError(
                f"max_decode_q={config.max_decode_q} has no meaning in SGLang, whose speculative verification is "
                "always left exact; leave it out."
            )
        if config.tpot_ms is not None:
            raise ConfigError("tpot_ms cannot be held in SGLang yet, whose steps are not timed; leave it out.")
        shared, device, found = Shared(), _device(model), []
        for layer, selection in selections:
            rules = find_rules(layer.router, *_gate(model, layer.info.name), device)
            found.append((layer.router.topk_config, Hook(selection, rules.choice, rules.weights, rules.bias, shared)))
        return SglangInstallation(found, shared, device)


class SglangInstallation:
    """The hooks in one model."""

    experts = "model"

    def __init__(self, layers: list[tuple[Any, Hook]], shared: Shared, device: torch.device) -> None:
        self._layers, self.shared, self._device = layers, shared, device
        self._numbers: list[int] = []

    @property
    def paused(self) -> bool:
        """While True, the model's own routing is let through."""
        return self.shared.paused

    @paused.setter
    def paused(self, value: bool) -> None:
        self.shared.paused = value

    @property
    def missed(self) -> list[str]:
        """Names of layers whose routing has not come by so far."""
        names = [hook.selection.info.name for _, hook in self._layers]
        return [name for name in names if name not in self.shared.reached]

    def start(self) -> None:
        """Give every layer its hook."""
        for config, hook in self._layers:
            hook.selection.place(self._device)
            self._numbers.append(len(hooks))
            hooks.append(hook)
            setattr(config, NUMBER, self._numbers[-1])

    def remove(self) -> None:
        """Take the hooks out. Graphs that were captured with them go on as they are."""
        for config, _ in self._layers:
            vars(config).pop(NUMBER, None)
        for number in self._numbers:
            hooks[number] = None
        self._numbers.clear()

    def teacher_forced(self, prompt_columns: int) -> AbstractContextManager[None]:
        """Raise: an engine has no whole-sequence forward of this kind."""
        no_teacher_forcing("SGLang")

    def priorities(self, values: tuple[float | None, ...], copies: int) -> AbstractContextManager[None]:
        """Raise: batches are the engine's."""
        no_priorities("SGLang", "requests of it have no priorities for Lynx yet.")


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules that choose experts, by module path; not those of drafts."""
    kinds = tuple(vars(sys.modules[home])[kind] for kind, home in _HOMES.items() if home in sys.modules)
    for name, module in model.named_modules():
        if isinstance(module, kinds) and not getattr(module, "is_draft", False):
            yield name, module


def _gate(model: nn.Module, name: str) -> tuple[int, int]:
    """``(E, H)`` as the weight of the gate says that stands beside a layer's TopK; zeros if there is none."""
    for path, weight in model.get_submodule(name.rpartition(".")[0]).named_parameters():
        if path.split(".")[0] in ("gate", "router") and path.endswith("weight") and weight.ndim == 2:
            return weight.shape[0], weight.shape[1]
    return 0, 0


def _refused(topk: Any) -> str:
    """Say why a layer cannot be taken; empty if it can."""
    if not hasattr(topk, "topk_config"):
        return "its experts are chosen by token id, not by a router; leave it out under `layers`"
    return _REFUSED.get(getattr(topk.topk_config.output_format, "name", ""), "")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _expert_bytes(model: nn.Module, name: str) -> int:
    """Bytes of one expert's weights on this rank."""
    beside = model.get_submodule(name.rpartition(".")[0]).named_parameters()
    return sum(p[0].nbytes for path, p in beside if path.startswith("experts.") and p.ndim == 3 and len(p))
