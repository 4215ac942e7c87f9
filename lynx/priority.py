"""What a sequence's wishes are worth beside those of its neighbours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lynx.errors import ConfigError

EXACT = "exact"
MOST = 100.0  # votes are summed in fixed point: a thousand rows of this weight still fit


def priority_of(value: Any) -> float | None:
    """Return a sequence's vote weight; None for one whose routing must not change.

    Raises:
        ConfigError: It is neither a number above 0, up to `MOST`, nor ``"exact"``.
    """
    if isinstance(value, str) and value == EXACT:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0.0 < value <= MOST:
        raise ConfigError(
            f"a priority is a number above 0, 1 for a normal one and {MOST:g} at most, or {EXACT!r}; got {value!r}."
        )
    return float(value)


def priorities_of(values: Any) -> tuple[float | None, ...]:
    """Return the priorities of several sequences, given as a sequence or a tensor ``(B,)``.

    Raises:
        ConfigError: One of them is none, or there are none.
    """
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ConfigError(f"priorities are a list or a tensor (B,), one for each sequence; got {values!r}.")
    return tuple(priority_of(value) for value in values)
