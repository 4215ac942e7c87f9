"""Put the benchmarks' figures into docs/performance.md, from the JSON files in benchmarks/results.

python docs/performance.py
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
STILL_TO_COME = "**GPU figures are still to come.** The kernels have not been timed on a GPU yet"
PARTS = ((0.75, "3/4"), (0.5, "1/2"), (0.25, "1/4"))
TIMED = ("graph", "thread")  # as the page says of its times; a contender that was launched instead says why

Result = dict[str, Any]


def main() -> None:
    """Write the page."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def filled(page: str, results: Path = RESULTS) -> str:
    """Return the page with its figures."""
    kernels, decode = _read(results / "kernels_cuda.json"), _read(results / "decode_cuda.json")
    state = "" if kernels else f"{STILL_TO_COME}: what this page says of time was measured on a CPU."
    page = _put(page, "state", state)
    gpu = [_kernels(kernels) if kernels else f"{STILL_TO_COME}."]
    gpu.append(_decode(decode) if decode else "Whole models have not been timed on a GPU yet.")
    page = _put(page, "gpu", "\n\n".join(gpu))
    cpu = [_read(results / "kernels_cpu.json"), _read(results / "decode_cpu.json")]
    parts = [make(result) for make, result in zip((_kernels, _decode), cpu, strict=True) if result]
    return _put(page, "cpu", "\n\n".join(parts) or "Not measured yet.")


def _kernels(result: Result) -> str:
    """Lay out what one layer takes: a table per shape, under skewed routing, with what it was measured on."""
    on_gpu = result["device"] == "cuda"
    blocks = [
        f"### One layer\n\nSkewed routing, {result['dtype']}, nothing protected: for time only, not a setting to use. "
        f"Layer, route, experts and peer in {'us' if on_gpu else 'ms'}."
    ]
    blocks += _incomplete(result)
    if on_gpu:
        blocks.append(_targets(result["targets"], result["parts"][0]["hardware"]["gpu"]["name"]))
    for shape in dict.fromkeys(row["shape"] for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["shape"], row["routing"]) == (shape, "skewed")]
        if rows:
            blocks.append(_shape(shape, sorted(rows, key=lambda row: row["T"]), on_gpu))
    blocks.append("The last columns are the layer's time with part of the experts by its time with all of them.")
    found = [(f"`{name}`", reason) for row in result["rows"] for name, reason in _oddities(row)]
    return "\n\n".join([*blocks, *_remarks(found, len(result["rows"])), _conditions(result)])


def _shape(shape: str, rows: list[Result], on_gpu: bool) -> str:
    """Lay out one shape: how it was run, and a line for each T."""
    head = ["T", "active", "layer", "route", "experts", "best peer", "layer / best peer"]
    head += (["floor", "layer / floor"] if on_gpu else []) + [f"layer, {words} of the experts" for _, words in PARTS]
    parts = {(row["T"], row["fraction"]): row for row in rows}
    lines = []
    for row in (row for row in rows if row["fraction"] == 1):
        cells = [str(row["T"]), f"{row['active']:.1f}", *(_time(row, name) for name in ("layer", "route", "experts"))]
        peer = row["best_peer"]
        cells += [f"{_time(row, peer)} (`{peer}`)" if peer else "-", _ratio(row["layer_by_best_peer"])]
        if on_gpu:
            cells += [f"{row['floor_us']:.1f}", _ratio(row["layer_by_floor"])]
        cells += [_ratio(parts.get((row["T"], fraction), {}).get("layer_by_full")) for fraction, _ in PARTS]
        lines.append(cells)
    copies = " or ".join(str(number) for number in sorted({row["copies"] for row in rows}))
    sizes = ", ".join(f"`{name} = {rows[0][name]}`" for name in ("E", "k", "H", "I"))
    experts = _ways([(f"`{row['experts_run_by']}`", row["T"]) for row in rows])
    ways = f"Experts run by {experts}; route by {_ways([(row['route_run_by'], row['T']) for row in rows])}"
    return f"**{shape}** ({sizes}, {rows[0]['layout']}, {copies} copies). {ways}.\n\n{_table(head, lines)}"


