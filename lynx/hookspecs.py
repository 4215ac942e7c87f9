"""The whole extension surface of Lynx."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lynx.adapter import Adapter
    from lynx.strategy import BaseStrategy

GROUP = "lynx"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def lynx_strategies() -> Iterable[type[BaseStrategy]]:
    """Return the strategy classes that a plugin adds."""
    raise NotImplementedError


@hookspec
def lynx_adapters() -> Iterable[Adapter]:
    """Return the adapters that a plugin adds, tried before the built-in ones."""
    raise NotImplementedError
