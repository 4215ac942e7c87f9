"""``lynx doctor``."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

import lynx

_PACKAGES = ("torch", "transformers", "triton", "vllm", "pluggy", "pydantic", "structlog", "hypothesis", "matplotlib")
_DTYPES = ("bfloat16", "float16", "float32")


def examine(as_json: bool, markdown: bool, vllm: str | None = None) -> None:
    """Print what this installation has and can do; or what Lynx takes of a model that vLLM starts."""
    if vllm is None:
        facts = collect()
    else:
        from lynx.cli.vllm import examine_engine

        facts = examine_engine(vllm)
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

    from lynx.plugins import registry

    found = registry()
    devices = {"cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    paths = {"LYNX_KERNELS": os.environ.get("LYNX_KERNELS") or "not set: auto"}
    for device in devices:
        paths |= _experts_paths(device)
        paths |= _selection_path(device)
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


def _experts_paths(device: str) -> dict[str, str]:
    """Say what runs experts on a device at decode, and why the other backends do not."""
    import torch

    from lynx.kernels import Backend, ExpertWeights, choose_backend, why_not
    from lynx.kernels.backends import BACKENDS, try_kernels

    rows: dict[str, str] = {}
    others: dict[Backend, dict[str, list[str]]] = {name: {} for name in BACKENDS}  # the dtypes by reason
    for dtype in _DTYPES:
        weight = torch.zeros(1, 16, 16, dtype=getattr(torch, dtype), device=device)
        experts = ExpertWeights(weight, weight, torch.relu)
        title, taken = f"experts on {device}, {dtype}", None
        try:
            taken = choose_backend(experts)
            if taken.backend == "triton" and try_kernels(weight.device):
                taken = choose_backend(experts)  # another one, as it is known now
            rows[title] = f"{taken.backend}: {taken.reason}"
        except ValueError as error:
            taken, rows[title] = None, f"REFUSED: {error}"
        for name in BACKENDS:
            if taken is None or name != taken.backend:
                reason = why_not(name, experts) or f"it can run; LYNX_KERNELS={name} asks for it"
                others[name].setdefault(reason, []).append(dtype)
    for name, reasons in others.items():
        for reason, dtypes in reasons.items():
            some = f", {', '.join(dtypes)}" if len(dtypes) < len(_DTYPES) else ""
            rows[f"not taken on {device}{some}: {name}"] = reason
    return rows


def _selection_path(device: str) -> dict[str, str]:
    """Say what runs selection on a device, at a layer of common size."""
    import torch

    from lynx.fusion import FusedRoute
    from lynx.kernels.backends import requested, try_kernels
    from lynx.kernels.route import RouteRule, RouteSettings

    title = f"selection on {device}"
    try:
        asked = requested()
    except ValueError as error:
        return {title: f"REFUSED: {error}"}
    if asked not in ("auto", "triton"):
        return {title: f"torch: LYNX_KERNELS={asked}"}
    reason = FusedRoute(RouteRule(), RouteSettings(), 64, 8).place(torch.device(device))
    reason = reason or try_kernels(torch.device(device))
    return {title: f"torch: {reason}" if reason else "triton: one launch per layer"}


def _version(package: str) -> Any:
    try:
        return version(package)
    except PackageNotFoundError:
        if package != "triton":
            return "not installed"
    try:
        # ROCm builds of torch bring it under another distribution's name
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__
