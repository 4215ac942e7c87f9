"""What stand-ins give beside re-picking, judged on text that they were not made of.

Held-out text is split in two: one part calibrates, the other judges, in decode batches of 16 of mixed text with the
prompt exact. The first table compares ways to answer for lost experts at the same thresholds, the second the default
way with re-picking under every strategy, the third what happens on other text than was calibrated on.

    python recipes/reference_model/evaluate.py text text.jsonl
    python benchmarks/standins.py --data text.jsonl --out benchmarks/results/standins.json

`--model FOLDER` takes another model of the recipe, which reads bytes as the reference model does.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grids
import torch
import typer
from held_out import even, subject_of, text_of
from machine import hardware, versions
from origin import OTHER_CODE, code, commit
from ratios import between, compared
from rich.console import Console
from rich.table import Table

from lynx.attachment import discover
from lynx.calibration.calibrate import Effort
from lynx.calibration.text import calibrate_on
from lynx.config import Config, resolve_config
from lynx.measuring.answers import answer, questions
from lynx.measuring.evaluate import Protocol
from lynx.measuring.examples import Example, examples_hash, split
from lynx.measuring.intervals import Estimate, bootstrap
from lynx.measuring.quality import Quality, measure
from lynx.measuring.settings import describe
from lynx.measuring.subject import Subject
from lynx.standins_file import StandInFile

RATIOS = (0.85, 0.65, 0.5, 0.4, 0.25, 0.12)
SHARES = (0.44, 0.5, 0.6, 0.75)
MILD = (0.5, 0.3, 0.15)
RANKS = (0, 4, 8, 16)
COLUMNS = 64
FEWER = 6  # batches for the settings of all strategies, which are many


def main(
    out: Path = typer.Option(..., "--out", help="The file."),
    model: str = typer.Option("reference", help="`reference`, or the folder of a model exported by the recipe."),
    data: Path | None = typer.Option(None, help="JSONL made by the recipe; else the prompts in the package."),
    rank: int = typer.Option(16, min=0, help="Of the stand-ins that are compared with re-picking everywhere."),
    asked: int = typer.Option(160, min=0, help="Problems that answers are generated for."),
    threads: int = typer.Option(1, min=1, help="Threads."),
    brief: bool = typer.Option(False, "--brief", help="One batch and few settings, to see that it runs."),
    other_code: bool = OTHER_CODE,
) -> None:
    """Calibrate on one part of the text, judge on the other, and write what came of it."""
    torch.set_num_threads(threads)
    subject = subject_of(model)
    text = text_of(data, subject, COLUMNS)
    judging, calibrating = split(text, 0.4, 7)
    batches = Protocol(batch=16, columns=COLUMNS).batches(even(judging, COLUMNS), subject.pad_id)
    batches, ratios, most = (batches[:1], RATIOS[2:4], 2) if brief else (batches, RATIOS, None)
    result: dict[str, Any] = {"code": code(other_code), "commit": commit(), "command": shlex.join(sys.argv)}
    result |= {"hardware": hardware(torch.device("cpu")), "versions": versions(), "model": subject.name}
    result |= {"data": examples_hash(text), "batches": len(batches), "threads": threads, "rank": rank}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        file, begun = home / "standins", time.perf_counter()
        made = _made(subject, calibrating, file, rank)
        result["calibration"] = {"seconds": time.perf_counter() - begun, **_described(made)}
        result["ways"] = _ways(subject, batches, file, rank, ratios)
        _say("ways of answering were measured")
        result["strategies"] = _strategies(subject, batches[:FEWER], file, most)
        result["answers"] = _answers(subject, judging, file, asked)
        _say("strategies and answers were measured")
        result["shift"] = _shift(subject, judging, calibrating, home, rank)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _show(result)


def _made(subject: Subject, examples: Sequence[Example], path: Path, rank: int) -> StandInFile:
    return calibrate_on(subject, examples, path, Effort(ranks=(rank,)), batch=16)


def _described(file: StandInFile) -> dict[str, Any]:
    layers = [
        {"rank": each.rank, "unexplained": each.unexplained, "bytes": each.num_bytes} for each in file.layers.values()
    ]
    return {"tokens": file.conditions["tokens"], "missing": file.missing, "layers": layers}


def _threshold(ratio: float, standins: dict[str, Any] | None = None) -> Config:
    return resolve_config("importance-threshold", {"ratio": ratio, "standins": standins})


def _ways(
    subject: Subject, batches: Sequence[Any], file: Path, rank: int, ratios: Sequence[float]
) -> list[dict[str, Any]]:
    """Each way of answering over the same thresholds, and its KL by that of re-picking at equal active experts."""
    ranks = sorted({min(each, rank) for each in RANKS})
    ways: dict[str, dict[str, Any] | None] = {"re-pick": None}
    ways |= {f"stand-in, rank {each}": {"file": file, "mode": "stand-in", "rank": each} for each in ranks}
    ways |= {f"blend, rank {each}": {"file": file, "mode": "blend", "rank": each} for each in ranks if each > 4}
    settings = [_threshold(ratio, options) for options in ways.values() for ratio in ratios]
    found = measure(subject.model, batches, settings)
    families = {name: found[len(ratios) * n : len(ratios) * (n + 1)] for n, name in enumerate(ways)}
    return [
        {
            "way": name,
            "points": [_plain(each) for each in family],
            "by_re_picking": [_at(share, family, families["re-pick"]) for share in SHARES] if name != "re-pick" else [],
        }
        for name, family in families.items()
    ]


def _at(share: float, family: Sequence[Quality], re_picked: list[Quality]) -> dict[str, Any]:
    """The setting of a family that is next to a share, by re-picking at exactly its size."""
    nearest = min(family, key=lambda each: abs(each.share - share))
    neighbours = between(nearest.share, re_picked)
    if neighbours is None:
        return {"asked": share, "share": nearest.share, "kl": nearest.kl_value, "ratio": None}
    beside, ratio = compared(nearest, *neighbours)
    return {"asked": share, "share": nearest.share, "kl": nearest.kl_value, "re_pick": beside, "ratio": asdict(ratio)}


def _strategies(subject: Subject, batches: Sequence[Any], file: Path, most: int | None) -> list[dict[str, Any]]:
    """Every uniform setting of every strategy by re-picking and in the default way, on the same tokens."""
    info = discover(subject.model).layers[0].info
    (exact,) = measure(subject.model, batches[:4], ["exact"])
    plain = [each for family in grids.uniform(exact.active_mean("before"), info.top_k) for each in family][:most]
    answered = [Config.build({**dict(each), "standins": file}) for each in plain]
    found = measure(subject.model, batches, [*plain, *answered])
    rows = []
    for one, other in zip(found[: len(plain)], found[len(plain) :], strict=True):
        change = torch.tensor(other.kl, dtype=torch.float64) - torch.tensor(one.kl, dtype=torch.float64)
        rise = bootstrap(other.by_text(change.tolist()), other.by_text(other.places))
        rows.append(
            {"label": describe(one.setting), "re_pick": _plain(one), "blend": _plain(other), "change": asdict(rise)}
        )
    return rows


def _answers(subject: Subject, judging: Sequence[Example], file: Path, asked: int) -> list[dict[str, Any]]:
    """Problems answered in true batches: exactly, by re-picking, and in the default way at about half the experts."""
    if not asked:
        return []
    chosen = questions(judging, asked)
    settings = {
        "exact": resolve_config("exact", {}),
        "re-pick": _threshold(0.5),
        "blend": _threshold(0.5, {"file": file}),
    }
    return [
        {"way": name, "asked": len(chosen), **asdict(answer(subject, chosen, setting, 16, 112))}
        for name, setting in settings.items()
    ]


def _shift(
    subject: Subject, judging: Sequence[Example], calibrating: Sequence[Example], home: Path, rank: int
) -> list[dict[str, Any]]:
    """Calibrated on one domain and judged on another."""
    domains = sorted({each.domain for each in judging})
    rows = []
    for source in (*domains, "both"):
        path = home / f"of {source}"
        file = _made(subject, [each for each in calibrating if source in ("both", each.domain)], path, rank)
        for target in domains:
            own = [each for each in judging if each.domain == target]
            batches = Protocol(batch=16, columns=COLUMNS).batches(own, subject.pad_id)
            settings = [_threshold(ratio, options) for ratio in MILD for options in (None, {"file": path})]
            found = measure(subject.model, batches, settings)
            for ratio, one, other in zip(MILD, found[::2], found[1::2], strict=True):
                ways = {"re_pick": _plain(one), "blend": _plain(other)}
                missing = sum(map(len, file.missing.values()))
                rows.append({"calibrated": source, "judged": target, "ratio": ratio, "missing": missing, **ways})
    return rows


def _plain(quality: Quality) -> dict[str, Any]:
    return {
        "share": quality.share,
        "active": quality.active_mean(),
        "kl": asdict(quality.mean("kl")),
        "agreement": quality.mean("agree").value,
        "kept_mass_worst": quality.kept_mass_worst,
        "answered_mass_mean": quality.answered_mass_mean,
        "answered_mass_most": quality.answered_mass_most,
    }


def _say(what: str) -> None:
    Console(stderr=True).print(what)


def _show(result: dict[str, Any]) -> None:
    ways = Table("way", *(f"at {share:.0%}" for share in SHARES), title="KL by that of re-picking")
    for row in result["ways"]:
        cells = [str(Estimate(**each["ratio"])) if each["ratio"] else "" for each in row["by_re_picking"]]
        ways.add_row(row["way"], *cells)
    strategies = Table("setting", "active", "re-pick", "blend", "change", title="Every strategy")
    for row in result["strategies"]:
        one, other = row["re_pick"], row["blend"]
        sizes = f"{other['share']:.0%}", f"{one['kl']['value']:.2g}", f"{other['kl']['value']:.2g}"
        strategies.add_row(row["label"], *sizes, str(Estimate(**row["change"])))
    shift = Table("calibrated", "judged", "ratio", "re-pick", "blend", title="Other text")
    for row in result["shift"]:
        figures = (f"{row[way]['kl']['value']:.2g}" for way in ("re_pick", "blend"))
        shift.add_row(row["calibrated"], row["judged"], str(row["ratio"]), *figures)
    answers = ", ".join(
        f"{row['way']} {row['value']:.1%} ({row['low']:.1%} to {row['high']:.1%})" for row in result["answers"]
    )
    Console(width=140).print(ways, strategies, shift, answers, f"calibration: {result['calibration']['seconds']:.0f} s")


if __name__ == "__main__":
    typer.run(main)
