"""Everything Lynx raises or warns about."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LynxError(Exception):
    """Root of every error raised by Lynx."""


class ConfigError(LynxError, ValueError):
    """An option, a config file or a strategy description is wrong.

    Where pydantic found the fault, its report is the ``__cause__``.
    """


class UnsupportedModelError(LynxError, TypeError):
    """No adapter can take the model; the message names what was looked for and what was found."""


class AttachError(LynxError, RuntimeError):
    """The model is supported but could not be attached to, or is not attached."""


class PluginError(LynxError, RuntimeError):
    """A plugin is broken, or two plugins register the same name."""


class StrategyError(LynxError, RuntimeError):
    """A strategy broke its contract while selecting."""


class MeasureError(LynxError, ArithmeticError):
    """A figure cannot be measured."""


class LynxWarning(UserWarning):
    """Something works differently from what the call suggests."""


def did_you_mean(asked: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(asked, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
