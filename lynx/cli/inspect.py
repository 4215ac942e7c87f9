"""``lynx inspect``."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from dataclasses import asdict
from importlib.resources import as_file, files
from inspect import signature
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lynx.adapter import Discovery, FoundLayer
from lynx.attachment import discover
from lynx.config import load_config
from lynx.errors import ConfigError, UnsupportedModelError, did_you_mean
from lynx.layers import MoESpec


def inspect_model(source: str, as_json: bool, config: Path | None = None) -> None:
    """Print the MoE layers of a model; exit with 1 if it could not be attached to."""
    layers = None if config is None else load_config(config).layers
    where, colon, name = source.rpartition(":")
    if source == "reference":
        with as_file(files("lynx.reference_model")) as folder:
            model = _without_weights(Path(folder))
    elif colon and name.isidentifier() and not Path(source).exists():
        model = _built(where, name)
    else:
        model = _without_weights(Path(source))
    found = discover(model, layers if isinstance(layers, MoESpec) else None)
    if as_json:
        print(json.dumps(_plain(found, model), indent=2))
    else:
        _print(found, model)
    refused = [layer for layer in found.layers if layer.refused]
    if refused:
        raise UnsupportedModelError(
            f"{len(refused)} of {len(found.layers)} layers cannot be taken: {refused[0].refused}"
        )


def _without_weights(path: Path) -> Any:
    """Build a model from its config on the meta device: structure without memory."""
    if not path.exists():
        raise ConfigError(
            f"{str(path)!r} does not exist; give a local folder with a config.json, that file, or `reference`."
        )
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"cannot read a model configuration from {str(path)!r}: {error}") from error
    causal = type(config) in AutoModelForCausalLM._model_mapping
    auto: Any = AutoModelForCausalLM if causal else AutoModel
    with torch.device("meta"):
        return auto.from_config(config).eval()


def _built(where: str, name: str) -> Any:
    """Call a function of one's own that makes a model: on the meta device, and for real if it cannot be made there."""
    import torch
    from torch import nn

    try:
        if where.endswith(".py"):
            found = importlib.util.spec_from_file_location(Path(where).stem, where)
            assert found is not None
            assert found.loader is not None
            module = importlib.util.module_from_spec(found)
            sys.modules[found.name] = module  # dataclasses look there
            found.loader.exec_module(module)
        else:
            if "" not in sys.path:
                sys.path.insert(0, "")
            module = importlib.import_module(where)
    except (ImportError, OSError, SyntaxError) as error:
        raise ConfigError(f"cannot import {where!r}: {error}") from error
    build = getattr(module, name, None)
    if not callable(build):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"{where!r} has no function {name!r}.{did_you_mean(name, known)}")
    if isinstance(build, nn.Module):
        return build
    if any(each.default is each.empty and each.kind not in (2, 4) for each in signature(build).parameters.values()):
        raise ConfigError(f"{name}() takes arguments; write a function without any that makes the model.")
    try:
        with torch.device("meta"):
            model = build()
    except (NotImplementedError, RuntimeError):  # it reads a value
        model = build()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name}() returned {type(model).__name__}; it needs to return a model.")
    return model.eval()


def _rule(layer: FoundLayer) -> str:
    rule = layer.info.rule
    words = [rule.score.replace("_", " ")]
    if rule.renormalise:
        words.append("renormalised")
    if rule.scale != 1.0:
        words.append(f"x {rule.scale:g}")
    return ", ".join(words) if rule.repick else "unknown: keep or lose only"


def _plain(found: Discovery, model: Any) -> dict[str, Any]:
    return {
        "model": type(model).__name__,
        "adapter": found.adapter.name,
        "experts": found.experts,
        "notes": list(found.notes),
        "layers": [
            {**asdict(layer.info), "notes": list(layer.notes), "refused": layer.refused} for layer in found.layers
        ],
    }


def _print(found: Discovery, model: Any) -> None:
    console = Console()
    count = len(found.layers)
    console.print(
        f"{type(model).__name__}: {count} MoE layers, taken by the {found.adapter.name} adapter", highlight=False
    )
    console.print(f"experts run by: {found.experts}", highlight=False)
    for note in found.notes:
        console.print(note, highlight=False)
    table = Table("layer")
    table.add_column("router", overflow="fold")  # whole: these names are keys for `layers`
    for column in ("E", "k", "MB per expert"):
        table.add_column(column, justify="right")
    table.add_column("weight rule")
    table.add_column("notes")
    for layer in found.layers:
        info = layer.info
        notes = f"REFUSED: {layer.refused}" if layer.refused else "; ".join(layer.notes)
        size = f"{info.expert_bytes / 1e6:.2f}"
        table.add_row(str(info.index), info.name, str(info.num_experts), str(info.top_k), size, _rule(layer), notes)
    console.print(table)
