"""What pages that are made from results have in common: figures, tables, and the places that they are put into."""

from __future__ import annotations

import re


def put(page: str, name: str, text: str) -> str:
    """Replace what stands between a name's two marks.

    Raises:
        ValueError: The page has no such place, or more than one.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    done, count = re.subn(f"{start}.*?{end}", lambda _: f"{start}\n\n{text}\n\n{end}", page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page has {count} places for {name!r}, not one.")
    return done


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def figure(value: float) -> str:
    """Two digits."""
    return f"{value:.2g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def estimate(figures: dict[str, float]) -> str:
    """A value with its interval."""
    return f"{figure(figures['value'])} ({figure(figures['low'])} to {figure(figures['high'])})"
