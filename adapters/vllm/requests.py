"""What requests ask for in `extra_args` under `lynx`: exact routing by `"exact"`, a priority by `{"priority": 2.0}`."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from lynx.errors import ConfigError
from lynx.log import logger
from lynx.priority import EXACT, priority_of

KEY, PRIORITY = "lynx", "priority"


class Wishes:
    """Which of a runner's requests ask for something."""

    def __init__(self) -> None:
        self._by_name: dict[str, float | None] = {}

    def see(self, new: Iterable[Any], alive: Container[str]) -> None:
        """Take in the requests that a step brings, and forget those that are gone."""
        for request in new:
            self._by_name[request.req_id] = wish(request)
        self._by_name = {name: value for name, value in self._by_name.items() if value != 1.0 and name in alive}

    def among(self, names: Iterable[str]) -> list[float | None]:
        """The priority of each of these requests; None for exact routing."""
        return [self._by_name.get(name, 1.0) for name in names]


def wish(request: Any) -> float | None:
    """The priority that a request's sampling parameters ask for; None for exact, as is what is not understood."""
    word = (getattr(request.sampling_params, "extra_args", None) or {}).get(KEY)
    if word is None:
        return 1.0
    try:
        if not isinstance(word, Mapping):
            return priority_of(word)
        if set(word) == {PRIORITY}:
            return priority_of(word[PRIORITY])
    except ConfigError:
        pass
    if str(word) not in _said:
        _said.add(str(word))
        logger.warning("lynx.request_not_understood", lynx=word, known=f"{EXACT}, or {PRIORITY} and a number above 0")
    return None


_said: set[str] = set()
