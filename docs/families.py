"""Put the matrix of transformers' MoE families into docs/families.md: every one is built, tiny, and tried.

python docs/families.py
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "families.md"
README = ROOT / "README.md"
PLACES = (README, ROOT / "docs" / "transformers.md")

if TYPE_CHECKING:
    from zoo_checks import Row

_VERSION = re.compile(r"^With transformers (\S+),", re.MULTILINE)


def main() -> None:
    """Write the matrix, and the sentences that count it elsewhere; of this checkout, whatever is installed."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "adapters")]
    import torch
    import zoo
    import zoo_checks

    torch.set_num_threads(1)
    rows = []
    for family in zoo.families():
        print(family, file=sys.stderr)
        rows.append(zoo_checks.check(family))
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    for path in PLACES:
        path.write_text(counted(path.read_text(encoding="utf-8"), rows), encoding="utf-8")


def filled(page: str, rows: list[Row]) -> str:
    """Return the page with its tables."""
    taken, refused = [row for row in rows if not row.refused], [row for row in rows if row.refused]
    lines = [[f"`{row.family}`", f"`{row.model}`", _escape(row.refused)] for row in refused]
    page = _put(page, "summary", f"\n{_summary(rows)}\n")
    page = _put(page, "matrix", f"\n{_table(_HEAD, [line(row) for row in taken])}\n")
    return _put(page, "refused", f"\n{_table(['family', 'model', 'why'], lines)}\n")


def counted(text: str, rows: list[Row]) -> str:
    """Return another page with how many families there are."""
    taken = sum(not row.refused for row in rows)
    return _put(text, "families", f"{taken} of the {len(rows)} MoE families of transformers {version('transformers')}")


def described(page: str) -> str:
    """Return the version of transformers that a page is of."""
    found = _VERSION.search(page)
    assert found is not None, "the page names no version"
    return found[1]


_HEAD = ["family", "model", "shape", "layers", "exact", "selects", "experts run by", "weights", "chosen by", "notes"]


def line(row: Row) -> list[str]:
    """Lay out one family."""
    runs = "model, Lynx" if row.lynx == "equal" else "model"
    cells = [f"`{row.family}`", f"`{row.model}`", row.shape, str(row.layers)]
    cells += ["yes" if row.exact else "NO", "yes" if row.selects else "NO", runs, row.rule, row.choice or "logits"]
    return [*cells, _escape("; ".join(row.notes))]


def _summary(rows: list[Row]) -> str:
    taken = [row for row in rows if not row.refused]
    lynx = sum(row.lynx == "equal" for row in taken)
    shapes = Counter(row.shape for row in rows)
    counts = ", ".join(f"{shapes[shape]} of shape {shape}" for shape in sorted(shapes) if shape != "S5")
    return (
        f"With transformers {version('transformers')}, selection works in **{len(taken)} of {len(rows)} families** "
        f"({counts}), and Lynx can run the experts of {lynx}. The other {len(rows) - len(taken)} are refused."
    )


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


def _put(text: str, marker: str, content: str) -> str:
    pattern = re.compile(rf"(<!-- {marker}:start -->).*?(<!-- {marker}:end -->)", re.DOTALL)
    changed, count = pattern.subn(lambda found: f"{found.group(1)}{content}{found.group(2)}", text)
    if count != 1:
        raise SystemExit(f"one pair of <!-- {marker}:start --> and <!-- {marker}:end --> is needed")
    return changed


if __name__ == "__main__":
    main()
