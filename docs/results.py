"""Put what was measured of the strategies into docs/results.md, from benchmarks/results/tuned.json.

python docs/results.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
RESULT = ROOT / "benchmarks" / "results" / "tuned.json"

Result = dict[str, Any]


def main() -> None:
    """Write the page."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")


def filled(page: str, result: Result) -> str:
    """Return the page with its figures."""
    first = result["rows"][0]
    page = _put(page, "equal", _equal(first["equal"]))
    page = _put(page, "strategies", _settings([each for family in first["uniform"].values() for each in family]))
    page = _put(page, "controls", _settings([each for family in first["controls"].values() for each in family]))
    page = _put(page, "promise", _promise(result))
    return _put(page, "conditions", _conditions(result))


def _equal(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        ratio = row["kl"]["value"] / row["uniform_kl"]
        best = f"{row['best_uniform']}, {_figure(row['uniform_kl'])}"
        cells.append((f"{row['share']:.1%}", _estimate(row["kl"]), best, f"{ratio:.2f}"))
    return _table(("active experts", "KL, layer by layer", "best of the same in every layer", "ratio"), cells)


def _settings(rows: list[dict[str, Any]]) -> str:
    cells = [
        (
            f"`{row['label']}`",
            f"{row['share']:.1%}",
            _estimate(row["kl"]),
            f"{row['agreement']:.2%}",
            f"{row['kept_mass_worst']:.2f}",
        )
        for row in sorted(rows, key=lambda row: row["share"])
    ]
    return _table(("setting", "active experts", "KL", "same top-1", "worst token keeps"), cells)


def _promise(result: Result) -> str:
    cells, kept = [], 0
    for row in result["rows"]:
        found = row["promise"]
        if found["chosen"] is None:
            cells.append((str(row["seed"]), "none was verified", "", "", "yes, nothing was written"))
            kept += 1
            continue
        holds = found["judged"]["value"] <= result["max_kl"]
        kept += holds
        share = f"{found['judged']['share']:.1%}"
        verified, judged = _estimate(found["verified"]), _estimate(found["judged"])
        cells.append((str(row["seed"]), share, verified, judged, "yes" if holds else "no"))
    table = _table(("split", "active experts", "KL verified", "KL on other text", "held"), cells)
    return (
        f"A KL of at most {result['max_kl']} was asked for; it held {kept} times of {len(result['rows'])}.\n\n{table}"
    )


def _conditions(result: Result) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"Measured by `{result['command']}` at commit {result['commit'][:12]}, with {versions}."


def _estimate(figures: dict[str, float]) -> str:
    return f"{_figure(figures['value'])} ({_figure(figures['low'])} to {_figure(figures['high'])})"


def _figure(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-4 else f"{value:.1e}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _put(page: str, name: str, text: str) -> str:
    """Replace what stands between a name's two marks."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    done, count = re.subn(f"{start}.*?{end}", lambda _: f"{start}\n\n{text}\n\n{end}", page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{PAGE.name} has {count} places for {name!r}, not one.")
    return done


if __name__ == "__main__":
    main()
