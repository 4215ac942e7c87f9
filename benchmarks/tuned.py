"""What `lynx tune` gives on the reference model, judged on text that neither chose nor verified.

Each seed splits held-out text in three: a part that chooses, one that verifies, and one that judges. On the last, a
limit on KL is held against what was asked for. On the first seed, a setting for every layer is compared with the same
setting in every layer, of every built-in strategy, at equal active experts; what a strategy loses between two of its
measured settings is interpolated in the logarithm of the KL.

    python recipes/reference_model/evaluate.py text text.jsonl
    python benchmarks/tuned.py --data text.jsonl --out benchmarks/results/tuned.json

`--model FOLDER` takes another model of the recipe, which reads bytes as the reference model does. With `--standins
FILE` stand-ins answer for lost experts in all that is tuned, and the uniform settings beside it re-pick.
"""

from __future__ import annotations

import itertools
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import grids
import torch
import typer
from held_out import even, subject_of, text_of
from machine import hardware, versions
from origin import OTHER_CODE, code, commit
from ratios import between, compared, family_name
from rich.console import Console
from rich.table import Table

from lynx.attachment import discover
from lynx.config import Config
from lynx.measuring.evaluate import Protocol
from lynx.measuring.examples import examples_hash, split
from lynx.measuring.intervals import Estimate
from lynx.measuring.quality import Quality, measure
from lynx.measuring.settings import describe
from lynx.standins import StandIns
from lynx.tuning.goal import Goal
from lynx.tuning.tune import Effort, Tuned, tune

JUDGES = 0.4  # share of the text that is judged on


def main(
    out: Path = typer.Option(..., "--out", help="The file."),
    model: str = typer.Option("reference", help="`reference`, or the folder of a model exported by the recipe."),
    data: Path | None = typer.Option(None, help="JSONL made by the recipe; else the prompts in the package."),
    standins: Path | None = typer.Option(None, help="File of `lynx calibrate` that answers in all that is tuned."),
    seeds: int = typer.Option(5, min=1, help="Splits of the text."),
    first_seed: int = typer.Option(0, min=0, help="The first of them, which is compared with uniform settings."),
    shares: str = typer.Option("0.5,0.6,0.75", help="Sizes at which it is compared."),
    max_kl: float = typer.Option(0.001, help="The limit that is asked for, nats per token."),
    batches: int = typer.Option(12, help="Most decode batches that choose; the first seed takes all there are."),
    candidates: int = typer.Option(16, help="Settings to try in a layer; twice as many on the first seed."),
    columns: int = typer.Option(64, min=2, help="Decode steps of a batch."),
    other_code: bool = OTHER_CODE,
) -> None:
    """Tune on every seed, judge on other text, and write what came of it."""
    torch.set_num_threads(1)
    subject, began = subject_of(model), time.time()
    text = text_of(data, subject, columns)
    head: dict[str, Any] = {"code": code(other_code), "commit": commit(), "command": shlex.join(sys.argv)}
    head |= {"hardware": hardware(torch.device("cpu")), "versions": versions(), "model": subject.name}
    head |= {"data": examples_hash(text), "max_kl": max_kl}
    answers = None if standins is None else StandIns(file=standins)
    head |= {"standins": None if standins is None else standins.name}
    rows: list[dict[str, Any]] = []
    for seed in range(first_seed, first_seed + seeds):
        judging, rest = (even(part, columns) for part in split(text, JUDGES, 1000 + seed))
        whole = seed == first_seed
        protocol = Protocol(batch=16, columns=columns, most_batches=None if whole else batches)
        effort = Effort(candidates=(2 if whole else 1) * candidates, seed=seed, uniform=0, standins=answers)
        keep = out.with_suffix(f".seed{seed}.part")
        limited = tune(subject, rest, Goal("max-kl", max_kl), protocol, effort, keep=keep)
        judges = replace(protocol, most_batches=None).batches(judging, subject.pad_id)
        row: dict[str, Any] = {"seed": seed, "batches": len(judges)}
        row["promise"] = _promise(subject.model, limited, judges)
        if whole:
            before = limited.path[0].before / len(limited.path[0].by_layer)
            top_k = discover(subject.model).layers[0].info.top_k
            uniform = _measured(subject.model, judges, grids.uniform(before, top_k))
            goals = [Goal("target-active", float(share)) for share in shares.split(",")]
            chosen = [(goal.value, tune(subject, rest, goal, protocol, effort, keep=keep)) for goal in goals]
            row["equal"] = [_equal(subject.model, share, tuned, judges, uniform) for share, tuned in chosen]
            row["uniform"] = [[_plain(q) for q in found] for found in uniform]
            controls = _measured(subject.model, judges, grids.controls(top_k))
            row["controls"] = [[_plain(q) for q in found] for found in controls]
        rows.append(row)
        Console(stderr=True).print(f"seed {seed}: {time.time() - began:.0f} s")
        result = head | {"complete": len(rows) == seeds, "rows": rows}
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


def _measured(model: Any, text: Sequence[Any], families: list[list[Config]]) -> list[list[Quality]]:
    measured = iter(measure(model, text, [config for grid in families for config in grid]))
    return [list(itertools.islice(measured, len(grid))) for grid in families]


def _equal(model: Any, share: float, tuned: Tuned, text: Sequence[Any], uniform: list[list[Quality]]) -> dict[str, Any]:
    """The setting that was tuned for a size, beside every family of uniform settings at the size that it has."""
    if tuned.chosen is None:
        return {"asked": share, "share": None}
    (quality,) = measure(model, text, [tuned.config])
    found = {}
    for family in uniform:
        neighbours = between(quality.share, family)
        if neighbours is not None:
            value, ratio = compared(quality, *neighbours)
            found[family_name(family)] = {"kl": value, "ratio": asdict(ratio)}
    kl, setting = asdict(quality.mean("kl")), tuned.config.dump()["strategy"]
    return {"asked": share, "share": quality.share, "kl": kl, "setting": setting, "uniform": found}


def _show(rows: Sequence[dict[str, Any]], max_kl: float) -> None:
    promise = Table("seed", "active experts", "KL verified", "KL judged", title=f"KL of at most {max_kl}")
    for row in rows:
        found = row["promise"]
        if found["chosen"] is None:
            promise.add_row(str(row["seed"]), "none", "", "")
            continue
        verified, judged = (
            str(Estimate(*(found[part][end] for end in ("value", "low", "high")))) for part in ("verified", "judged")
        )
        promise.add_row(str(row["seed"]), f"{found['judged']['share']:.1%}", verified, judged)
    equal = Table("active experts", "KL tuned", "uniform", "its KL", "ratio", title="At equal active experts")
    for each in rows[0]["equal"]:
        for name, other in sorted(each.get("uniform", {}).items(), key=lambda item: item[1]["kl"]):
            ratio = Estimate(**other["ratio"])
            equal.add_row(f"{each['share']:.1%}", f"{each['kl']['value']:.2g}", name, f"{other['kl']:.2g}", str(ratio))
    Console().print(promise, equal)


if __name__ == "__main__":
    typer.run(main)
