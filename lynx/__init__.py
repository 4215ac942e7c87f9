"""Lynx: batch-aware expert selection for Mixture-of-Experts decoding."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "AttachError": "lynx.errors",
    "Config": "lynx.config",
    "ConfigError": "lynx.errors",
    "Handle": "lynx.handle",
    "Keep": "lynx.strategy",
    "Knob": "lynx.strategy",
    "LayerFilter": "lynx.layers",
    "LayerInfo": "lynx.strategy",
    "LynxError": "lynx.errors",
    "LynxWarning": "lynx.errors",
    "MoELayer": "lynx.layers",
    "MoESpec": "lynx.layers",
    "Phase": "lynx.routing",
    "PluginError": "lynx.errors",
    "ReferenceModel": "lynx.reference_model",
    "Report": "lynx.report",
    "Role": "lynx.routing",
    "Routing": "lynx.routing",
    "Selection": "lynx.functional",
    "SelectionStrategy": "lynx.strategy",
    "MeasureError": "lynx.errors",
    "StandIns": "lynx.standins",
    "StrategyError": "lynx.errors",
    "UnsupportedModelError": "lynx.errors",
    "WeightRule": "lynx.routing",
    "Wrapper": "lynx.strategy",
    "attach": "lynx.attachment",
    "detach": "lynx.attachment",
    "handle_of": "lynx.attachment",
    "hookimpl": "lynx.hookspecs",
    "load_config": "lynx.config",
    "load_reference_model": "lynx.reference_model",
    "make_strategy": "lynx.config",
    "prune": "lynx.attachment",
    "select": "lynx.functional",
    "step": "lynx.rows",
}
__all__ = [
    "AttachError",
    "Config",
    "ConfigError",
    "Handle",
    "Keep",
    "Knob",
    "LayerFilter",
    "LayerInfo",
    "LynxError",
    "LynxWarning",
    "MeasureError",
    "MoELayer",
    "MoESpec",
    "Phase",
    "PluginError",
    "ReferenceModel",
    "Report",
    "Role",
    "Routing",
    "Selection",
    "SelectionStrategy",
    "StandIns",
    "StrategyError",
    "UnsupportedModelError",
    "WeightRule",
    "Wrapper",
    "__version__",
    "attach",
    "detach",
    "handle_of",
    "hookimpl",
    "load_config",
    "load_reference_model",
    "make_strategy",
    "prune",
    "select",
    "step",
]

if TYPE_CHECKING:
    from lynx.attachment import attach, detach, handle_of, prune
    from lynx.config import Config, load_config, make_strategy
    from lynx.errors import (
        AttachError,
        ConfigError,
        LynxError,
        LynxWarning,
        MeasureError,
        PluginError,
        StrategyError,
        UnsupportedModelError,
    )
    from lynx.functional import Selection, select
    from lynx.handle import Handle
    from lynx.hookspecs import hookimpl
    from lynx.layers import LayerFilter, MoELayer, MoESpec
    from lynx.reference_model import ReferenceModel, load_reference_model
    from lynx.report import Report
    from lynx.routing import Phase, Role, Routing, WeightRule
    from lynx.rows import step
    from lynx.standins import StandIns
    from lynx.strategy import Keep, Knob, LayerInfo, SelectionStrategy, Wrapper


def __getattr__(name: str) -> Any:
    # Names are loaded on first use: `import lynx` costs nothing, and the command line can show its help without torch.
    if name not in _HOME:
        raise AttributeError(f"module 'lynx' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