def _ways(found: list[tuple[str, int]]) -> str:
    """Name every way that was taken, with its T where there are several."""
    ways: dict[str, dict[str, None]] = {}
    for way, T in found:
        ways.setdefault(way, {})[str(T)] = None
    return ", ".join(way if len(ways) == 1 else f"{way} (T = {', '.join(batches)})" for way, batches in ways.items())


def _time(row: Result, name: str) -> str:
    """A contender's median time; with a star if it was not timed as the others are."""
    figures = row["contenders"][name]
    if "us" not in figures:
        return "-"
    star = "" if figures["how"] in TIMED else "\\*"
    us = figures["us"]["median"]
    return f"{us:.1f}{star}" if figures["how"] != "thread" else f"{us / 1e3:.2f}"


def _oddities(row: Result) -> list[tuple[str, str]]:
    """Which contenders of a row did not run to the end or were not timed as the others are, and why."""
    found = []
    for name, figures in row["contenders"].items():
        found += [(name, why) for why in (figures.get("refused"), figures.get("how")) if why and why not in TIMED]
    return found


def _remarks(found: list[tuple[str, str]], rows: int) -> list[str]:
    """Count reasons, each without the figures that stand in brackets at its end."""
    if not found:
        return []
    counts = Counter((name, re.sub(r" \([^()]*\)$", "", reason)) for name, reason in found)
    lines = []
    for name in dict.fromkeys(name for name, _ in counts):
        reasons = [
            f"{reason}, in {count} row{'s' * (count > 1)}" for (whose, reason), count in counts.items() if whose == name
        ]
        lines.append(f"- {name}: {'; '.join(reasons)}.")
    star = " A star marks times that were not taken from a graph." if any("launches" in why for _, why in found) else ""
    text = (
        f"The file has {rows} rows, more than are shown here. In some a contender is missing or timed otherwise.{star}"
    )
    return [f"{text}\n\n" + "\n".join(lines)]


def _incomplete(result: Result) -> list[str]:
    """Say how many cases are missing, and what went wrong."""
    if result["complete"]:
        return []
    cases = result["cases"]
    text = f"This run is not complete: {cases['missing']} of {cases['asked']} cases were not timed."
    return [" ".join([text, *(f"Failed: {reason}." for reason in result["failed"])])]


def _targets(targets: list[Result], card: str) -> str:
    lines = []
    for target in targets:
        worst = target["worst"]
        where = f"{worst['value']:.2f} ({worst['shape']}, {worst['routing']}, T = {worst['T']})" if worst else "-"
        reached = f"{target['reached']} of {target['rows']}"
        reached += f", {target['not_replayed']} not replayed" if target["not_replayed"] else ""
        lines.append([target["name"], f"{target['target']:g}", reached, where])
    text = f"Targets, which are for an H200-class card and graph replay; here on one {card}:"
    return f"{text}\n\n{_table(['target', 'at most', 'reached in', 'worst'], lines)}"


def _decode(result: Result) -> str:
    """Lay out what a step takes: a table per model."""
    blocks = ["### A whole step", *_incomplete(result)]
    timed = [row for row in result["rows"] if row["timed"]]
    for model in dict.fromkeys(row["model"] for row in timed):
        blocks.append(_model(sorted((row for row in timed if row["model"] == model), key=lambda row: row["T"]), result))
    tried: dict[str, dict[str, None]] = {}
    for row in timed:
        if not row["setting"]:
            tried.setdefault(row["mode"], {})[f"`{row['experts']}`"] = None
    words = "; ".join(f"{mode} with {', '.join(names)}" for mode, names in tried.items())
    blocks.append(
        f"Stock is the model alone, the fastest of what was tried: {words}, in the modes that stand beside each batch. "
        "Under Lynx: time by that of stock, quartiles, active experts per layer out of those that the model's own "
        f"routing wakes, and the mode where several were tried. The cache holds a prompt of {result['prompt']} tokens."
    )
    if any(row["ratio"] and "q1" not in row["ratio"] for row in timed):
        blocks.append("A ratio without quartiles is one of medians: modes are timed one after the other.")
    found = [(f"`{row['setting'] or row['experts']}` in mode {row['mode']}", row["refused"]) for row in result["rows"]]
    found = [(name, reason) for name, reason in found if reason]
    return "\n\n".join([*blocks, *_remarks(found, len(result["rows"])), _conditions(result)])


