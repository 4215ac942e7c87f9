"""True batched generation: how many questions a setting answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lynx.attachment import attach
from lynx.errors import ConfigError
from lynx.measuring.examples import Example
from lynx.measuring.generation import generate
from lynx.measuring.intervals import Estimate, wilson
from lynx.measuring.subject import Subject


def answer(
    subject: Subject,
    examples: Sequence[Example],
    setting: Any,
    batch: int,
    max_new_tokens: int,
    advance: Callable[[], None] = lambda: None,
) -> Estimate:
    """Generate greedily in batches under a setting; the share of examples that end on their answer.

    Args:
        subject: The model, not attached.
        examples: Those with an answer.
        setting: What :func:`lynx.attach` takes.
        batch: Sequences per batch; the last one may be smaller.
        max_new_tokens: Longest answer.
        advance: Called after each batch.
    """
    right = 0
    with attach(subject.model, setting, tpot_ms=None), torch.inference_mode():  # not by how fast this machine is
        for start in range(0, len(examples), batch):
            asked = examples[start : start + batch]
            texts = generate(subject, [example.prompt for example in asked], max_new_tokens)
            right += sum(example.solved_by(text) for example, text in zip(asked, texts, strict=True))
            advance()
    return wilson(right, len(examples))


def questions(examples: Sequence[Example], count: int, seed: int = 0) -> list[Example]:
    """Draw examples with an answer.

    Raises:
        ConfigError: None has one.
    """
    with_answer = [example for example in examples if example.answer is not None]
    if not with_answer:
        raise ConfigError("no example has an `answer` to generate towards; leave generation out, or give answers.")
    random.Random(seed).shuffle(with_answer)
    return with_answer[:count]
