"""Configuration: one schema for Python, YAML or JSON files and the ``LYNX_CONFIG`` environment variable."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, SerializeAsAny

from lynx.errors import ConfigError, did_you_mean
from lynx.layers import LayerFilter, MoESpec
from lynx.plugins import registry
from lynx.standins import StandIns, read_standins_option
from lynx.strategy import BaseStrategy
from lynx.validation import Options


def make_strategy(spec: Any, /, **options: Any) -> BaseStrategy:
    """Build a strategy from a name with options, a mapping with ``name``, or an instance.

    Raises:
        ConfigError: The name is unknown, an option is unknown or out of range, or options came with an instance.
    """
    if isinstance(spec, BaseStrategy):
        if options:
            raise ConfigError(f"options {sorted(options)} were given with a finished strategy; pass them to its class.")
        return spec
    if isinstance(spec, str):
        if spec.endswith((".yaml", ".yml", ".json")):
            raise ConfigError(f"{spec!r} names a file, not a strategy; read it with lynx.load_config({spec!r}).")
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        raise ConfigError(f"a strategy is a name, a mapping with `name`, or an instance; got {type(spec).__name__}.")
    if "name" not in spec:
        raise ConfigError(f"a strategy mapping needs `name`; got the keys {sorted(map(str, spec))}.")
    return registry().strategy(str(spec["name"])).build({**spec, **options})


AnyStrategy = Annotated[SerializeAsAny[BaseStrategy], BeforeValidator(make_strategy)]
"""Field type for a nested strategy: takes whatever :func:`make_strategy` takes."""


def _layers(value: Any) -> Any:
    if isinstance(value, LayerFilter) or value == "all":
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(
            "`layers` is `all`, or a mapping with lists under `include` or `exclude`, or with what hand-written MoE "
            "blocks are made of (lynx.MoESpec)."
        )
    described = any(key in MoESpec.model_fields and key not in LayerFilter.model_fields for key in value)
    return (MoESpec if described else LayerFilter).build(value)


class Config(Options):
    """Everything that can be configured about an attached model.

    Attributes:
        strategy: The selection strategy. A bare one acts on decode rows only.
        min_tokens: A batch of fewer OPEN rows is left exact.
        max_decode_q: Longest step on a filled cache that counts as decode, in tokens per sequence.
        layers: ``all``, include / exclude lists, or what hand-written MoE blocks are made of (:class:`MoESpec`).
        experts: Which implementation runs the experts: the ``model``'s own, ``lynx``'s, or ``auto`` to choose.
        standins: What answers for lost slots: a file that ``lynx calibrate`` wrote, or its options
            (:class:`lynx.StandIns`); None for re-picking.
        tpot_ms: Milliseconds per output token to hold, by targets that are moved from those of the strategy towards
            exact routing as far as there is time (:class:`lynx.tpot.TpotControl`); None leaves them where they are.
        evidence: What the setting rests on, as ``lynx tune`` writes it; nothing reads it.
    """

    strategy: AnyStrategy
    min_tokens: int = Field(2, ge=1)
    max_decode_q: int = Field(1, ge=1)
    layers: Annotated[Literal["all"] | SerializeAsAny[LayerFilter], BeforeValidator(_layers)] = "all"
    experts: Literal["auto", "model", "lynx"] = "auto"
    standins: Annotated[StandIns | None, BeforeValidator(read_standins_option)] = None
    tpot_ms: float | None = Field(None, gt=0, allow_inf_nan=False)
    evidence: dict[str, Any] | None = None

    @classmethod
    def described(cls) -> str:
        """Return what error messages call the whole."""
        return "the configuration"

    def dump(self) -> dict[str, Any]:
        """Return plain data that :func:`load_config` turns back into an equal config."""
        data = self.model_dump(mode="json")
        return {key: value for key, value in data.items() if value is not None}

    def save(self, path: str | Path) -> None:
        """Write the config as YAML, or as JSON if the file is called ``*.json``."""
        path = Path(path)
        data = self.dump()
        if self.standins is not None:  # a file's paths are read from where it stands
            folder = path.parent.resolve()
            standins = self.standins.file.resolve()
            inside = standins.is_relative_to(folder)
            data["standins"]["file"] = (standins.relative_to(folder) if inside else standins).as_posix()
        text = json.dumps(data, indent=2) + "\n" if path.suffix == ".json" else yaml.safe_dump(data, sort_keys=False)
        path.write_text(text, encoding="utf-8")


def load_config(source: str | Path | Mapping[str, Any] | Config) -> Config:
    """Read a config from a YAML or JSON file, or from a mapping.

    Args:
        source: A path, a mapping with the same keys as the file, or a finished config.

    Raises:
        ConfigError: The file cannot be read, is not YAML or JSON, or says something unknown.
    """
    if isinstance(source, Config):
        return source
    if isinstance(source, Mapping):
        return Config.build(source)
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {str(path)!r}: {error}") from error
    try:
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise ConfigError(f"{str(path)!r} is not valid {kind}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{str(path)!r} must hold a mapping with the key `strategy`; it holds {type(data).__name__}.")
    try:
        config = Config.build(data)
        if config.standins is None:
            return config
        return config.model_copy(update={"standins": config.standins.beside(path.parent)})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error.__cause__


def resolve_config(spec: Any, options: dict[str, Any]) -> Config:
    """Work out the config of an ``attach`` call: argument over file over ``LYNX_CONFIG``.

    Args:
        spec: A strategy in any form, a :class:`Config`, or None for the file that ``LYNX_CONFIG`` names.
        options: Keyword arguments; keys of :class:`Config` go there, all others to the strategy.
    """
    settings = {key: options[key] for key in Config.model_fields if key in options and key != "strategy"}
    rest = {key: value for key, value in options.items() if key not in settings}
    if spec is None:
        path = os.environ.get("LYNX_CONFIG")
        if not path:
            raise ConfigError("no strategy was given and LYNX_CONFIG is not set; name a strategy or a configuration.")
        spec = load_config(path)
    if isinstance(spec, Mapping) and "strategy" in spec:
        spec = load_config(spec)
    if isinstance(spec, Config):
        if rest:
            raise ConfigError(
                f"unknown arguments {sorted(rest)}: with a configuration only its own keys may be overridden."
            )
        return Config.build({**{key: getattr(spec, key) for key in Config.model_fields}, **settings})
    _check_options(spec, rest)
    return Config.build({"strategy": make_strategy(spec, **rest), **settings})


def _check_options(spec: Any, options: dict[str, Any]) -> None:
    """Raise where a keyword of ``attach`` is neither the strategy's nor the configuration's own."""
    name = spec.get("name") if isinstance(spec, Mapping) else spec
    if not options or not isinstance(name, str):
        return
    strategy = registry().strategy(name)
    own = [key for key in strategy.model_fields if key != "name"]
    general = [key for key in Config.model_fields if key != "strategy"]
    for key in options:
        if key not in own:
            raise ConfigError(
                f"no option {key!r}.{did_you_mean(key, [*own, *general])} Options of {strategy.described()}: "
                f"{', '.join(own)}; for every strategy: {', '.join(general)}."
            )
