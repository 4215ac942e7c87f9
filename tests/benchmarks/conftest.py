"""The benchmarks' modules in this process, their scripts in others, and results of toy runs."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
Run = Callable[..., subprocess.CompletedProcess[str]]

KERNELS = ["--device", "cpu", "--divide", "16", "--routing", "skewed", "--fractions", "0.5", "--rounds", "2"]
DECODE = ["--device", "cpu", "--divide", "8", "--batches", "4", "--rounds", "2", "--prompt", "4"]


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a script with some words; in this environment, or with some of it changed."""

    def run(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(FOLDER / script), *words]
        env = os.environ | {"NO_COLOR": "1", "COLUMNS": "200"} | environment
        return subprocess.run(command, capture_output=True, text=True, check=False, env=env)

    return run


@pytest.fixture(scope="session")
def toys(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with results of both scripts, on toy layers and a toy model."""
    folder = tmp_path_factory.mktemp("toys")
    shapes = ["--shapes", "OLMoE-1B-7B,gpt-oss-120b", "--tokens", "8"]
    made = [run("kernels.py", *KERNELS, *shapes, "--out", str(folder / "kernels_cpu.json"))]
    made += [run("decode.py", *DECODE, "--models", "Mixtral-8x7B", "--out", str(folder / "decode_cpu.json"))]
    assert [done.returncode for done in made] == [0, 0], "\n".join(done.stderr for done in made)
    return folder


@pytest.fixture
def read() -> Callable[[Path], dict[str, Any]]:
    return lambda path: json.loads(path.read_text(encoding="utf-8"))


class Modules:
    """The modules of the benchmarks by their names, imported when they are first asked for."""

    def __getattr__(self, name: str) -> ModuleType:
        return importlib.import_module(name)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Modules]:
    monkeypatch.setitem(sys.modules, "kernels", None)  # as `origin` does, so that it is put back
    monkeypatch.syspath_prepend(str(FOLDER))
    yield Modules()
    for path in FOLDER.glob("*.py"):
        if path.stem != "kernels":
            sys.modules.pop(path.stem, None)


class Clock:
    """A GPU whose work takes as long as it is told to."""

    def __init__(self) -> None:
        self.now, self.graph, self.waits = 0.0, None, 0

    def work(self, milliseconds: float) -> None:
        if self.graph is None:
            self.now += milliseconds
        else:
            self.graph.length += milliseconds

    def wait(self, device: Any = None) -> None:
        self.waits += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.now

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    class Graph:
        def __init__(self) -> None:
            self.length = 0.0

        def replay(self) -> None:
            clock.now += self.length

    class Capture:
        def __init__(self, graph: Graph, pool: Any) -> None:
            self.graph = graph

        def __enter__(self) -> None:
            clock.graph = self.graph

        def __exit__(self, *_: Any) -> None:
            clock.graph = None

    class Stream:
        def __init__(self, side: Any) -> None:
            pass

        __enter__ = __exit__ = lambda self, *_: None

    side = SimpleNamespace(wait_stream=lambda other: None)
    played = {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": Capture,
        "stream": Stream,
        "Stream": lambda: side,
        "current_stream": lambda: side,
        "synchronize": clock.wait,
        "empty_cache": lambda: None,
        "graph_pool_handle": object,
    }
    for name, value in played.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return clock
