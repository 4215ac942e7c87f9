"""Time a decode step of whole models in transformers: stock as fast as the modes tried make it, and Lynx attached.

The models have random weights (sizes in models.py) and a static cache that holds a prompt. On a GPU they are bfloat16
and of full size; where memory does not hold all layers, as many as fit, and the results say how many. On a CPU they
are small, float32, on one thread. Tokens are random, and so are routers, whose logits have a variance of about 1. So a
batch wakes about E * (1 - (1 - k/E)**T) experts per layer, more than text does under trained routers, and a setting
keeps another share of them than it would there. Quality is not measured.

Modes, each for stock under each of transformers' experts implementations and for Lynx under each setting:

    plain     the model is called
    graph     the step is captured whole as a CUDA graph and replayed
    compiled  the step is compiled (fullgraph), then captured: what mode="reduce-overhead" does. It takes minutes per
              setup, so that only the fastest stock implementation and Lynx are compiled, for batches that are asked
              for; which one is the fastest is known from the other modes

The setups of a mode are timed in interleaved rounds of a few steps, after one that warms up and is not counted, and the
file is written; then comes the next mode. Time is that of the GPU between events, from giving the step its tokens to
its logits; on a CPU it is the thread's own. The ratio of a setup is taken round by round to the fastest stock setup of
the same mode, and to the fastest of all: by medians alone where that one is of another mode.

    python benchmarks/decode.py --out decode.json

Where a command may only take so long, the same one with `--minutes 7 --resume` is repeated until nothing is missing.
What is compiled by then is timed then, the rest the next time.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from bench import Bench
from comparison import compare, make_rows, median, show, stock_rows
from machine import Budget, bandwidth, free_memory, hardware, pin_one_thread, versions
from models import MODELS, Model, build, layers_that_fit, make_config, shrink
from options import counts, words
from origin import OTHER_CODE, code, commit
from peers import attempt
from record import Record
from setups import STRATEGIES, Setup, make_setups

MODES = ("plain", "graph", "compiled")
SLOW = 3.0  # a stock setup this much slower than the fastest is left out after the first rounds


def run_model(record: Record, facts: Model, layers: int, divide: int, budget: Budget, place: torch.device) -> None:
    """Time what is left of one model, which is gone when this returns: the next one needs its memory."""
    called = name_of(facts, place)
    left = [case for case in record.left if case[0] == called]
    if not left or budget.spent:
        return
    before: dict[str, Any] = next((row for row in record.rows if row["model"] == called), {})
    free_memory(place)
    made, reason = attempt(partial(make_model, facts, layers or before.get("layers", 0), divide, place))
    if reason:
        return record.fail(called, reason)
    model, sizes = made
    about = {"model": called} | sizes
    different = [f"{key}={before[key]}" for key, value in about.items() if before and before[key] != value]
    if different:
        return record.fail(called, f"in the file it has {', '.join(different)}, here it has not")
    for T in dict.fromkeys(case[1] for case in left):
        if budget.spent:
            return
        _, reason = attempt(partial(run_batch, record, model, facts, about | {"T": T}, budget))
        if reason:
            record.fail(f"{called}, batch {T}", reason)
        record.save()
        free_memory(place)


def make_model(facts: Model, layers: int, divide: int, place: torch.device) -> tuple[Any, dict[str, int]]:
    """Build a model with the layers that are asked for or fit, and say how large it is."""
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    whole = make_config(facts, small=place.type != "cuda")
    fitting = layers_that_fit(whole, layers or whole.num_hidden_layers, place, dtype)
    if fitting == 0:
        raise MemoryError("not even one layer fits")
    config = make_config(facts, small=place.type != "cuda", layers=fitting)
    shrink(config, divide)
    inner = getattr(config, "moe_intermediate_size", config.intermediate_size)
    sizes = {"E": facts.E, "k": facts.k, "H": config.hidden_size, "I": inner}
    return build(config, place, dtype), sizes | {"layers": fitting, "of_layers": whole.num_hidden_layers}


def run_batch(record: Record, model: Any, facts: Model, about: dict[str, Any], budget: Budget) -> None:
    """Time what is left of one batch, mode after mode; each is in the file as soon as it is timed."""
    bench = Bench(model, facts, about["T"], record.result["prompt"], record.result["steps"])
    try:
        setups = make_setups(bench)
        for mode in MODES:
            left = {case[3] for case in record.left if case[:3] == (about["model"], about["T"], mode)}
            if left and not budget.spent:
                chosen = [setup for setup in setups if setup.stock or setup.strategy in left]
                time_mode(record, bench, chosen, mode, about, budget)
    finally:
        bench.close()


def time_mode(
    record: Record, bench: Bench, setups: list[Setup], mode: str, about: dict[str, Any], budget: Budget
) -> None:
    """Time setups beside each other in one mode."""
    what = f"{about['model']}, batch {about['T']}, {mode}"
    if mode == "compiled":
        others = [row for row in stock_rows(record.rows, about["model"], about["T"]) if row["mode"] != mode]
        stock = [row for row in others if row["experts"] != "eager"]  # which cannot be compiled whole
        if not stock:
            return record.fail(what, "no other mode was timed, which tells the stock implementation to compile")
        fastest = min(stock, key=median)["experts"]
        setups = [setup for setup in setups if not setup.stock or setup.implementation == fastest]
    bench.clear()
    running: list[Setup] = []
    for setup in setups:
        if mode == "compiled" and budget.spent:
            break
        running.append(bench.ready(setup, mode))
    measure(bench, running, record.result["rounds"])
    record.put(make_rows(running, about | {"mode": mode}))
    compare(record.rows)
    for strategy in dict.fromkeys(setup.strategy for setup in running):
        tried = [setup for setup in running if setup.strategy == strategy]
        if not any(setup.rounds for setup in tried):
            record.fail(f"{what}, {strategy}", tried[-1].refused)
    record.save()
    if sys.stderr.isatty():
        print(what, file=sys.stderr)


def measure(bench: Bench, setups: list[Setup], rounds: int) -> None:
    """Interleave the setups that can run; Lynx counts what is timed."""
    for turn in range(rounds + 1):  # the first warms up
        running = [setup for setup in setups if not setup.refused]
        shift = turn % max(len(running), 1)
        seconds = {setup: bench.seconds(setup) for setup in running[shift:] + running[:shift]}
        for setup in running:
            if turn:
                setup.rounds.append(seconds[setup])
            elif setup.handle is not None:
                setup.handle.reset()
        if turn < 2:
            _drop_slow({setup: spent for setup, spent in seconds.items() if setup.stock}, SLOW if turn else 2 * SLOW)


def _drop_slow(stock: dict[Setup, float], most: float) -> None:
    fastest = min(stock.values(), default=0.0)
    for setup, seconds in stock.items():
        if seconds > most * fastest:
            setup.refused = f"left out for being slow ({seconds / fastest:.0f} times, after {len(setup.rounds)} rounds)"


def name_of(facts: Model, place: torch.device) -> str:
    """What a model is called in the results."""
    return facts.name if place.type == "cuda" else f"{facts.name}, small"


@torch.no_grad()
def main(
    device: str = typer.Option("auto", help="cuda, cpu, or auto: cuda where there is one."),
    models: str = typer.Option("", help="Names with commas between them; all where empty."),
    batches: str = typer.Option("1,4,16,32,64", help="Sequences decoded together, T."),
    modes: str = typer.Option("", help="Of plain, graph and compiled; all on a GPU where empty, plain on a CPU."),
    compile_batches: str = typer.Option("16", help="Those of the batches for which setups are compiled too."),
    layers: int = typer.Option(0, min=0, help="Layers of the model; 0: all, or as many as fit."),
    divide: int = typer.Option(1, min=1, help="What the sizes of a CPU's models are divided by once more, for a look."),
    rounds: int = typer.Option(0, min=0, help="Interleaved rounds; 0: 15 on a GPU, 7 on a CPU."),
    steps: int | None = typer.Option(
        None, min=2, help="Decode steps per round and setup; else 16 on a GPU, 2 on a CPU."
    ),
    prompt: int = typer.Option(64, min=1, help="Tokens in the cache before the first step."),
    minutes: float = typer.Option(
        0.0, min=0.0, help="Begin no mode, and compile nothing, after this long; 0: no limit."
    ),
    resume: bool = typer.Option(False, "--resume", help="Go on with the file, if it is there: keep what was timed."),
    other_code: bool = OTHER_CODE,
    out: Path = typer.Option(Path("decode.json"), help="Where the figures go, as JSON, after every mode."),
) -> None:
    """Time a decode step, stock and under Lynx."""
    place = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = place.type == "cuda"
    chosen = [MODELS[name] for name in words(models, MODELS, "model")]
    ways, sizes = words(modes, MODES if on_gpu else MODES[:1], "mode"), counts(batches, "batches")
    compiled = [T for T in counts(compile_batches, "compile-batches") if T in sizes] if "compiled" in ways else []
    grids = [(sizes, [mode for mode in ways if mode != "compiled"]), (compiled, ["compiled"])]
    names = [name_of(facts, place) for facts in chosen]
    asked: list[dict[str, list[Any]]] = [
        {"model": names, "T": batch_sizes, "mode": which, "strategy": list(STRATEGIES)}
        for batch_sizes, which in grids
        if batch_sizes and which
    ]
    if not asked:
        raise typer.BadParameter(f"compile-batches {compile_batches!r} names none of the batches {batches!r}.")
    budget, origin = Budget(minutes), code(other_code)
    if not on_gpu:
        pin_one_thread()
    head = {
        "benchmark": "decode",
        "commit": commit(),
        "lynx_files": origin["lynx_files"],
        "versions": versions(),
        "device": place.type,
        "LYNX_KERNELS": os.environ.get("LYNX_KERNELS", "auto"),
        "dtype": "bfloat16" if on_gpu else "float32",
        "rounds": rounds or (15 if on_gpu else 7),
        "steps": steps or (16 if on_gpu else 2),
        "prompt": prompt,
    }
    part = {"lynx": origin["lynx"], "hardware": hardware(place), "bandwidth_gb_per_s": bandwidth(place)}
    record = Record(out, head, part, asked, resume)
    if ways == ["compiled"] and not record.rows:
        raise typer.BadParameter(
            "compiled needs another mode, here or in a file to go on with: it tells what to compile."
        )
    for facts in chosen:
        run_model(record, facts, layers, divide, budget, place)
    show(record.rows)
    record.finish()


if __name__ == "__main__":
    typer.run(main)
