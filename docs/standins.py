"""Put what was measured of stand-ins into docs/stand-ins.md, from benchmarks/results/standins*.json.

python docs/standins.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from filling import figure, put, table

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "stand-ins.md"
RESULTS = {
    "reference": ROOT / "benchmarks" / "results" / "standins.json",
    "small-k": ROOT / "benchmarks" / "results" / "standins_small_k.json",
}

Result = dict[str, Any]


def main() -> None:
    """Write the page."""
    results = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in RESULTS.items()}
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


def filled(page: str, results: dict[str, Result]) -> str:
    """Return the page with its figures."""
    for name, result in results.items():
        page = put(page, f"{name} ways", _ways(result))
        page = put(page, f"{name} strategies", _strategies(result))
        page = put(page, f"{name} answers", _answers(result))
        page = put(page, f"{name} shift", _shift(result))
        page = put(page, f"{name} conditions", _conditions(result))
    return page


def _ways(result: Result) -> str:
    """KL of each way by that of re-picking at equal active experts."""
    rows = []
    if not any(each["ratio"] for each in result["ways"][1]["by_re_picking"]):
        return _thresholds(result)
    asked = [each["asked"] for each in result["ways"][1]["by_re_picking"]]
    for way in result["ways"][1:]:
        cells = [_ratio(each, way["points"], result["ways"][0]["points"]) for each in way["by_re_picking"]]
        rows.append((way["way"], *cells))
    return table(("way", *(f"near {share:.0%} active" for share in asked)), rows)


def _thresholds(result: Result) -> str:
    """The same thresholds in every way, where these leave sizes that are too near each other to compare at one."""
    names = [way["way"] for way in result["ways"]]
    rows = [
        (f"{points[0]['share']:.0%}", *(figure(point["kl"]["value"]) for point in points))
        for points in zip(*(way["points"] for way in result["ways"]), strict=True)
    ]
    return table(("active experts by re-picking", *(f"KL, {name}" for name in names)), rows)


def _ratio(found: dict[str, Any], points: list[dict[str, Any]], re_picked: list[dict[str, Any]]) -> str:
    if found["ratio"] is None:  # a little beyond what was measured of re-picking: the same threshold beside it
        place = next(n for n, point in enumerate(points) if point["share"] == found["share"])
        beside = re_picked[place]
        return f"{found['kl'] / beside['kl']['value']:.2f} at {found['share']:.1%} (re-picking: {beside['share']:.1%})"
    ratio = found["ratio"]
    return f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) at {found['share']:.0%}"


def _strategies(result: Result) -> str:
    """How many settings got better, and those that got worse beyond noise."""
    rows = result["strategies"]
    better = [row for row in rows if row["change"]["high"] < 0]
    worse = [row for row in rows if row["change"]["low"] > 0]
    listed = "; ".join(f"`{row['label']}` by {figure(row['change']['value'])}" for row in worse)
    return (
        f"Of {len(rows)} settings of all strategies, {len(better)} have a smaller KL with stand-ins than by re-picking "
        f"beyond noise (95 % intervals of the paired difference), within noise: "
        f"{len(rows) - len(better) - len(worse)}. A larger one beyond noise: {listed or 'none'}."
    )


def _answers(result: Result) -> str:
    if not result["answers"]:
        return "No answers were generated."
    rows = [
        (row["way"], f"{row['value']:.1%} ({row['low']:.1%} to {row['high']:.1%})", str(row["asked"]))
        for row in result["answers"]
    ]
    return table(("`importance-threshold ratio=0.5`", "answers", "of"), rows)


def _shift(result: Result) -> str:
    rows = [
        (
            row["calibrated"],
            row["judged"],
            f"{row['ratio']} ({row['blend']['share']:.0%})",
            figure(row["re_pick"]["kl"]["value"]),
            figure(row["blend"]["kl"]["value"]),
            f"{row['blend']['kl']['value'] / row['re_pick']['kl']['value']:.2f}",
        )
        for row in result["shift"]
    ]
    head = (
        "calibrated on",
        "judged on",
        "ratio (active experts)",
        "KL by re-picking",
        "with stand-ins",
        "ratio of both",
    )
    return table(head, rows)


def _conditions(result: Result) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    calibration = result["calibration"]
    size = sum(layer["bytes"] for layer in calibration["layers"]) / 1e6
    return (
        f"Calibrated on {calibration['tokens']} tokens in {calibration['seconds']:.0f} s on {result['threads']} "
        f"thread{'s' if result['threads'] > 1 else ''}, {size:.1f} MB of stand-ins; judged on {result['batches']} "
        f"decode batches of 16. Measured by `{result['command']}` at commit {result['commit'][:12]}, with {versions}."
    )


if __name__ == "__main__":
    main()
