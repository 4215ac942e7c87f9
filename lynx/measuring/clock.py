"""How long a decode step takes, and each MoE layer in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lynx.errors import ConfigError

Clock = Literal["wall", "thread"]


@dataclass(frozen=True, slots=True)
class StepTime:
    """One decode step.

    Attributes:
        step: Seconds from giving the model its tokens to its logits.
        layers: Seconds in each MoE block.
        host: Share of `step` after which the host had issued all work; None on a CPU, where there is no waiting.
        own: Share of `step` in which the thread had its core; None on a GPU and with more threads than one.
    """

    step: float
    layers: tuple[float, ...]
    host: float | None = None
    own: float | None = None


@dataclass(slots=True)
class Mark:
    """Forward hook of a block, before it or behind it: notes the time, on a GPU by an event that nobody waits for.

    Attributes:
        marks: Where times go.
        now: What notes the time.
    """

    marks: list[Any]
    now: Callable[[], Any]

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Note the time."""
        self.marks.append(self.now())


class StepClock:
    """Times steps of a model while it is entered as a context.

    The time of an MoE layer is that of its block, the router's parent module: the router, what Lynx does behind it,
    the experts, and whatever else the block holds, such as shared experts. Where attention stands in the same module,
    it is the time from the router to the experts. Work on a GPU is timed by events. A call of
    a block costs two of them, a few microseconds of the host's.

    Args:
        model: On its device.
        routers: Module paths of the routers.
        clock: On a CPU, ``wall`` for the time that goes by, or ``thread`` for the time that the one thread has its
            core, which leaves out what else the machine does.

    Raises:
        ConfigError: The model is on a device that is not timed, or there is more than one thread to time.
    """

    def __init__(self, model: Any, routers: Sequence[str], clock: Clock = "wall") -> None:
        self._device = next(model.parameters()).device
        if self._device.type not in ("cpu", "cuda"):
            raise ConfigError(f"steps are timed on a CPU or a CUDA GPU; the model is on {str(self._device)!r}.")
        self._on_gpu = self._device.type == "cuda"
        if clock == "thread" and (self._on_gpu or torch.get_num_threads() > 1):
            raise ConfigError(
                "the clock `thread` times one thread of a CPU: take the device cpu and OMP_NUM_THREADS=1, or `wall`."
            )
        self._now = event if self._on_gpu else time.thread_time if clock == "thread" else time.perf_counter
        self.spans = tuple(span_of(model, router) for router in routers)
        self._marks: list[list[Any]] = [[] for _ in routers]
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> StepClock:
        for span, marks in zip(self.spans, self._marks, strict=True):
            self._hooks.append(span.first.register_forward_pre_hook(Mark(marks, self._now), prepend=True))
            self._hooks.append(span.last.register_forward_hook(Mark(marks, self._now)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def time(self, step: Callable[[], Any]) -> StepTime:
        """Run a step once, on a GPU after it has run dry."""
        for marks in self._marks:
            marks.clear()
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        start, began, had = self._now(), time.perf_counter(), time.thread_time()
        step()
        issued, own, end = time.perf_counter() - began, time.thread_time() - had, self._now()
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        whole = seconds(start, end)
        layers = tuple(
            sum(seconds(one, other) for one, other in zip(marks[::2], marks[1::2], strict=True))
            for marks in self._marks
        )
        if self._on_gpu:
            return StepTime(whole, layers, host=min(issued / whole, 1.0))
        return StepTime(whole, layers, own=min(own / issued, 1.0) if torch.get_num_threads() == 1 else None)

    def contents(self) -> str:
        """Say in words what the time of a layer is of."""
        return "; ".join(dict.fromkeys(span.words for span in self.spans))


@dataclass(frozen=True, slots=True)
class Span:
    """From where to where an MoE layer is timed.

    Attributes:
        first: The module that it begins with.
        last: The module that it ends with, the same for a block.
        words: What lies between.
    """

    first: nn.Module
    last: nn.Module
    words: str


def span_of(model: nn.Module, router: str) -> Span:
    """Find what to time around a router.

    Args:
        model: The model.
        router: Module path of the router, or of the block where it is the block that decides.
    """
    own, block = model.get_submodule(router), model.get_submodule(router.rpartition(".")[0])
    experts = getattr(block, "experts", None)
    if 2 * _size(own) > _size(block):  # a router is small beside its experts
        block = own
    elif isinstance(experts, nn.Module) and any(
        "attn" in name or "attention" in name for name, _ in block.named_children()
    ):
        return Span(own, experts, f"{type(own).__name__} to {type(experts).__name__}")
    inside = ", ".join(name for name, _ in block.named_children()) or "no modules"
    return Span(block, block, f"{type(block).__name__} ({inside})")


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def event() -> Any:
    """Note the time on a GPU: an event on the current stream."""
    noted = torch.cuda.Event(enable_timing=True)
    noted.record()
    return noted


def seconds(start: Any, end: Any) -> float:
    """Seconds between two notes of the time; between events once the GPU has gone past both."""
    return float(end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3)
