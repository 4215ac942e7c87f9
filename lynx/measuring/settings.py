"""Settings as they are written on a command line, and what every comparison is held against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lynx.config import Config, load_config, resolve_config
from lynx.errors import ConfigError
from lynx.layers import LayerFilter

EXACT: dict[str, Any] = {"name": "exact"}
_SWEEP_VALUES = 7


def parse_setting(text: str) -> Config:
    """Read ``NAME option=value ...``, for instance ``importance-threshold ratio=0.4``, or the path of a configuration.

    Raises:
        ConfigError: There is no such strategy, option or file.
    """
    if Path(text).suffix in (".yaml", ".yml", ".json"):
        return load_config(text)
    if not text.strip():
        raise ConfigError("a setting is `NAME option=value ...`, for instance `batch-union top=2`; this one is empty.")
    name, *pairs = text.split()
    return resolve_config(name, dict(_pair(pair) for pair in pairs))


def sweep(text: str, ranges: Sequence[str]) -> list[Config]:
    """Read a strategy and the options to go through, ``option=from:to`` or ``option=from:to:count``.

    Whole numbers give whole numbers. Several ranges give every combination.

    Raises:
        ConfigError: A range is not understood, or a value does not fit the strategy.
    """
    texts = [text]
    for given in ranges:
        option, _, span = given.partition("=")
        texts = [f"{each} {option}={value}" for each in texts for value in _values(span, given)]
    return [parse_setting(each) for each in texts]


def describe(setting: Config) -> str:
    """Name a setting in one phrase, as tables show it."""
    options = setting.strategy.model_dump(mode="json", exclude_defaults=True)
    words = [f"{key}={value}" for key, value in options.items() if key != "name"]
    if isinstance(setting.layers, LayerFilter):
        chosen = {key: list(keys) for key, keys in setting.layers if keys}
        words.append(f"layers={chosen}")
    if setting.standins is not None:
        rank = "" if setting.standins.rank is None else f" of rank {setting.standins.rank}"
        words.append(f"+ stand-ins ({setting.standins.mode}{rank})")
    return " ".join([setting.strategy.name, *words])


def with_standins(settings: Sequence[Config], file: Path | None) -> list[Config]:
    """Put beside every setting the same one with a file of stand-ins; without a file, return them as they are."""
    if file is None:
        return list(settings)
    return [each for setting in settings for each in (setting, Config.build({**dict(setting), "standins": file}))]


def controls(settings: Sequence[Config], top_k: int) -> list[Config]:
    """What every comparison shows beside the settings asked for.

    The model as it is; each token's own best few, without sharing; and every setting without re-picking.

    Args:
        settings: Those asked for.
        top_k: Of the model.
    """
    alone = [resolve_config("static-top", {"top": top}) for top in range(1, min(top_k, 4))]
    dropping = []
    for setting in settings:
        dumped = setting.dump()
        if setting.standins is None and dumped["strategy"].get("refill") == "re-pick":
            dumped["strategy"]["refill"] = "none"
            dropping.append(load_config(dumped))
    return [resolve_config("exact", {}), *alone, *dropping]


def _pair(text: str) -> tuple[str, Any]:
    option, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{text!r} is no option; write `NAME option=value`, for instance `batch-union top=2`.")
    try:
        return option, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {text!r} is not understood: {error}") from error


def _values(span: str, given: str) -> list[float]:
    try:
        low, high, *count = (yaml.safe_load(part) for part in span.split(":"))
        steps = int(count[0]) if count else None
        whole = isinstance(low, int) and isinstance(high, int)
        if steps is None:
            steps = abs(high - low) + 1 if whole else _SWEEP_VALUES
        values = [low + (high - low) * step / max(steps - 1, 1) for step in range(steps)]
    except (ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"{given!r} is no range; write `option=from:to` or `option=from:to:count`.") from error
    return list(dict.fromkeys(round(value) if whole else round(value, 6) for value in values))
