"""Time one MoE layer: Lynx's selection and experts beside transformers' experts and the bandwidth floor.

Shapes are those of known models, weights and routing are random (see layers.py), and how times are taken is said in
timing.py. On a GPU everything is bfloat16 and replayed from CUDA graphs; on a CPU it is float32, on one thread, with H
and I scaled down. For each shape, kind of routing and number of tokens T, these are timed beside each other:

    layer       Lynx's whole layer: from the router's decision to the layer's output
    route       Lynx's selection alone: demand, budget, re-routing, weights, counters
    experts     Lynx's experts alone, on the ids, weights and plan that selection made
    standins    stand-ins of rank 8 for the slots that lost their expert: new weights, counting, and what they answer,
                added to an output; no part of `layer`
    grouped_mm  torch's grouped_mm as transformers calls it, on the same ids and weights
    batched_mm  transformers' batched_mm, likewise
    vllm_fused  vLLM's fused experts, likewise, where vllm is installed

at the batch's own active set (fraction 1) and at 3/4, 1/2 and 1/4 of it, kept by the strategy `top-budget` with nothing
protected: so the active set is exactly that, for the sake of time; it is no setting to use. Peers get the ids and
weights that Lynx's selection made: what they do is cheaper for it too.

The floor is the bytes of the active experts by the copy bandwidth of the same run, which counts bytes read and written.

    python benchmarks/kernels.py --out kernels.json

Where a command may only take so long, the same one with `--minutes 8 --resume` is repeated until nothing is missing.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from cases import OURS, run_case
from layers import SHAPES, Layer, Shape, make_layer
from machine import Budget, bandwidth, free_memory, hardware, pin_one_thread, versions
from options import counts, words
from options import fractions as parts_of
from origin import OTHER_CODE, code, commit
from peers import PEERS, attempt
from record import Record, Row
from rich.console import Console
from rich.table import Table
from targets import reached
from timing import copies_needed


def make_layers(shape: Shape, device: torch.device, least: float) -> list[Layer]:
    """Build as many copies of a layer as `timing` asks for; the least that a call reads is that part of k experts."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    expert_bytes = 3 * shape.H * shape.I * dtype.itemsize
    copies = copies_needed(device, shape.E * expert_bytes, max(1, round(least * shape.k)) * expert_bytes)
    return [make_layer(shape, device, dtype, seed) for seed in range(copies)]


def time_shape(
    record: Record,
    shape: Shape,
    cases: list[tuple[Any, int]],
    fractions: list[float],
    budget: Budget,
    place: torch.device,
) -> None:
    """Time a shape's cases, kinds of routing and T, on copies that are made once and gone when this returns."""
    free_memory(place)
    speed = bandwidth(place)
    free_memory(place)
    layers, why_not = attempt(partial(make_layers, shape, place, min(fractions)))
    for kind, T in cases:
        if budget.spent:
            return
        rounds, reason = record.result["rounds"], why_not
        if not reason:
            rows, reason = attempt(partial(run_case, layers, kind, T, fractions, rounds, speed))
            record.put(rows or [])
            reason = reason or next((row["contenders"]["layer"]["refused"] for row in rows if not row["timed"]), "")
        if reason:
            record.fail(f"{shape.name}, {kind}, T={T}", reason)
        judge(record)
        record.save()
        if sys.stderr.isatty():
            print(f"{shape.name}, {kind}, T={T}", file=sys.stderr)


def judge(record: Record) -> None:
    """Hold all rows to the targets, which are for a GPU."""
    record.result["targets"] = reached(record.rows) if record.result["device"] == "cuda" else []


