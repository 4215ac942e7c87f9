"""Requests that ask for exact routing, by `extra_args={"lynx": "exact"}`."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

from lynx.log import logger

KEY, EXACT = "lynx", "exact"


class ExactRequests:
    """Which of a runner's requests ask for exact routing."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def see(self, new: Iterable[Any], alive: Container[str]) -> None:
        """Take in the requests that a step brings, and forget those that are gone."""
        for request in new:
            (self._names.add if wants_exact(request) else self._names.discard)(request.req_id)
        self._names = {name for name in self._names if name in alive}

    def among(self, names: Iterable[str]) -> list[bool]:
        """Say of each of these requests whether it asked."""
        return [name in self._names for name in names]


def wants_exact(request: Any) -> bool:
    """Whether a request's sampling parameters say so; any other word is exact too."""
    word = (getattr(request.sampling_params, "extra_args", None) or {}).get(KEY)
    if word not in (None, EXACT) and str(word) not in _said:
        _said.add(str(word))
        logger.warning("lynx.request_not_understood", lynx=word, known=EXACT)
    return word is not None


_said: set[str] = set()
