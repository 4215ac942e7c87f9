"""True batched generation, up to stop tokens or stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lynx.measuring.batches import align
from lynx.measuring.subject import Subject


def generate(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    until: Sequence[str] = (),
    **options: Any,
) -> list[str]:
    """Generate in one batch, greedily unless the options say otherwise; return each text without what stopped it.

    Args:
        subject: The model, as it is: under the setting that is attached to it.
        prompts: ``B`` prompts in tokens; they are padded on the left.
        max_new_tokens: Longest text.
        until: Strings that end a text. A row that has reached one is fed padding from then on, as one that has reached
            a stop token is, and has no vote in its batch any more.
        options: Of ``generate`` of transformers.
    """
    strings, stop_ids = _stops(subject, until)
    batch = align(prompts, [()] * len(prompts), subject.pad_id)
    device = subject.model.device
    if strings:
        options["stopping_criteria"] = [StopStrings(subject.decode, strings, batch.prompt_columns)]
    if stop_ids:
        options["eos_token_id"] = list(stop_ids)
    # rows that have ended are fed this; a stop token of the model's own is always told from text
    fed = (*subject.stop_ids, subject.pad_id)[0]
    # in the model's own configuration, too: it is there that selection looks for what ended rows are fed
    settings = subject.model.generation_config
    named, settings.pad_token_id = settings.pad_token_id, fed
    try:
        tokens = subject.model.generate(
            input_ids=batch.ids.to(device),
            attention_mask=batch.mask.to(device),
            max_new_tokens=max_new_tokens,
            **{"do_sample": False, "pad_token_id": fed, **options},
        )
    finally:
        settings.pad_token_id = named
    return [_text(subject, row, stop_ids, strings) for row in tokens[:, batch.prompt_columns :].tolist()]


class StopStrings:
    """Ends a row whose generated text holds one of some strings; a stopping criterion of transformers.

    Args:
        decode: Turns tokens into text.
        strings: The strings.
        begin: Columns of prompt, which may hold the strings.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], strings: Sequence[str], begin: int) -> None:
        self._decode = decode
        self._strings = strings
        self._begin = begin
        # A token that shows holds a byte at the least. One more, as decoders may swallow a space before the first.
        self._tokens = max(len(string.encode()) for string in strings) + 1
        self._done: list[bool] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Say which of the ``(B, L)`` rows have ended, as ``(B,)`` bool."""
        begin = max(self._begin, input_ids.shape[1] - self._tokens)
        rows = input_ids[:, begin:].tolist()
        done = self._done or [False] * len(rows)
        self._done = [ended or self._ends(row) for ended, row in zip(done, rows, strict=True)]
        return torch.tensor(self._done, device=input_ids.device)

    def _ends(self, row: Sequence[int]) -> bool:
        text = self._decode(row)
        return any(string in text for string in self._strings)


def _stops(subject: Subject, until: Sequence[str]) -> tuple[list[str], tuple[int, ...]]:
    """Split stop strings into those that show in a text and special tokens, which do not."""
    strings, special = [], []
    for string in filter(None, until):
        ids = subject.encode(string)
        if len(ids) == 1 and not subject.decode(ids):
            special += ids
        else:
            strings.append(string)
    return strings, tuple(dict.fromkeys([*subject.stop_ids, *special]))


def _text(subject: Subject, row: Sequence[int], stop_ids: Sequence[int], strings: Sequence[str]) -> str:
    ends = [row.index(stop) for stop in stop_ids if stop in row]
    text = subject.decode(row[: min(ends)] if ends else row)
    for string in strings:
        text = text.partition(string)[0]
    return text
