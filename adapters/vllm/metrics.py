"""Counters for Prometheus: what selection did, on vLLM's own `/metrics`.

Layers live in worker processes, and `/metrics` in another one. prometheus_client joins them by a folder that the
environment variable `PROMETHEUS_MULTIPROC_DIR` names for all of them; without it there is nothing to show.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any

from lynx.adapters.vllm.runner import runner_class
from lynx.handle import Handle

SECONDS = 10.0  # counters are read this often: each time waits for the device once
_MARK = "_lynx_metrics"
_NAMES = {
    "steps": "batches with rows in this phase",
    "active_before": "distinct experts, mean per step, as the model routed",
    "active_after": "the same after selection",
    "open_rows": "tokens that selection may re-route",
    "rows_changed": "tokens that lost at least one expert",
    "kept_mass_mean": "share of a token's own weight that was kept, mean over open tokens",
    "kept_mass_worst": "the worst token's share",
}


class Exporter:
    """Writes a handle's report to gauges named `lynx_...`, with the labels layer and phase.

    Args:
        handle: Whose report.
        seconds: How long to wait between two readings.
        clock: What tells the time.
    """

    def __init__(self, handle: Handle, seconds: float = SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._handle, self._seconds, self._clock, self._last = handle, seconds, clock, clock()
        self._gauges = _gauges()

    def step(self) -> None:
        """Write, if it is time; called once per step."""
        if self._clock() - self._last >= self._seconds:
            self.write()

    def write(self) -> None:
        """Read the counters and set the gauges."""
        with _waiting_allowed():
            report = self._handle.report()
        for layer in report.layers:
            for phase, figures in layer.phases.items():
                for name, gauge in self._gauges.items():
                    value = getattr(figures, name)
                    if value is not None:
                        gauge.labels(layer.name, phase).set(value)
        self._last = self._clock()


def _waiting_allowed() -> AbstractContextManager[None]:
    """What vLLM wants around a wait for the device, where it looks for those (`VLLM_GPU_SYNC_CHECK`)."""
    try:
        from vllm.utils.gpu_sync_debug import gpu_sync_allowed
    except ImportError:
        return nullcontext()
    allowed: AbstractContextManager[None] = gpu_sync_allowed()
    return allowed


@cache
def _gauges() -> dict[str, Any]:
    """The gauges, made once in a process."""
    from prometheus_client import Gauge

    # ranks of tensor parallelism count the same: one of them is shown
    return {
        name: Gauge(f"lynx_{name}", words, ["layer", "phase"], multiprocess_mode="livemax")
        for name, words in _NAMES.items()
    }


def export(handle: Handle, engine: Any) -> str:
    """Export a handle's report from now on; return why not, in a few words, or nothing."""
    if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        return "set PROMETHEUS_MULTIPROC_DIR to an empty folder to have them on /metrics"
    runner = runner_class(engine)
    if not hasattr(runner.execute_model, _MARK):
        runner.execute_model = _then_export(runner.execute_model)
    _exporters[:] = [Exporter(handle)]  # of the model that was loaded last
    return ""


_exporters: list[Exporter] = []


def _then_export(execute: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(execute)
    def execute_model(*args: Any, **kwargs: Any) -> Any:
        done = execute(*args, **kwargs)
        for exporter in _exporters:
            exporter.step()
        return done

    setattr(execute_model, _MARK, True)
    return execute_model
