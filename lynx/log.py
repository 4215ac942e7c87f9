"""Logging: structlog events over the standard library's ``lynx`` logger, silent until an application configures it."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

import structlog

logging.getLogger("lynx").addHandler(logging.NullHandler())


def _render(_: Any, __: str, event: MutableMapping[str, Any]) -> str:
    """Render ``lynx.attached adapter=... layers=48``; the level and the time are the handler's to add."""
    name = event.pop("event")
    return " ".join([str(name), *(f"{key}={value}" for key, value in event.items())])


# Bound to its own processors, so that neither our events nor an application's structlog settings touch the other.
logger: Any = structlog.wrap_logger(
    logging.getLogger("lynx"),
    processors=[structlog.stdlib.filter_by_level, _render],
    wrapper_class=structlog.stdlib.BoundLogger,
    cache_logger_on_first_use=False,
)
