"""Time a decode step on one CPU core: transformers' experts implementations beside Lynx, at equal inputs.

The model has random weights and the layer shape of OLMoE-1B-7B (H=2048, I=1024, E=64, k=8) in float32. Its router is
random too, so that a batch wakes about E * (1 - (1 - k/E)**T) experts: 56 of 64 at T=16. Trained routers on related
text wake fewer, so that both the cost and what there is to save are at their largest here. Quality is not measured.

Times are CPU time of the one thread, which other work on the machine disturbs least; how much of its core the thread
got is printed beside them. On an idle machine it is all of it, and CPU time is the time that passes.

    python benchmarks/experts_cpu.py --out experts_cpu.json
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import typer
from machine import bandwidth, hardware, pin_one_thread, quartiles, versions
from origin import OTHER_CODE, code, commit
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, OlmoeForCausalLM

import lynx
from lynx.demo.cache import as_argument
from lynx.demo.speed import EXPERTS as E
from lynx.demo.speed import HIDDEN as H
from lynx.demo.speed import INTERMEDIATE as I
from lynx.demo.speed import TOP_K as K
from lynx.demo.speed import real_shape_model

PROMPT = 32
STOCK = ("eager", "grouped_mm", "batched_mm")
BUDGETS = (32, 24, 16)
SLOW = 2.0  # a setup this much slower than the fastest stock is left out after the first round


@dataclass
class Setup:
    """One way of running the decode step, and what was measured of it."""

    stock: str = "grouped_mm"  # the model's own experts implementation
    experts: Literal["", "model", "lynx"] = ""  # what runs the experts under Lynx; empty: Lynx is not attached
    budget: int = E
    refill: str = "re-pick"
    counts: dict[str, Any] = field(default_factory=dict)  # Lynx's report over all layers, decode
    rounds: list[list[float]] = field(default_factory=list)  # seconds per step, by round

    @property
    def runs(self) -> str:
        """What runs the experts."""
        return "lynx" if self.experts == "lynx" else self.stock

    @property
    def selection(self) -> str:
        """What selects them."""
        return "" if not self.experts else "identity" if self.budget == E else f"budget {self.budget}, {self.refill}"

    @property
    def seconds(self) -> float:
        """Median time of a step."""
        return statistics.median(step for steps in self.rounds for step in steps)

    @contextmanager
    def applied(self, model: OlmoeForCausalLM) -> Iterator[None]:
        """Set the model up, and put it back."""
        model.set_experts_implementation(self.stock)
        if not self.experts:
            return (yield)
        with lynx.attach(model, "top-budget", budget=self.budget, refill=self.refill, experts=self.experts) as handle:
            yield
            self.counts = asdict(handle.report().total["decode"])


def make_setups() -> list[Setup]:
    """List stock, Lynx changing nothing, and Lynx at each budget with lost slots re-picked and left empty."""
    setups = [Setup(name) for name in STOCK]
    for budget in (E, *BUDGETS):
        setups += [Setup(experts="model", budget=budget), Setup(experts="lynx", budget=budget)]
        if budget != E:
            setups += [Setup(experts="lynx", budget=budget, refill="none")]
    return setups


def decode(model: OlmoeForCausalLM, cache: DynamicCache, tokens: Tensor) -> list[float]:
    """Run a decode step for each row of tokens `(steps, T)`, then cut the cache back; seconds per step."""
    seconds = []
    for row in tokens:
        start = time.thread_time()
        model(input_ids=row.unsqueeze(-1), **as_argument(cache, model), use_cache=True)
        seconds.append(time.thread_time() - start)
    cache.crop(-len(tokens))
    return seconds


@torch.inference_mode()
def measure(model: OlmoeForCausalLM, setups: list[Setup], tokens: Tensor, rounds: int) -> None:
    """Interleave the setups, so that a change in the machine's speed reaches all of them."""
    cache = DynamicCache(config=model.config)
    model.set_experts_implementation("grouped_mm")
    prompt = torch.randint(model.config.vocab_size, (tokens.shape[1], PROMPT))
    model(input_ids=prompt, **as_argument(cache, model), use_cache=True)
    for turn in range(rounds):
        for setup in setups:
            if turn and setup.seconds > SLOW * min(stock.seconds for stock in setups[: len(STOCK)]):
                continue
            with setup.applied(model):
                setup.rounds.append(decode(model, cache, tokens)[1:])  # the first step warms up
        if sys.stderr.isatty():
            print(f"round {turn + 1} of {rounds}", file=sys.stderr)


