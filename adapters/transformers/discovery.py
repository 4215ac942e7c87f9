"""Find the routers, backbones and experts of a transformers model by structure, not by model name."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lynx.adapter import FoundLayer
from lynx.adapters.transformers.fingerprint import Fingerprint, fingerprint
from lynx.adapters.transformers.probe import UnknownRouter
from lynx.routing import WeightRule
from lynx.strategy import LayerInfo

LOOKED_FOR = "router modules named by `_can_record_outputs['router_logits']`, or a `gate` / `router` beside `experts`"
_ROUTER_NAMES = ("gate", "router")


@dataclass(frozen=True, slots=True)
class RouterSite:
    """A router in its place.

    Attributes:
        name: Module path.
        router: The module.
        experts: The experts module beside it, if there is one.
        backbone: Path of the nearest PreTrainedModel above it.
        block: The module that holds router and experts.
    """

    name: str
    router: nn.Module
    experts: nn.Module | None
    backbone: str
    block: nn.Module


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterLayer(FoundLayer):
    """A layer with what this adapter needs to hook it.

    Attributes:
        site: Where the router is.
        fingerprint: What it computes; None for a layer that is refused.
    """

    site: RouterSite
    fingerprint: Fingerprint | None = None


def pretrained_models(model: nn.Module) -> dict[str, Any]:
    """Return the PreTrainedModel modules by path; empty where transformers is not loaded."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return {}
    return {name: module for name, module in model.named_modules() if isinstance(module, transformers.PreTrainedModel)}


def outermost(models: dict[str, Any]) -> list[Any]:
    """Return the models that are not inside another one."""
    return [
        model for name, model in models.items() if not any(_inside(name, other) for other in models if other != name)
    ]


def find_routers(model: nn.Module) -> list[RouterSite]:
    """Return the routers in the order of the module tree, which is the order in which layers run."""
    models = pretrained_models(model)
    targets = [target for found in models.values() for target in _recorded(found)]
    modules = dict(model.named_modules())
    recorded = {
        name
        for name, module in modules.items()
        if any(isinstance(module, cls) and (part is None or part in name) for cls, part in targets)
    }
    beside = _beside_experts(modules)
    # some models record what holds the router
    around = {name for name in recorded for inner in beside if name != inner and _inside(inner, name)}
    chosen = {name for name in modules if name in recorded - around or (name in beside and _within(name, around))}
    sites = []
    for name in modules if targets else beside:
        backbones = [other for other in models if _inside(name, other)]
        if backbones and (name in chosen or not targets):
            block = modules[name.rpartition(".")[0]]
            experts = getattr(block, "experts", None)
            experts = experts if isinstance(experts, nn.Module) else None
            sites.append(RouterSite(name, modules[name], experts, max(backbones, key=len), block))
    return sites


def passed_over(model: nn.Module, sites: list[RouterSite]) -> tuple[str, ...]:
    """Say which MoE layers are no routers' to take, and are left exact."""
    modules = dict(model.named_modules())
    notes: dict[str, int] = {}
    for name in _beside_experts(modules):
        if not any(_inside(site.name, name) for site in sites):
            router = modules[name]
            by_token = "input_ids" in inspect.signature(router.forward).parameters
            why = "chooses by token id" if by_token else "is not what the model records as its routers"
            words = f"left exact: layers whose {type(router).__name__} {why}"
            notes[words] = notes.get(words, 0) + 1
    return tuple(f"{words} ({count})" for words, count in notes.items())


def told_from_outside(model: nn.Module) -> Iterator[FoundLayer]:
    """Refuse layers whose experts are chosen by who calls the model; for models without any router."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "experts", None), nn.Module) and pretrained_models(model):
            _, *told = inspect.signature(module.forward).parameters
            if told:
                info = LayerInfo(name, 0, 0, 0, WeightRule(repick=False))
                words = f"{type(module).__name__}: it has experts and no router; they are chosen by its arguments"
                yield FoundLayer(info, module, refused=f"{words} ({', '.join(told)})")


def describe(site: RouterSite, index: int, count: int) -> RouterLayer:
    """Probe one router and say what is known of its layer."""
    real = _real_experts(site)
    try:
        found = fingerprint(site.router, site.block, site.experts, real)
    except UnknownRouter as error:
        info = LayerInfo(site.name, index, 0, 0, WeightRule(repick=False), 0, count)
        return RouterLayer(info, site.router, refused=f"{type(site.router).__name__}: {error}", site=site)
    size = _expert_bytes(site.experts, found.num_experts - found.zero_experts)
    info = LayerInfo(site.name, index, found.num_experts, found.top_k, found.weights, size, count)
    return RouterLayer(info, site.router, notes=found.notes, site=site, fingerprint=found)


def _beside_experts(modules: dict[str, nn.Module]) -> list[str]:
    """Paths of modules that are called gate or router and stand beside experts."""
    found = []
    for name in modules:
        parent, _, own_name = name.rpartition(".")
        if own_name in _ROUTER_NAMES and isinstance(getattr(modules.get(parent), "experts", None), nn.Module):
            found.append(name)
    return found


def _real_experts(site: RouterSite) -> int | None:
    """How many experts have weights; None where that cannot be seen, or where other processes have the rest."""
    spread = getattr(site.experts, "_is_expert_parallel", False) or any(
        getattr(module, "_hf_tp_plan", None) is not None for module in (site.router, site.experts)
    )
    if site.experts is None or spread:
        return None
    return min((len(tensor) for tensor in site.experts.parameters() if tensor.ndim == 3), default=None)


def _within(name: str, others: set[str]) -> bool:
    return any(_inside(name, other) for other in others)


def _recorded(model: Any) -> Iterator[tuple[type[nn.Module], str | None]]:
    """Router classes that a model names for its own `output_router_logits`, with the path part they are bound to."""
    recorders = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
    for recorder in recorders if isinstance(recorders, (list, tuple)) else [recorders]:
        cls = getattr(recorder, "target_class", recorder)
        if isinstance(cls, type):
            yield cls, getattr(recorder, "layer_name", None)


def _inside(name: str, other: str) -> bool:
    return other == "" or name == other or name.startswith(f"{other}.")


def _expert_bytes(experts: nn.Module | None, num_experts: int) -> int:
    if experts is None:
        return 0
    return sum(p.numel() * p.element_size() for p in experts.parameters()) // num_experts
