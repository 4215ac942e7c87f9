"""How likely continuations are under a setting, each column of continuation as one decode step of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lynx.demo.cache import as_argument
from lynx.errors import MeasureError
from lynx.handle import Handle
from lynx.measuring.batches import align
from lynx.measuring.subject import Subject

_MOST_SCORES = 2**27
"""Next-token scores that are held at a time: half a gigabyte in float32."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A continuation, scored.

    Attributes:
        log_likelihood: Sum of its tokens' log-probabilities, in nats.
        greedy: Whether each of them is the likeliest.
    """

    log_likelihood: float
    greedy: bool


def score(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    handle: Handle,
    stress: bool = False,
    most_scores: int = _MOST_SCORES,
) -> list[Scored]:
    """Score a batch of ``B`` continuations.

    What is run is what serving would run, had it generated them: prompts as prefill, then a decode step for every
    column. The first token of a continuation comes from the prompt, and the last one is not run.

    Args:
        subject: The model.
        prompts: In tokens; one each, at the least.
        continuations: In tokens.
        handle: Of what is attached to the model.
        stress: Take prompts as decode steps, too.
        most_scores: Next-token scores to hold at a time.

    Raises:
        MeasureError: A likelihood is not finite.
    """
    model = subject.model
    batch = align(prompts, continuations, subject.pad_id)
    ids = batch.ids.to(model.device)
    # a text's last token is a target and no input, as are the places behind it
    live = (batch.mask[:, :-1] * batch.mask[:, 1:]).to(model.device)
    positions = (live.cumsum(-1) - 1).clamp_min(0)
    last = batch.prompt_columns - 1  # the column that the first targets are predicted from
    begin = 0 if stress else last
    scored = live.bool() & (torch.arange(live.shape[1], device=model.device) >= last)
    found = torch.zeros(len(ids), dtype=torch.float64, device=model.device)
    greedy = torch.ones(len(ids), dtype=torch.bool, device=model.device)

    read = _reader(model, ids, live, positions)
    if begin:
        read(0, begin, 1)
    vocabulary = model.config.get_text_config().vocab_size
    step = max(1, most_scores // (len(ids) * vocabulary))
    for start in range(begin, live.shape[1], step):
        columns = slice(start, min(start + step, live.shape[1]))
        prompt_columns = int(start == last and not stress)
        with handle.teacher_forced(prompt_columns):
            logits = read(columns.start, columns.stop)
        targets = ids[:, columns.start + 1 : columns.stop + 1]
        chances = logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1).double()
        found += torch.where(scored[:, columns], chances, 0.0).sum(-1)
        greedy &= ((logits.argmax(-1) == targets) | ~scored[:, columns]).all(-1)
    if not bool(found.isfinite().all()):
        raise MeasureError("a text's likelihood is not finite: the model gives out infinite or undefined scores on it.")
    return [Scored(*each) for each in zip(found.tolist(), greedy.tolist(), strict=True)]


def _reader(model: Any, ids: Tensor, live: Tensor, positions: Tensor) -> Any:
    """Return what runs columns on a cache of those before them, and returns their ``(B, q, V)`` logits."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)

    def read(start: int, stop: int, keep: int = 0) -> Tensor:
        logits: Tensor = model(
            input_ids=ids[:, start:stop],
            attention_mask=live[:, :stop],
            position_ids=positions[:, start:stop],
            **as_argument(cache, model),
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        return logits

    return read
