"""True batched generation: how many questions a setting answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lynx.attachment import attach
from lynx.errors import ConfigError
from lynx.measuring.batches import align
from lynx.measuring.examples import Example
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
    right, device = 0, subject.model.device
    with attach(subject.model, setting, tpot_ms=None), torch.inference_mode():  # not by how fast this machine is
        for start in range(0, len(examples), batch):
            asked = examples[start : start + batch]
            prompts = align([example.prompt for example in asked], [()] * len(asked), subject.pad_id)
            tokens = subject.model.generate(
                input_ids=prompts.ids.to(device),
                attention_mask=prompts.mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=subject.pad_id,
            )
            for example, row in zip(asked, tokens[:, prompts.prompt_columns :].tolist(), strict=True):
                right += example.solved_by(subject.decode(_until_stop(row, subject.stop_ids)))
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


def _until_stop(row: Sequence[int], stop_ids: Sequence[int]) -> Sequence[int]:
    ends = [row.index(stop) for stop in stop_ids if stop in row]
    return row[: min(ends)] if ends else row