def show(result: dict[str, Any]) -> None:
    """Print a table for each shape and routing, what was reached and what is missing."""
    console = Console(width=160, highlight=False)
    for shape, kind in dict.fromkeys((row["shape"], row["routing"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["shape"], row["routing"]) == (shape, kind)]
        console.print(_table(rows, f"{shape}, {kind}, microseconds"))
    for target in result.get("targets", []):
        console.print(f"{target['name']}: {target['reached']} of {target['rows']} rows, worst {target['worst']}")


def _table(rows: list[Row], title: str) -> Table:
    table = Table("T", title=title, title_justify="left")
    names = (*OURS, *(name for name in PEERS if any("us" in row["contenders"][name] for row in rows)))
    for column in ("active", "floor", *names, "layer/floor", "layer/full", "layer/best peer"):
        table.add_column(column, justify="right")
    for row in rows:
        times = [row["contenders"][name].get("us") for name in names]
        ratios = [row[name] for name in ("layer_by_floor", "layer_by_full", "layer_by_best_peer")]
        cells = [str(row["T"]), f"{row['active']:.1f} of {row['active_before']:.1f}", f"{row['floor_us']:.1f}"]
        cells += [f"{us['median']:.1f}" if us else "-" for us in times]
        table.add_row(*cells, *(f"{values['median']:.2f}" if values else "-" for values in ratios))
    return table


@torch.no_grad()
def main(
    device: str = typer.Option("auto", help="cuda, cpu, or auto: cuda where there is one."),
    shapes: str = typer.Option("", help="Names with commas between them; all where empty."),
    tokens: str = typer.Option("1,4,8,16,32,64,128,256", help="Numbers of tokens T."),
    fractions: str = typer.Option("1,0.75,0.5,0.25", help="Parts of the active set to keep; 1 is always timed."),
    routing: str = typer.Option("skewed,uniform", help="Kinds of routing."),
    rounds: int = typer.Option(0, min=0, help="Interleaved rounds; 0: 30 on a GPU, 7 on a CPU."),
    divide: int = typer.Option(0, min=0, help="What H and I are divided by; 0: 1 on a GPU, the shape's own on a CPU."),
    minutes: float = typer.Option(0.0, min=0.0, help="Begin nothing more after this long; 0: no limit."),
    resume: bool = typer.Option(False, "--resume", help="Go on with the file, if it is there: keep what was timed."),
    other_code: bool = OTHER_CODE,
    out: Path = typer.Option(Path("kernels.json"), help="Where the figures go, as JSON, after every case."),
) -> None:
    """Time a layer under selection, beside its peers and the bandwidth floor."""
    place = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = place.type == "cuda"
    parts = list(dict.fromkeys([1.0, *parts_of(fractions, "fractions")]))
    chosen = [SHAPES[name] for name in words(shapes, SHAPES, "shape")]
    chosen = [shape.divided(divide or (1 if on_gpu else shape.divisor)) for shape in chosen]
    kinds, sizes = words(routing, ("skewed", "uniform"), "routing"), counts(tokens, "tokens")
    if not on_gpu:
        pin_one_thread()
    origin = code(other_code)
    head = {
        "benchmark": "kernels",
        "commit": commit(),
        "lynx_files": origin["lynx_files"],
        "versions": versions(),
        "device": place.type,
        "LYNX_KERNELS": os.environ.get("LYNX_KERNELS", "auto"),
        "dtype": "bfloat16" if on_gpu else "float32",
        "rounds": rounds or (30 if on_gpu else 7),
    }
    asked: dict[str, list[Any]] = {
        "shape": [shape.name for shape in chosen],
        "routing": kinds,
        "T": sizes,
        "fraction": parts,
    }
    record = Record(out, head, {"lynx": origin["lynx"], "hardware": hardware(place)}, [asked], resume)
    judge(record)
    budget = Budget(minutes)
    for shape in chosen:
        cases = list(dict.fromkeys((kind, T) for name, kind, T, _ in record.left if name == shape.name))
        if cases and not budget.spent:
            time_shape(record, shape, cases, parts, budget, place)
    if record.rows:
        show(record.result)
    record.finish()


if __name__ == "__main__":
    typer.run(main)
