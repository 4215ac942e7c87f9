"""Options that are lists, with commas between their words."""

from __future__ import annotations

from collections.abc import Collection

import typer


def words(text: str, known: Collection[str], name: str) -> list[str]:
    """Split a list of names that must be known; all of them where it is empty.

    Raises:
        typer.BadParameter: One is not.
    """
    chosen = text.split(",") if text else list(known)
    unknown = [word for word in chosen if word not in known]
    if unknown:
        raise typer.BadParameter(f"Unknown {name} {unknown[0]!r}. Known: {', '.join(known)}.")
    return list(dict.fromkeys(chosen))


def counts(text: str, name: str) -> list[int]:
    """Split a list of whole numbers above 0.

    Raises:
        typer.BadParameter: One is something else.
    """
    found = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in found):
        raise typer.BadParameter(f"{name} takes whole numbers above 0 with commas between them, got {text!r}.")
    return list(dict.fromkeys(int(word) for word in found))


def fractions(text: str, name: str) -> list[float]:
    """Split a list of numbers above 0 and up to 1, of which four decimals count.

    Raises:
        typer.BadParameter: One is something else.
    """
    try:
        found = [round(float(word), 4) for word in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(0 < number <= 1 for number in found):  # NaN is not either
        raise typer.BadParameter(f"{name} takes numbers above 0 and up to 1 with commas between them, got {text!r}.")
    return list(dict.fromkeys(found))
