"""``lynx doctor``."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

import lynx

_PACKAGES = ("torch", "transformers", "triton", "vllm", "pluggy", "pydantic", "structlog", "hypothesis", "matplotlib")


def examine(as_json: bool, markdown: bool) -> None:
    """Print what this installation has and can do."""
    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=2))
    elif markdown:
        for title, rows in facts.items():
            print(f"### {title}\n\n| | |\n|---|---|")
            for name, value in rows.items():
                print(f"| {name} | {value} |")
            print()
    else:
        console = Console()
        for title, rows in facts.items():
            table = Table(title=title, title_justify="left", show_header=False)
            for name, value in rows.items():
                table.add_row(name, value)
            console.print(table)


def collect() -> dict[str, dict[str, str]]:
    """Return everything as titled rows of text."""
    import torch

    from lynx.kernels.experts import ExpertWeights, choose_backend
    from lynx.plugins import registry

    found = registry()
    devices = {"cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    paths = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.zeros(1, 16, 16, dtype=dtype, device=device)
            backend, reason = choose_backend(ExpertWeights(weight, weight, torch.relu))
            paths[f"experts on {device}, {str(dtype).removeprefix('torch.')}"] = f"{backend}: {reason}"
    paths["selection"] = "torch"
    plugins = dict(found.plugins)
    plugins |= {f"{b.entry_point} ({b.package})": f"BROKEN: {b.reason}" for b in found.broken}
    return {
        "versions": {
            "lynx-moe": lynx.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "devices": devices,
        "execution paths": paths,
        "plugins": plugins,
        "strategies": {name: each.package for name, each in sorted(found.strategies.items())},
        "adapters": {adapter.name: package for adapter, package in found.adapters},
    }


def _version(package: str) -> Any:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