def _model(rows: list[Result], result: Result) -> str:
    """Lay out one model: a line for each batch."""
    first = rows[0]
    kinds = [words for words in dict.fromkeys(_setting(row) for row in rows) if words]
    lines = []
    for T in dict.fromkeys(row["T"] for row in rows):
        here = [row for row in rows if row["T"] == T]
        modes = dict.fromkeys(row["mode"] for row in here if not row["setting"])
        stock = next((row for row in here if row["fastest_stock"]), None)
        cells = [str(T), ", ".join(modes) or "-"]
        cells.append(f"{stock['ms']['median']:.2f} (`{stock['experts']}`, {stock['mode']})" if stock else "-")
        lines.append(cells + [_fastest([row for row in here if _setting(row) == kind]) for kind in kinds])
    layers = f"{first['layers']} of {first['of_layers']} layers"
    title = f"**{first['model']}**: {layers}, `H = {first['H']}`, `I = {first['I']}`, {result['dtype']}."
    return f"{title}\n\n{_table(['batch', 'modes tried', 'stock, ms', *kinds], lines)}"


def _setting(row: Result) -> str:
    """Name a setting without what was counted from the batch."""
    if row["strategy"] != "top-budget":
        return row["setting"] and f"`{row['setting']}`"
    return f"`top-budget protect={row['options']['protect']}`, budget of half the active"


def _fastest(rows: list[Result]) -> str:
    if not rows:
        return "-"
    row = min(rows, key=lambda row: row["ms"]["median"])
    counts = row["counts"]
    mode = f", {row['mode']}" if len(rows) > 1 else ""
    return f"{_ratio(row['ratio'])}, {counts['active_after']:.0f} of {counts['active_before']:.0f}{mode}"


def _conditions(result: Result) -> str:
    """Say what figures were measured on."""
    parts = result["parts"]
    machine = parts[0]["hardware"]
    where = f"{machine['cpu']} ({machine['vectors']}), one thread"
    if "gpu" in machine:
        gpu = machine["gpu"]
        where = f"{gpu['name']}, {gpu['memory_gib']} GiB, driver {gpu['driver']}"
    elif shares := [part["core_share"] for part in parts if "core_share" in part]:
        where += f" that got {min(shares):.0%} of its core"
    found = [each["bandwidth_gb_per_s"] for each in (*parts, *result["rows"]) if "bandwidth_gb_per_s" in each]
    speed = ", ".join(f"{name} {_span([each[name] for each in found])} GB/s" for name in ("copy", "read"))
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    origins = ", ".join(dict.fromkeys(part["lynx"] for part in parts))
    commands = "; ".join(dict.fromkeys(f"`python {part['command']}`" for part in parts))
    commit, plus, changes = result["commit"].partition("+")
    return (
        f"Measured on: {where}; {speed}; {packages} (lynx {origins}); commit {commit[:12]}{plus}{changes}; {commands}."
    )


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def _ratio(values: dict[str, float] | None) -> str:
    if values is None:
        return "-"
    quartiles = f" ({values['q1']:.2f}-{values['q3']:.2f})" if "q1" in values else ""
    return f"{values['median']:.2f}{quartiles}"


def _table(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def _read(path: Path) -> Result | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _put(text: str, marker: str, content: str) -> str:
    pattern = re.compile(rf"(<!-- {marker}:start -->\n).*?(<!-- {marker}:end -->)", re.DOTALL)
    body = f"{content}\n" if content else ""
    changed, count = pattern.subn(lambda found: f"{found.group(1)}{body}{found.group(2)}", text)
    if count != 1:
        raise SystemExit(f"{PAGE.name} needs one pair of <!-- {marker}:start --> and <!-- {marker}:end -->")
    return changed


if __name__ == "__main__":
    main()
