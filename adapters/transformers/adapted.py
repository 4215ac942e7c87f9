"""Routers inside the wrappers of PEFT, which may hold several copies of one (``modules_to_save``)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from lynx.adapters.transformers.discovery import RouterSite

_COPIES = "modules_to_save"
_WRAPPED = ("original_module", "base_layer")


def one_per_layer(sites: Iterable[RouterSite], modules: dict[str, nn.Module]) -> list[RouterSite]:
    """Take the copies of a router for one layer, and find the experts beside the wrapper where it has one.

    Args:
        sites: Routers as they were found.
        modules: All modules of the model by path.
    """
    layers: dict[str, RouterSite] = {}
    for site in sites:
        place = _place(site.name)
        if place not in layers:
            block = modules[place.rpartition(".")[0]]
            experts = getattr(block, "experts", None)
            found = experts if place != site.name and isinstance(experts, nn.Module) else site.experts
            layers[place] = replace(site, experts=found, block=block)
    return list(layers.values())


def copies(site: RouterSite, modules: dict[str, nn.Module]) -> list[nn.Module]:
    """Return the router and what may run in its place: whichever adapter is on, one of them does."""
    others = getattr(modules.get(site.name.rpartition(".")[0]), _COPIES, None)
    return [site.router, *(others.values() if isinstance(others, nn.ModuleDict) else ())]


def _place(name: str) -> str:
    """Path of the outermost wrapper around a module."""
    while True:
        outer, _, own_name = name.rpartition(".")
        if own_name in _WRAPPED:
            name = outer
        elif outer.rpartition(".")[-1] == _COPIES:
            name = outer.rpartition(".")[0]
        else:
            return name
