"""Time contenders beside each other: interleaved rounds, on a GPU by replaying CUDA graphs, on a CPU by thread time.

A decode step goes through layer after layer and finds none of a layer's experts in the GPU's L2 cache: between two uses
of them lie all other layers. So a contender does not run over one layer again and again. It goes round over copies of
the layer, each with weights and routing of its own, so many that a round reads several times what the cache holds.
One graph holds whole rounds, one call behind the other as in a model, and the time of a call is that of the graph by
the number of calls in it, so that the gap between two replays counts for little. Graphs of all contenders are replayed
in turn, each between two events. What cannot be captured is launched call by call instead, after the GPU has run dry:
else its launches would hide behind the work before it. On a CPU a round is one call on one copy, the same copy for all
contenders.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from machine import cache_bytes, free_memory, quartiles

GRAPH_SECONDS = 2e-3  # a replay takes at least this long
MOST_CALLS = 256  # in a graph
ROOM = 0.6  # of a GPU's free memory, for copies of a layer
SLOW = 4.0  # a peer this much slower than the first contender is left out after two rounds


@dataclass(eq=False, slots=True)
class Contender:
    """One way of doing the work, and its times.

    Attributes:
        name: What it is called in the results.
        call: Does the work on the copy of that number.
        peer: Whether it may be dropped for being slow.
        refused: Why it does not run here; empty if it does.
        how: How it was timed: "graph", "launches", with the reason (a GPU, but it cannot be captured) or "thread".
        rounds: Seconds per call, by round.
    """

    name: str
    call: Callable[[int], Any]
    peer: bool = False
    refused: str = ""
    how: str = ""
    rounds: list[float] = field(default_factory=list)
    _replay: Callable[[], Any] | None = None
    _calls: int = 1

    def figures(self) -> dict[str, Any]:
        """What goes into the results."""
        if not self.rounds:
            return {"refused": self.refused}
        times = {"us": quartiles([1e6 * seconds for seconds in self.rounds]), "how": self.how}
        return times | {"rounds": len(self.rounds)} | ({"refused": self.refused} if self.refused else {})


def ratio(ours: Contender, theirs: Contender) -> dict[str, float] | None:
    """Divide round by round, so that what disturbs a round disturbs both; None where one of them has no times."""
    pairs = [one / other for one, other in zip(ours.rounds, theirs.rounds, strict=False)]
    return quartiles(pairs) if pairs else None


def copies_needed(device: torch.device, layer_bytes: int, least_bytes: int) -> int:
    """How many copies of a layer to go round over: 4 times the last cache, 2 to 8, in `ROOM` of the free memory.

    Args:
        device: Where they lie.
        layer_bytes: All weights of a layer.
        least_bytes: The least that any call reads of them.

    Raises:
        MemoryError: Not even two fit.
    """
    wanted = min(8, max(2, -(-4 * cache_bytes(device) // least_bytes)))
    if device.type != "cuda":
        return wanted
    fit = int(ROOM * torch.cuda.mem_get_info(device)[0]) // layer_bytes
    if fit < 2:
        raise MemoryError(f"two copies of {layer_bytes / 1e9:.1f} GB do not fit")
    return min(wanted, fit)


def measure(contenders: list[Contender], copies: int, rounds: int, device: torch.device) -> None:
    """Time all contenders that are not refused; the first is what peers are dropped against."""
    with _made_ready(contenders, copies, device):
        for turn in range(rounds + 1):  # the first warms up
            running = [contender for contender in contenders if not contender.refused]
            shift = turn % max(len(running), 1)
            seconds = _round(running[shift:] + running[:shift], turn % copies, device)
            for contender in running if turn else ():
                contender.rounds.append(seconds[contender.name])
            if turn in (0, 2):
                _drop_slow(running, seconds, SLOW if turn else 2 * SLOW)


def _drop_slow(running: list[Contender], seconds: dict[str, float], most: float) -> None:
    for contender in running[1:]:
        times = seconds[contender.name] / seconds[running[0].name]
        if contender.peer and times > most:
            contender.refused = f"left out for being slow ({times:.0f} times, after {len(contender.rounds)} rounds)"


def _round(contenders: list[Contender], copy: int, device: torch.device) -> dict[str, float]:
    """Run each once; seconds per call by name."""
    if device.type != "cuda":
        times = {}
        for contender in contenders:
            start = time.thread_time()
            contender.call(copy)
            times[contender.name] = time.thread_time() - start
        return times
    spans = []
    for contender in contenders:
        assert contender._replay is not None
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if contender.how != "graph":
            torch.cuda.synchronize(device)
        before.record()
        contender._replay()
        after.record()
        spans.append((contender, before, after))
    torch.cuda.synchronize(device)
    return {one.name: before.elapsed_time(after) / 1e3 / one._calls for one, before, after in spans}


@contextmanager
def _made_ready(contenders: list[Contender], copies: int, device: torch.device) -> Iterator[None]:
    """Capture the graphs, and let go of them and their memory at the end."""
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    for contender in contenders:
        if contender.refused:
            continue
        if pool is None:
            contender.how = "thread"
        elif not _capture(contender, copies, pool):  # a capture that was broken off may leave its pool unusable
            pool = torch.cuda.graph_pool_handle()
    try:
        yield
    finally:
        for contender in contenders:
            contender._replay = None
        free_memory(device)


def _capture(contender: Contender, copies: int, pool: Any) -> bool:
    """Make the contender's graph, and say whether that went well; one that cannot be captured is launched as it is.

    All graphs share a pool: none needs what another left, as only the time of a replay is looked at.
    """

    def one_round() -> None:
        for copy in range(copies):
            contender.call(copy)

    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            one_round()
            one_round()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
    except Exception as error:  # out of memory, what a kernel refuses, what a compiler cannot do
        contender.refused = _first_line(error)
        free_memory(torch.device("cuda"))
        return True
    try:
        graph = _graph(one_round, 1, pool)
        repeats = _repeats(graph.replay, copies)
        if repeats > 1:
            graph = _graph(one_round, repeats, pool)
        contender._replay, contender.how, captured = graph.replay, "graph", True
    except RuntimeError as error:
        torch.cuda.synchronize()
        repeats = _repeats(one_round, copies)

        def launch() -> None:
            for _ in range(repeats):
                one_round()

        contender._replay, contender.how = launch, f"launches; capturing failed: {_first_line(error)}"
        captured = False
    contender._calls = repeats * copies
    return captured


def _graph(work: Callable[[], None], repeats: int, pool: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for _ in range(repeats):
            work()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _repeats(work: Callable[[], Any], calls: int) -> int:
    """How often to repeat work of so many calls, so that it takes long enough to be timed."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(3):
        work()
    end.record()
    torch.cuda.synchronize()
    seconds = max(start.elapsed_time(end) / 3e3, 1e-6)
    return max(1, min(int(GRAPH_SECONDS / seconds) + 1, MOST_CALLS // calls))


def _first_line(error: BaseException) -> str:
    """Say what went wrong first: a capture that is broken off raises once more when it ends."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:200]
