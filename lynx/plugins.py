"""The plugin registry: where strategies and adapters, built in or third party, are found by name."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from lynx import hookspecs
from lynx.errors import ConfigError, PluginError, did_you_mean
from lynx.log import logger
from lynx.strategy import BaseStrategy

if TYPE_CHECKING:
    from lynx.adapter import Adapter

BUILT_IN = "lynx-moe"
_BUILT_IN_PLUGINS = ("lynx.strategies", "lynx.adapters")
_ADAPTER_PARTS = ("recognises", "discover", "prepare")
_RESERVED_OPTIONS = frozenset(
    {"strategy", "min_tokens", "max_decode_q", "layers", "experts", "standins", "tpot_ms", "evidence"}
)


@dataclass(frozen=True, slots=True)
class BrokenPlugin:
    """An entry point that could not be loaded."""

    package: str
    entry_point: str
    reason: str


@dataclass(frozen=True, slots=True)
class RegisteredStrategy:
    """A strategy class and the package it came from."""

    cls: type[BaseStrategy]
    package: str


class Registry:
    """Everything that plugins have registered.

    Args:
        found: Entry points to load, each on its own.
        strict: Raise on a broken plugin instead of reporting it.
    """

    def __init__(self, found: list[EntryPoint], strict: bool = False) -> None:
        self.strict = strict
        self.strategies: dict[str, RegisteredStrategy] = {}
        self.adapters: list[tuple[Adapter, str]] = []
        self.broken: list[BrokenPlugin] = []
        self.plugins: list[tuple[str, str]] = []
        self._pluggy = pluggy.PluginManager(hookspecs.GROUP)
        self._pluggy.add_hookspecs(hookspecs)
        for module in _BUILT_IN_PLUGINS:
            self._add(importlib.import_module(module), module, BUILT_IN)
        for point in found:
            package = point.dist.name if point.dist is not None else point.value
            try:
                self._add(point.load(), f"{package}:{point.name}", package)
            except _DuplicateName as error:
                raise PluginError(str(error)) from None
            except Exception as error:
                if strict:
                    raise PluginError(f"plugin {point.name!r} of {package} could not be loaded: {error}") from error
                reason = f"{type(error).__name__}: {error}"
                self.broken.append(BrokenPlugin(package, point.name, reason))
                logger.error("lynx.plugin_failed", package=package, entry_point=point.name, reason=reason)

    def strategy(self, name: str) -> type[BaseStrategy]:
        """Return the strategy class called ``name``.

        Raises:
            ConfigError: No plugin registered that name.
        """
        try:
            return self.strategies[name].cls
        except KeyError:
            broken = "".join(f" Plugin {b.entry_point!r} of {b.package} is broken: {b.reason}." for b in self.broken)
            raise ConfigError(
                f"unknown strategy {name!r}.{did_you_mean(name, self.strategies)} "
                f"Registered: {', '.join(sorted(self.strategies))}.{broken}"
            ) from None

    def _add(self, plugin: Any, name: str, package: str) -> None:
        """Register one plugin whole or not at all."""
        registered = self._pluggy.register(plugin, name=name)
        if registered is None:
            raise PluginError(f"plugin {name!r} is blocked")
        try:
            self._pluggy.check_pending()
            strategies = {}
            for cls in self._returned("lynx_strategies", plugin):
                key = _checked(cls, package)
                if key in strategies:
                    raise PluginError(f"it registers strategy {key!r} twice")
                strategies[key] = RegisteredStrategy(cls, package)
            adapters = [(adapter, package) for adapter in self._returned("lynx_adapters", plugin)]
            names = [_checked_adapter(adapter, package) for adapter, _ in adapters]
            if len(set(names)) < len(names):
                raise PluginError(f"it registers an adapter twice: {', '.join(names)}")
            if not strategies and not adapters:
                raise PluginError("it implements neither lynx_strategies() nor lynx_adapters()")
            for key in strategies.keys() & self.strategies.keys():
                raise _DuplicateName(
                    f"strategy {key!r} is registered by both {self.strategies[key].package} and {package}; "
                    "uninstall one of them or rename its strategy."
                )
            for adapter, other in self.adapters:
                if adapter.name in names:
                    raise _DuplicateName(
                        f"adapter {adapter.name!r} is registered by both {other} and {package}; "
                        "uninstall one of them or rename its adapter."
                    )
        except BaseException:
            self._pluggy.unregister(plugin)
            raise
        self.strategies |= strategies
        self.adapters = self.adapters + adapters if package == BUILT_IN else adapters + self.adapters
        self.plugins.append((name, package))

    def _returned(self, hook: str, plugin: Any) -> list[Any]:
        """Call one hook of one plugin only, so that its fault is its own."""
        others = [other for other in self._pluggy.get_plugins() if other is not plugin]
        caller = self._pluggy.subset_hook_caller(hook, remove_plugins=others)
        return [item for returned in caller() for item in returned]


class _DuplicateName(PluginError):
    """Two packages claim one name: no order of loading would be right."""


def _checked(cls: Any, package: str) -> str:
    """Return the name of a strategy class, or raise where it could never be used from a config."""
    if not (isinstance(cls, type) and issubclass(cls, BaseStrategy)):
        raise PluginError(f"{package} returned {cls!r}, which is not a subclass of lynx.SelectionStrategy")
    name = cls.model_fields["name"].default
    if not isinstance(name, str):
        raise PluginError(f'{cls.__name__} needs a default name: `name: Literal["my-name"] = "my-name"`')
    clash = _RESERVED_OPTIONS & cls.model_fields.keys()
    if clash:
        raise PluginError(f"strategy {name!r} has options that attach() takes itself: {', '.join(sorted(clash))}")
    return name


def _checked_adapter(adapter: Any, package: str) -> str:
    """Return the name of an adapter, or raise where it lacks what every attach needs."""
    name = getattr(adapter, "name", None)
    if isinstance(adapter, type) or not isinstance(name, str) or not name:
        raise PluginError(f"{package} returned {adapter!r}, which is no adapter: an object with a name")
    missing = [part for part in _ADAPTER_PARTS if not callable(getattr(adapter, part, None))]
    if missing:
        raise PluginError(f"adapter {name!r} has no {', '.join(f'{part}()' for part in missing)}")
    return name


@cache
def registry() -> Registry:
    """Return the registry, loading entry points on first use.

    ``LYNX_STRICT_PLUGINS=1`` raises on a broken plugin instead of reporting it.
    """
    strict = os.environ.get("LYNX_STRICT_PLUGINS", "") not in ("", "0")
    return Registry(sorted(entry_points(group=hookspecs.GROUP), key=lambda p: p.name), strict)
