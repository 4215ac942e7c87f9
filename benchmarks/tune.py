"""Find launch settings of the kernels on the card at hand, and write a file of `kernels/configs` with them.

Those are the experts' kernels and the stand-ins'.

For each kernel and each load in the present file, settings are varied one after another, from those of the present file
on, and the best stays: as long as anything gains a hundredth, twice round at most. `--search grid` tries every
combination instead, which takes hours, most of it compiling. All candidates of a step are timed beside each other (see
timing.py) on several layers' shapes under skewed routing, and compared by the geometric mean of their time relative to
the settings so far. The kernels compute the same under any settings.

A load is a number of tokens T (see lynx.kernels.tune). Lists that are not asked for, and those of float32 weights and
of `route`, are taken over as they are: from `--out` where it exists, else from the file of the card's generation. What
is shipped must also stay within the compile budget: run `make kernels` afterwards.

    python benchmarks/tune.py --out kernels/configs/cuda_90.json

Where a command may only take so long, the same one with `--minutes 8 --resume` is repeated: it leaves out the loads
that the file says were tuned, and goes on with one that was broken off.

`--dry-run`, with TRITON_INTERPRET=1 set, lists the candidates and goes through the whole loop in Triton's interpreter,
on a toy shape: what comes out is of no use, but that it comes out shows that the script works.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import typer
from config_file import ConfigFile
from layers import SHAPES, Layer, Shape, make_layer
from machine import Budget
from options import words
from origin import OTHER_CODE, code
from points import Point, Settings, points_of
from timing import Contender, copies_needed, measure, ratio

from lynx.kernels import tune
from lynx.routing import WeightRule

GAIN = 0.99
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256)
PRODUCT = {
    "block_n": (16, 32, 64, 128),
    "num_stages": (2, 3, 4, 5, 6),
    "programs_per_processor": (1, 2, 3, 4, 6),
    "block_k": (64, 128),
    "num_warps": (4, 8),
    "block_m": (16, 32, 64, 128),
}
GRID: dict[str, dict[str, tuple[int, ...]]] = {
    "gate_up": PRODUCT,
    "down": PRODUCT,
    "combine": {"block_h": (256, 512, 1024, 2048, 4096), "num_warps": (1, 2, 4, 8)},
    "plan": {"tile": (1024, 2048, 4096, 8192, 16384), "num_warps": (4, 8, 16)},
    "standin_inner": {"tile": (2048, 4096, 8192, 16384), "num_warps": (4, 8, 16)},
    "standin_outer": {"tile": (512, 1024, 2048, 4096), "num_warps": (1, 2, 4, 8)},
}
TOY = Shape("toy", "mixtral", 8, 2, 64, 32, WeightRule(), "num_local_experts", "intermediate_size", 1)


class Search:
    """The search on one device.

    Args:
        device: Where.
        rounds: Interleaved rounds of each comparison.
        budget: When to begin nothing more.
        few: Try two values per setting, once round.
    """

    def __init__(self, device: torch.device, rounds: int, budget: Budget, few: bool) -> None:
        self.device, self.rounds, self.budget, self.few = device, rounds, budget, few
        most = 2**18
        if device.type == "cuda":
            most = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 227 * 1024)
        self.shared_bytes: int = most

    def best(self, kernel: str, start: Settings, up_to: int, points: list[Point], thorough: bool) -> Settings:
        """Return the best settings found for a load."""
        best = start
        for _ in range(1 if self.few or thorough else 2):
            before = best
            for tried in self.chunks(kernel, up_to) if thorough else self.steps(kernel, up_to):
                new = [found for change in tried if (found := best | change) != best and self.fits(kernel, found)]
                if new and not self.budget.spent:
                    best = self.better(kernel, [best, *new], points)
            if best == before:
                break
        return best

    def steps(self, kernel: str, up_to: int) -> Iterator[list[Settings]]:
        """List the values of one setting after another."""
        for name, values in GRID[kernel].items():
            # a tile that is lower than its load reads weights twice, one that is far higher computes for nothing
            low, high = (min(up_to, 64), max(16, 2 * up_to)) if name == "block_m" else (0, max(values))
            allowed = [value for value in values if low <= value <= high]
            yield [{name: value} for value in (allowed[:2] if self.few else allowed)]

    def grid(self, kernel: str, up_to: int) -> Iterator[Settings]:
        """List all combinations."""
        for values in itertools.product(*self.steps(kernel, up_to)):
            yield {name: value for setting in values for name, value in setting.items()}

    def chunks(self, kernel: str, up_to: int) -> Iterator[list[Settings]]:
        """List all combinations, a few at a time."""
        every = iter(self.grid(kernel, up_to))
        while some := list(itertools.islice(every, 16)):
            yield some

    def fits(self, kernel: str, chosen: Settings) -> bool:
        """Whether the tiles under way fit a multiprocessor's shared memory; what does not is not worth compiling."""
        if kernel not in ("gate_up", "down"):
            return True
        width = chosen["block_n"] * (2 if kernel == "gate_up" else 1)
        tiles = (chosen["block_m"] + width) * chosen["block_k"] * 2
        return (chosen["num_stages"] - 1) * tiles <= self.shared_bytes

    def better(self, kernel: str, tried: list[Settings], points: list[Point]) -> Settings:
        """Compare settings on all points; the first stays unless another gains enough."""
        logs = [0.0] * len(tried)
        for point in points:
            contenders = [self._contender(str(place), point, kernel, chosen) for place, chosen in enumerate(tried)]
            measure(contenders, len(point.layers), self.rounds, self.device)
            for place, contender in enumerate(contenders):
                relative = ratio(contender, contenders[0]) if not contender.refused else None
                logs[place] += math.log(relative["median"]) if relative else math.inf
        scores = [math.exp(value / len(points)) for value in logs]
        place = min(range(len(tried)), key=lambda place: scores[place])
        chosen = tried[place] if scores[place] < GAIN else tried[0]
        changes = [", ".join(f"{k}={v}" for k, v in one.items() if v != tried[0][k]) for one in tried]
        seen = "; ".join(f"{words or 'so far'} {score:.3f}" for words, score in zip(changes, scores, strict=True))
        print(f"{kernel}, T={points[0].T}: {seen}", flush=True)
        return chosen

    def _contender(self, name: str, point: Point, kernel: str, chosen: Settings) -> Contender:
        return Contender(name, lambda copy: point.calls[kernel](copy, chosen))


