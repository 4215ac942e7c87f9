"""The demo's results as a table, Markdown, JSON and CSV."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lynx.demo.run import Outcome, Results, on_frontier

_TIMING = ("active", "ratio", "low", "high", "ratio_alone", "milliseconds")
_COLUMNS = ("setting", "active", "kept mass", "worst", "bits/byte", "KL", "exact match", "MB/step", "time*")


def rich_table(results: Results) -> Table:
    """Lay the headline out: mixed batches, exact routing on top, then best trade first."""
    title = "Decode under a policy, prompt exact; mixed batches; best trade first"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "setting" else "right", no_wrap=True)
    table.add_row(*_cells(results.exact, results), style="bold", end_section=True)
    for outcome in results.outcomes:
        table.add_row(*_cells(outcome, results))
    return table


def legend(results: Results) -> str:
    """Say what the columns are and which model they come from."""
    conditions = results.conditions
    model = conditions["reference_model"]
    timing = conditions["timing_model"]
    first = results.exact
    mixed, asked = first.forced["mixed"], first.answers.asked
    generated = conditions["generated_batches_per_kind"]
    words = (
        f"Reference model ({model['parameters'] / 1e6:.1f} M parameters, {model['layers']} layers, {model['experts']} "
        f"experts, top-{model['top_k']}), batches of {conditions['batch']}, half code, half problems: active experts "
        "per layer and step, before and after (share of before); kept share of a token's own weights, mean and worst "
        f"token; rise in bits per byte and KL(exact || policy) in nats over {mixed.bytes_scored} bytes; exact match "
        f"over {asked} problems [95 % interval], generated in {generated} batches of problems alone and {generated} "
        "mixed ones; weights of the active experts per step, in float32. ● marks settings that no other beats on both "
        "active experts and KL."
    )
    if isinstance(timing, str):
        return f"{words}\n* {timing}."
    assert first.timing is not None
    return (
        f"{words}\n* Another model: random float32 weights, {timing['layers']} layer(s) of OLMoE's shape "
        f"({timing['experts']} experts, top-{timing['top_k']}, {timing['gigabytes']} GB); time of a decode step at the "
        "same share of active experts by that of exact routing in the same run, both with Lynx's experts "
        f"implementation; median [quartiles] of {timing['rounds']} interleaved rounds, one thread, "
        f"{conditions['processor']}, torch {conditions['torch']}. Exact routing itself took "
        f"{first.timing.ratio_alone:.2f} of the time of the model without Lynx."
    )


def write(results: Results, folder: Path) -> list[Path]:
    """Write ``results.json`` with everything and ``results.csv`` with one row per setting and kind of batch."""
    folder.mkdir(parents=True, exist_ok=True)
    data = results.to_dict()
    as_json = folder / "results.json"
    as_json.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    rows = []
    for outcome in data["outcomes"]:
        timing = outcome["decode_time"] or {}
        for kind, forced in outcome["forced"].items():
            rows.append(
                {
                    "setting": outcome["label"],
                    "batches": kind,
                    **forced,
                    **{f"exact_match_{key}": value for key, value in outcome["exact_match"].items()},
                    **{f"decode_time_{key}": timing.get(key, "") for key in _TIMING},
                }
            )
    as_csv = folder / "results.csv"
    with as_csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return [as_json, as_csv]


def _cells(outcome: Outcome, results: Results) -> list[str]:
    forced, timing = outcome.forced["mixed"], outcome.timing
    low, high = outcome.answers.interval
    mark = " ●" if outcome is not results.exact and on_frontier(outcome, results.outcomes) else ""
    return [
        outcome.label + mark,
        f"{forced.active_before:.1f} → {forced.active_after:.1f} ({outcome.share:.0%})",
        f"{forced.kept_mass_mean:.3f}",
        f"{forced.kept_mass_worst:.3f}",
        f"{forced.bits_per_byte_rise:+.4f}",
        f"{forced.kl:.4f}",
        f"{100 * outcome.answers.share:.1f}% [{100 * low:.0f}, {100 * high:.0f}]",
        f"{forced.expert_bytes / 1e6:.1f}",
        "-" if timing is None else f"{timing.ratio:.2f} [{timing.low:.2f}, {timing.high:.2f}]",
    ]
