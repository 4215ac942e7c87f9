"""Find the routers, backbones and experts of a transformers model by structure, not by model name."""

from __future__ import annotations

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
    """

    name: str
    router: nn.Module
    experts: nn.Module | None
    backbone: str


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
    sites = []
    for name, module in modules.items():
        parent_name, _, own_name = name.rpartition(".")
        experts = getattr(modules.get(parent_name), "experts", None)
        recorded = any(isinstance(module, cls) and (part is None or part in name) for cls, part in targets)
        beside_experts = own_name in _ROUTER_NAMES and isinstance(experts, nn.Module)
        if recorded or (not targets and beside_experts):
            backbones = [other for other in models if _inside(name, other)]
            if backbones:
                experts = experts if isinstance(experts, nn.Module) else None
                sites.append(RouterSite(name, module, experts, max(backbones, key=len)))
    return sites


def describe(site: RouterSite, index: int, count: int) -> RouterLayer:
    """Probe one router and say what is known of its layer."""
    try:
        found = fingerprint(site.router)
    except UnknownRouter as error:
        info = LayerInfo(site.name, index, 0, 0, WeightRule(repick=False), 0, count)
        return RouterLayer(info, site.router, refused=f"{type(site.router).__name__}: {error}", site=site)
    size = _expert_bytes(site.experts, found.num_experts)
    info = LayerInfo(site.name, index, found.num_experts, found.top_k, found.weights, size, count)
    return RouterLayer(info, site.router, notes=found.notes, site=site, fingerprint=found)


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
