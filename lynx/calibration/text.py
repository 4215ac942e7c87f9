"""Calibrate on a user's text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lynx.calibration.calibrate import Effort, calibrate
from lynx.calibration.listening import Passage
from lynx.errors import ConfigError
from lynx.measuring.examples import Example, examples_hash
from lynx.measuring.origin import origin
from lynx.measuring.subject import Subject
from lynx.standins_file import StandInFile


def calibrate_on(
    subject: Subject,
    examples: Sequence[Example],
    path: str | Path,
    effort: Effort | None = None,
    *,
    batch: int = 8,
    advance: Callable[[], None] = lambda: None,
) -> StandInFile:
    """Make stand-ins from prompts and their continuations, and write them to a file.

    Args:
        subject: The model, not attached.
        examples: The text.
        path: The file.
        effort: How; as by default without one.
        batch: Sequences that are read in one pass.
        advance: Called after each reading.

    Raises:
        ConfigError: There is too little text; and whatever :func:`lynx.calibration.calibrate.calibrate` raises.
    """
    conditions = {
        **origin(subject.model),
        "model": subject.name,
        "data": examples_hash(examples),
        "examples": len(examples),
    }
    del conditions["time"]  # the same text again goes on where it was left
    return calibrate(
        subject.model, passages(subject, examples, batch), path, effort, conditions=conditions, advance=advance
    )


def passages(subject: Subject, examples: Sequence[Example], batch: int = 8) -> list[Passage]:
    """Put examples together, those of a length with each other, filled up on the right.

    Raises:
        ConfigError: A batch is of no size.
    """
    if batch < 1:
        raise ConfigError(f"batch is a count from 1; got {batch}.")
    batch = min(batch, -(-len(examples) // 2))
    texts = sorted(([*each.prompt, *each.continuation] for each in examples), key=len)
    made = []
    for begin in range(0, len(texts), max(batch, 1)):
        group = texts[begin : begin + batch]
        ids = torch.full((len(group), len(group[-1])), subject.pad_id)
        live = torch.zeros_like(ids, dtype=torch.bool)
        for row, tokens in enumerate(group):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            live[row, : len(tokens)] = True
        device = subject.model.device
        inputs = {"input_ids": ids.to(device), "attention_mask": live.long().to(device), "use_cache": False}
        made.append(Passage(inputs, live))
    return made
