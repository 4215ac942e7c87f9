"""Put what was measured of the strategies into docs/results.md, from benchmarks/results/tuned*.json.

python docs/results.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from filling import estimate, figure, put, table

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "benchmarks" / "results"
FILES = {"": "tuned.json", "small-k ": "tuned_small_k.json", "answered ": "tuned_standins.json"}
"""By what their places in the page begin with."""

Result = dict[str, Any]


def main() -> None:
    """Write the page."""
    page = PAGE.read_text(encoding="utf-8")
    for prefix, name in FILES.items():
        if (RESULTS / name).exists():
            page = filled(page, json.loads((RESULTS / name).read_text(encoding="utf-8")), prefix)
    PAGE.write_text(page, encoding="utf-8")


def filled(page: str, result: Result, prefix: str = "") -> str:
    """Return the page with the figures of one model."""
    first = result["rows"][0]
    page = put(page, f"{prefix}equal", _equal(first["equal"]))
    if not result.get("standins"):  # the settings beside those with stand-ins are shown once
        page = put(page, f"{prefix}strategies", _settings([each for family in first["uniform"] for each in family]))
        page = put(page, f"{prefix}controls", _settings([each for family in first["controls"] for each in family]))
    page = put(page, f"{prefix}promise", _promise(result))
    return put(page, f"{prefix}conditions", _conditions(result))


def _equal(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        if row["share"] is None:
            cells.append((f"{row['asked']:.0%} asked", "no setting was verified to have it", "", "", "", ""))
            continue
        every = row["uniform"]
        plain = {name: found for name, found in every.items() if "certainty" not in name}
        cells.append((f"{row['share']:.1%}", estimate(row["kl"]), *_beside(every), *_beside(plain)))
    best = "best of the same in every layer"
    return table(("active experts", "KL, layer by layer", best, "ratio", "best without `certainty`", "ratio"), cells)


def _beside(families: dict[str, Any]) -> tuple[str, str]:
    """The best family at the size of a tuned setting, and tuned by that."""
    if not families:
        return "none has this size", ""
    name = min(families, key=lambda name: families[name]["kl"])
    ratio = families[name]["ratio"]
    interval = f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
    return f"{name}: {figure(families[name]['kl'])}", interval


def _settings(rows: list[dict[str, Any]]) -> str:
    cells = [
        (
            f"`{row['label']}`",
            f"{row['share']:.1%}",
            estimate(row["kl"]),
            f"{row['agreement']:.2%}",
            f"{row['kept_mass_worst']:.2f}",
        )
        for row in sorted(rows, key=lambda row: row["share"])
    ]
    return table(("setting", "active experts", "KL", "same top-1", "worst token keeps"), cells)


def _promise(result: Result) -> str:
    cells, kept, whole, contradicted = [], 0, 0, 0
    limit, rows = result["max_kl"], result["rows"]
    for row in rows:
        found = row["promise"]
        if found["chosen"] is None:
            cells.append((str(row["seed"]), "none was verified", "", "", "yes, nothing was written"))
            kept, whole = kept + 1, whole + 1
            continue
        judged = found["judged"]
        kept += judged["value"] <= limit
        whole += judged["high"] <= limit
        contradicted += judged["low"] > limit
        words = "yes" if judged["value"] <= limit else "not contradicted" if judged["low"] <= limit else "no"
        share = f"{judged['share']:.1%}"
        cells.append((str(row["seed"]), share, estimate(found["verified"]), estimate(judged), words))
    splits = table(("split", "active experts", "KL verified", "KL on other text", "held"), cells)
    return (
        f"A KL of at most {limit} was asked for. On other text it held {kept} times of {len(rows)}, {whole} times with "
        f"its whole interval, and was contradicted {contradicted} times.\n\n{splits}"
    )


def _conditions(result: Result) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    batches = result["rows"][0]["batches"]
    return (
        f"Measured by `{result['command']}` at commit {result['commit'][:12]} on text {result['data']}, of "
        f"which {batches} decode batches judge, with {versions}."
    )


if __name__ == "__main__":
    main()
