"""What the adapters of serving engines have in common."""

from __future__ import annotations

import atexit
from typing import NoReturn

from lynx.errors import AttachError
from lynx.handle import Handle
from lynx.log import logger


def log_when_served(handle: Handle) -> None:
    """Log what selection did, by phase, when the process ends."""
    atexit.register(_log, handle)


def _log(handle: Handle) -> None:
    for phase, total in handle.report().total.items():
        logger.info(
            "lynx.served",
            phase=phase,
            steps=total.steps,
            active_before=round(total.active_before, 2),
            active_after=round(total.active_after, 2),
            kept_mass_worst=total.kept_mass_worst,
        )


def no_priorities(host: str, instead: str) -> NoReturn:
    """Raise: the batches of an engine are its own, so a priority comes with a request or not at all."""
    raise AttachError(f"an engine of {host} makes up its own batches; {instead}")


def no_teacher_forcing(host: str) -> NoReturn:
    """Raise: an engine has no whole-sequence forward of the kind that teacher forcing needs."""
    raise AttachError(f"teacher forcing needs a model of transformers; an engine of {host} generates.")