def _device(dry_run: bool) -> torch.device:
    """Say where to run; under a dry run Triton's interpreter, which must be chosen before triton is imported."""
    if not dry_run:
        if not torch.cuda.is_available():
            raise typer.BadParameter("there is no GPU here; --dry-run shows what would be done.")
        return torch.device("cuda")
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise typer.BadParameter("triton is imported already; set TRITON_INTERPRET=1 for a dry run.")
    if importlib.util.find_spec("triton") is None:
        raise typer.BadParameter("a dry run needs triton.")
    os.environ["TRITON_INTERPRET"] = "1"
    return torch.device("cpu")


def _layers(shape: Shape, device: torch.device) -> list[Layer]:
    expert_bytes = 6 * shape.H * shape.I
    copies = copies_needed(device, shape.E * expert_bytes, shape.k * expert_bytes) if device.type == "cuda" else 1
    return [make_layer(shape, device, torch.bfloat16, seed) for seed in range(copies)]


def _list_candidates(finder: Search, kernels: list[str], lists: dict[str, list[Settings]]) -> None:
    for kernel in kernels:
        for row in lists[kernel]:
            fitting = sum(finder.fits(kernel, row | found) for found in finder.grid(kernel, row["up_to"]))
            steps = sum(len(step) for step in finder.steps(kernel, row["up_to"]))
            print(f"{kernel}, load up to {row['up_to']}: {fitting} combinations fit, {steps} values step by step")


@torch.no_grad()
def main(
    shapes: str = typer.Option(
        "Qwen3-30B-A3B,OLMoE-1B-7B,Mixtral-8x7B,gpt-oss-120b", help="Names with commas between them."
    ),
    kernels: str = typer.Option("gate_up,down,combine,plan,standin_inner,standin_outer", help="What to tune."),
    loads: str = typer.Option("", help="Which loads, by their `up_to`; all where empty."),
    search: str = typer.Option("steps", help="steps: one setting after another; grid: all combinations."),
    rounds: int = typer.Option(9, min=1, help="Interleaved rounds of each comparison."),
    points: int = typer.Option(1, min=1, help="Numbers of tokens per shape and load."),
    minutes: float = typer.Option(0.0, min=0.0, help="Try nothing more after this long; 0: no limit."),
    resume: bool = typer.Option(False, "--resume", help="Leave out the loads that the file says were tuned."),
    other_code: bool = OTHER_CODE,
    out: Path = typer.Option(
        Path("tuned.json"), help="The file; the start where it exists, and written after every load."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="List candidates, and run on a toy in the interpreter."),
) -> None:
    """Tune the launch settings of the experts' and the stand-ins' kernels."""
    budget, wanted, names = Budget(minutes), words(kernels, GRID, "kernel"), words(shapes, SHAPES, "shape")
    thorough = words(search, ("steps", "grid"), "search") == ["grid"]
    code(other_code, (".py",))  # the launch settings are what this changes
    device = _device(dry_run)
    file = ConfigFile(out, tune.generation_of(device), device)
    tuned = file.tuned if resume else set()
    finder = Search(device, 1 if dry_run else rounds, budget, few=dry_run)
    if dry_run:
        _list_candidates(Search(device, rounds, budget, few=False), wanted, file.lists)
    chosen, tokens = ([TOY], TOKENS[:2]) if dry_run else ([SHAPES[name] for name in names], TOKENS)
    all_points = [Point(layers, T) for shape in chosen for layers in [_layers(shape, device)] for T in tokens]
    for kernel in wanted:
        ends = [0, *(row["up_to"] for row in file.lists[kernel])]
        for above, row in zip(ends, file.lists[kernel], strict=False):
            up_to = row["up_to"]
            if (loads and str(up_to) not in loads.split(",")) or (kernel, up_to) in tuned:
                continue
            here = points_of(all_points, above, up_to, points)
            if not here or budget.spent:
                print(f"{kernel}, load up to {up_to}: {'no time left' if here else 'no batch has it'}; left as it is")
                continue
            start = {name: value for name, value in row.items() if name != "up_to"}
            found = finder.best(kernel, start, up_to, here, thorough)
            file.settle(kernel, row, found, whole=not budget.spent)
    print(f"Written: {out}" if file.now else "Nothing was tuned.")


if __name__ == "__main__":
    typer.run(main)
