"""The settings that the demo compares."""

from __future__ import annotations

from typing import Any

from lynx.config import Config
from lynx.reference_model import STANDINS

Setting = dict[str, Any]

EXACT: Setting = {"name": "exact"}

FULL: tuple[Setting, ...] = (
    {"name": "batch-union", "top": 1},
    {"name": "batch-union", "top": 2},
    {"name": "batch-union", "top": 3},
    {"name": "importance-threshold", "ratio": 0.5},
    {"name": "importance-threshold", "ratio": 0.5, "standins": True},
    {"name": "importance-threshold", "ratio": 0.3},
    {"name": "importance-threshold", "ratio": 0.3, "standins": True},
    {"name": "importance-threshold", "mass": 0.6},
    {"name": "importance-threshold", "mass": 0.8},
    {"name": "top-budget", "budget": 14},
    {"name": "popularity", "drop": 8},
    {"name": "affinity-binning", "budget": 14},
    {"name": "static-top", "top": 3},
    {"name": "static-top", "top": 2},
)

QUICK: tuple[Setting, ...] = (
    {"name": "batch-union", "top": 2},
    {"name": "importance-threshold", "ratio": 0.5},
    {"name": "importance-threshold", "ratio": 0.5, "standins": True},
    {"name": "importance-threshold", "mass": 0.8},
    {"name": "top-budget", "budget": 14},
    {"name": "static-top", "top": 2},
)


def label(setting: Setting) -> str:
    """Name a setting in one phrase, as tables and plots show it."""
    options = " ".join(f"{key}={value}" for key, value in setting.items() if key not in ("name", "standins"))
    return f"{setting['name']} {options}".strip() + (" + stand-ins" if setting.get("standins") else "")


def config_of(setting: Setting) -> Config:
    """Return what is attached: the strategy, with the stand-ins that come with the reference model where asked for."""
    strategy = {key: value for key, value in setting.items() if key != "standins"}
    return Config.build({"strategy": strategy, "standins": STANDINS if setting.get("standins") else None})
