"""What `lynx tune` gives on the reference model, judged on text that neither chose nor verified.

Each seed splits the model's held-out prompts in three: a part that chooses, one that verifies, and one that judges. On
the last, a limit on KL is held against what was asked for. On the first seed, a setting for every layer is compared
with the same setting in every layer, of every built-in strategy, at equal active experts; what a strategy loses between
two of its measured settings is interpolated in the logarithm of the KL.

    python benchmarks/tuned.py --out benchmarks/results/tuned.json
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import typer
from machine import hardware, versions
from origin import OTHER_CODE, code, commit
from rich.console import Console
from rich.table import Table

from lynx.config import resolve_config
from lynx.measuring.evaluate import Protocol
from lynx.measuring.examples import reference_examples, split
from lynx.measuring.quality import Quality, measure
from lynx.measuring.settings import describe
from lynx.measuring.subject import load_subject
from lynx.tuning.goal import Goal
from lynx.tuning.tune import Effort, Tuned, tune

UNIFORM: dict[str, list[dict[str, Any]]] = {
    "importance-threshold": [{"mass": mass} for mass in (0.45, 0.55, 0.65, 0.75, 0.82, 0.88, 0.94)],
    "importance-threshold ": [{"ratio": ratio} for ratio in (0.7, 0.5, 0.4, 0.3, 0.2, 0.1)],
    "pooled-threshold": [{"least": least} for least in (0.3, 0.25, 0.2, 0.16, 0.12, 0.09, 0.06)],
    "coverage": [{"share": share} for share in (0.7, 0.8, 0.87, 0.92, 0.96)],
    "batch-union": [{"top": top} for top in (1, 2, 3)],
    "top-budget": [{"budget": budget} for budget in (11, 13, 15, 18, 20)],
    "affinity-binning": [{"budget": budget} for budget in (11, 13, 15, 18, 20)],
    "popularity": [{"drop": drop} for drop in (14, 11, 8, 5)],
}
CONTROLS: dict[str, list[dict[str, Any]]] = {
    "static-top": [{"top": top} for top in (1, 2, 3)],
    "importance-threshold": [{"mass": mass, "refill": "none"} for mass in (0.45, 0.65, 0.82, 0.94)],
}
SHARES = (0.5, 0.6, 0.75)


def main(
    out: Path = typer.Option(..., "--out", help="The file."),
    seeds: int = typer.Option(5, min=1, help="Splits of the text."),
    max_kl: float = typer.Option(0.001, help="The limit that is asked for, nats per token."),
    batches: int = typer.Option(8, help="Most decode batches of a grouping that choose, that verify, and that judge."),
    candidates: int = typer.Option(15, help="Settings to try in a layer; twice as many on the first seed."),
    columns: int = typer.Option(64, min=2, help="Decode steps of a batch."),
    other_code: bool = OTHER_CODE,
) -> None:
    """Tune on every seed, judge on other text, and write what came of it."""
    torch.set_num_threads(1)
    head: dict[str, Any] = {"code": code(other_code), "commit": commit(), "command": shlex.join(sys.argv)}
    head |= {"hardware": hardware(torch.device("cpu")), "versions": versions()}
    subject, rows, began = load_subject("reference"), [], time.time()
    for seed in range(seeds):
        judging, rest = split(reference_examples(), 0.35, 1000 + seed)
        # the first seed is compared with uniform settings, which takes more to be told apart
        groupings, tried = ((0, 1), 2 * candidates) if seed == 0 else ((0,), candidates)
        protocol = Protocol(batch=16, columns=columns, most_batches=batches, seeds=groupings)
        effort = Effort(candidates=tried, seed=seed)
        keep = out.with_suffix(f".seed{seed}.part")
        limited = tune(subject, rest, Goal("max-kl", max_kl), protocol, effort, keep=keep)
        judge = Protocol(batch=16, columns=columns, most_batches=batches, seeds=(0, 1))
        text = judge.batches(judging, subject.pad_id)
        row: dict[str, Any] = {"seed": seed, "promise": _promise(subject.model, limited, text)}
        uniform = _measured(subject.model, text, UNIFORM) if seed == 0 else {}
        row["uniform"] = {label: [_plain(q) for q in found] for label, found in uniform.items()}
        controls = _measured(subject.model, text, CONTROLS) if seed == 0 else {}
        row["controls"] = {label: [_plain(q) for q in found] for label, found in controls.items()}
        row["equal"] = [_equal(subject.model, limited, share, text, uniform) for share in SHARES] if uniform else []
        rows.append(row)
        Console(stderr=True).print(f"seed {seed}: {time.time() - began:.0f} s")
        result = head | {"max_kl": max_kl, "complete": seed + 1 == seeds, "rows": rows}
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        keep.unlink(missing_ok=True)
    _show(rows, max_kl)


def _promise(model: Any, tuned: Tuned, text: Sequence[Any]) -> dict[str, Any]:
    """What the chosen setting loses on the text that judges."""
    if tuned.chosen is None:
        return {"chosen": None}
    (quality,) = measure(model, text, [tuned.config])
    verified = tuned.chosen.quality
    return {
        "chosen": tuned.config.dump()["strategy"],
        "verified": asdict(verified.mean("kl")) | {"share": verified.share},
        "judged": asdict(quality.mean("kl")) | {"share": quality.share},
    }


def _plain(quality: Quality) -> dict[str, Any]:
    return {
        "label": describe(quality.setting),
        "share": quality.share,
        "kl": asdict(quality.mean("kl")),
        "agreement": quality.mean("agree").value,
        "kept_mass_worst": quality.kept_mass_worst,
    }


def _measured(model: Any, text: Sequence[Any], grids: dict[str, list[dict[str, Any]]]) -> dict[str, list[Quality]]:
    families = [[resolve_config(name.strip(), dict(each)) for each in grid] for name, grid in grids.items()]
    measured = measure(model, text, [config for grid in families for config in grid])
    found: dict[str, list[Quality]] = {}
    for grid in families:
        found[describe(grid[0]).split("=")[0]] = measured[: len(grid)]
        measured = measured[len(grid) :]
    return found


def _equal(
    model: Any, tuned: Tuned, share: float, text: Sequence[Any], uniform: dict[str, list[Quality]]
) -> dict[str, Any]:
    """The allocation predicted to need `share`, beside the best uniform setting at the size that it has."""
    allocation = next(each for each in tuned.path if each.share <= share)
    (quality,) = measure(model, text, [allocation.config])
    between = {label: _at(quality.share, [(q.share, q.kl_value) for q in found]) for label, found in uniform.items()}
    best = min((kl, label) for label, kl in between.items() if kl is not None)
    kl = asdict(quality.mean("kl"))
    return {"asked": share, "share": quality.share, "kl": kl, "best_uniform": best[1], "uniform_kl": best[0]}


def _at(share: float, points: Sequence[tuple[float, float]]) -> float | None:
    """A family's KL at a share, interpolated in its logarithm; None outside of what was measured."""
    ordered = sorted(points)
    for (low, first), (high, second) in itertools.pairwise(ordered):
        if low <= share <= high and high > low:
            part = (share - low) / (high - low)
            return math.exp((1 - part) * math.log(first) + part * math.log(second))
    return None


def _show(rows: Sequence[dict[str, Any]], max_kl: float) -> None:
    promise = Table("seed", "active experts", "KL verified", "KL judged", title=f"KL of at most {max_kl}")
    for row in rows:
        found = row["promise"]
        if found["chosen"] is None:
            promise.add_row(str(row["seed"]), "none", "", "")
            continue
        judged = found["judged"]
        interval = f"{judged['value']:.2g} ({judged['low']:.2g} to {judged['high']:.2g})"
        promise.add_row(str(row["seed"]), f"{judged['share']:.1%}", f"{found['verified']['value']:.2g}", interval)
    equal = Table(
        "active experts", "KL tuned", "best uniform", "its KL", "tuned by uniform", title="At equal active experts"
    )
    for each in rows[0]["equal"]:
        ratio = each["kl"]["value"] / each["uniform_kl"]
        sizes = f"{each['share']:.1%}", f"{each['kl']['value']:.2g}"
        equal.add_row(*sizes, each["best_uniform"], f"{each['uniform_kl']:.2g}", f"{ratio:.2f}")
    Console().print(promise, equal)


if __name__ == "__main__":
    typer.run(main)