def figures(setup: Setup, baseline: Setup, active_before: float, expert_bytes: int) -> dict[str, Any]:
    """Work out a setup's row; its ratio is taken round by round against the baseline's same round."""
    pairs = zip(setup.rounds, baseline.rounds, strict=False)
    active = setup.counts.get("active_after", active_before)
    return {
        "experts": setup.runs,
        "selection": setup.selection,
        "is_baseline": setup is baseline,
        "active_experts": active,
        "kept_mass_mean": setup.counts.get("kept_mass_mean", 1.0),
        "kept_mass_worst": setup.counts.get("kept_mass_worst", 1.0),
        "rounds": len(setup.rounds),
        "step_ms": quartiles([step * 1e3 for steps in setup.rounds for step in steps]),
        "ratio": quartiles([statistics.median(ours) / statistics.median(theirs) for ours, theirs in pairs]),
        "expert_gb_per_s": active * expert_bytes / setup.seconds / 1e9,
    }


def show(result: dict[str, Any]) -> None:
    """Print the table to stdout, with its conditions."""
    machine, model, versions = result["hardware"], result["model"], result["versions"]
    title = "One decode step; ratio to the fastest stock implementation (bold)"
    table = Table("experts run by", "selection", title=title, title_justify="left")
    for column in ("active", "step ms", "quartiles", "ratio", "quartiles", "experts GB/s"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        cells = [row["experts"], row["selection"] or "stock", f"{row['active_experts']:.1f}"]
        for name, digits in (("step_ms", 0), ("ratio", 2)):
            values = {key: f"{value:.{digits}f}" for key, value in row[name].items()}
            cells += [values["median"], f"{values['q1']}-{values['q3']}"]
        table.add_row(*cells, f"{row['expert_gb_per_s']:.1f}", style="bold" if row["is_baseline"] else None)
    console = Console(width=120, highlight=False)
    console.print(table)
    console.print(
        f"{machine['cpu']} ({machine['vectors']}), {machine['core_share']:.0%} of 1 of {machine['cores']} cores, read "
        f"{machine['read_gb_per_s']:.1f} GB/s; torch {versions['torch']}, transformers {versions['transformers']}.\n"
        f"OLMoE layer shape, {model['layers']} layers, float32, random weights, batch {model['T']}. The random router "
        f"wakes {result['active_before']:.1f} of {E}\nexperts per layer and step; trained ones wake fewer."
    )


def main(
    layers: int = typer.Option(3, min=1, help="MoE layers; 1.6 GB each."),
    rounds: int = typer.Option(9, min=1, help="Interleaved rounds."),
    steps: int = typer.Option(4, min=1, help="Timed decode steps per round and setup."),
    batch: int = typer.Option(16, min=2, help="Sequences decoded together, T."),
    out: Path = typer.Option(Path("experts_cpu.json"), help="Where the figures go, as JSON."),
    other_code: bool = OTHER_CODE,
    quick: bool = typer.Option(False, help="One layer, three rounds, two steps: a look, not a result."),
) -> None:
    """Time the decode step under each experts implementation and budget."""
    if quick:
        layers, rounds, steps = 1, 3, 2
    origin = code(other_code)
    pin_one_thread()
    torch.manual_seed(0)
    setups, model = make_setups(), real_shape_model(layers)
    tokens = torch.randint(model.config.vocab_size, (steps + 1, batch))
    cpu_device = torch.device("cpu")
    wall, cpu = time.perf_counter(), time.thread_time()
    measure(model, setups, tokens, rounds)
    core_share = (time.thread_time() - cpu) / (time.perf_counter() - wall)
    baseline = min(setups[: len(STOCK)], key=lambda setup: setup.seconds)
    before = next(setup.counts["active_before"] for setup in setups if setup.counts)
    result = {
        "command": shlex.join(sys.argv),
        "commit": commit(),
        **origin,
        "versions": versions(),
        "hardware": {**hardware(cpu_device), "core_share": core_share, "read_gb_per_s": bandwidth(cpu_device)["read"]},
        "model": {"layers": layers, "H": H, "I": I, "E": E, "k": K, "T": batch, "dtype": "float32", "prompt": PROMPT},
        "repeats": {"rounds": rounds, "steps": steps},
        "baseline": baseline.runs,
        "active_before": before,
        "rows": [figures(setup, baseline, before, 3 * I * H * 4 * layers) for setup in setups],
    }
    show(result)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
