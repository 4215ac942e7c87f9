"""What a benchmark ran on: hardware, versions, memory bandwidth; and how long it may."""

from __future__ import annotations

import gc
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from origin import installed

import lynx

GB = 1e9


def pin_one_thread() -> None:
    """Keep this process on one core and torch on one thread."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "q1": low, "q3": high}


def versions() -> dict[str, str]:
    """Versions of what a figure depends on; what is not installed is left out."""
    found = {"lynx": lynx.__version__, "python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    others = {name: installed(name) for name in ("triton", "transformers", "vllm")}
    return found | {name: number for name, number in others.items() if number}


def hardware(device: torch.device) -> dict[str, Any]:
    """Say what this runs on."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    found: dict[str, Any] = {
        "cpu": names[0] if names else platform.machine(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": card.name,
            "capability": f"{card.major}.{card.minor}",
            "memory_gib": round(card.total_memory / 2**30, 1),
            "multiprocessors": card.multi_processor_count,
            "l2_mb": round(cache_bytes(device) / 1e6, 1),
            "driver": _driver(),
        }
    return found


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory; 32 MB where nothing tells."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 2**25
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text().strip().rstrip("K")) * 1024 for path in sizes), default=2**25)


def bandwidth(device: torch.device) -> dict[str, float]:
    """Measure memory bandwidth in GB/s: medians over repeats of one copy and of one sum.

    `copy` counts what a copy reads and what it writes: a copy of n bytes is 2n bytes. A CPU may read the lines that it
    is about to write, which is not counted. `read` counts the bytes that a float32 sum reads: it writes none.
    """
    size = 2**31 if device.type == "cuda" else 2**28
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    repeats = 20 if device.type == "cuda" else 7
    copied = statistics.median(_seconds(partial(target.copy_, source), device, repeats))
    read = statistics.median(_seconds(source.sum, device, repeats))
    return {"copy": 2 * source.nbytes / copied / GB, "read": source.nbytes / read / GB}


def free_memory(device: torch.device) -> None:
    """Give memory that nothing refers to any more back, where an allocator or a cycle would keep it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Budget:
    """A limit on the time that a script takes.

    Args:
        minutes: 0 for no limit.
    """

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes if minutes > 0 else float("inf")

    @property
    def spent(self) -> bool:
        """Whether nothing more should be begun."""
        return time.monotonic() >= self._end


def _seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Time some work: by events on a GPU, by the thread's CPU time elsewhere."""
    work()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.thread_time()
            work()
            times.append(time.thread_time() - start)
        return times
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.split("\n")[0].strip() or "unknown"
