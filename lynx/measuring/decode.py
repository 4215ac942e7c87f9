"""One decode step after the other, on a cache that holds a prompt."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from lynx.demo.cache import as_argument
from lynx.measuring.batches import ForcedBatch, align


def fill_cache(model: Any, batch: ForcedBatch, columns: int) -> Any:
    """Run the first columns of a batch through a model and return the cache that holds them."""
    # imported here: transformers is loaded where there is a model of it, and only there
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(
        input_ids=batch.ids[:, :columns],
        attention_mask=batch.mask[:, :columns],
        position_ids=batch.positions[:, :columns],
        **as_argument(cache, model),
        use_cache=True,
        logits_to_keep=1,
    )
    return cache


def random_batch(
    vocabulary: int, size: int, prompt: int, columns: int, without: tuple[int, ...] = (), seed: int = 0
) -> ForcedBatch:
    """Make a batch of random tokens, which spread over more experts than text does.

    Args:
        vocabulary: Tokens are drawn from 0 up to this.
        size: ``B``, sequences.
        prompt: Tokens of each prompt.
        columns: Tokens of each continuation.
        without: Tokens that are not drawn, such as those that end a sequence.
        seed: Of the draws.
    """
    allowed = torch.tensor([token for token in range(vocabulary) if token not in without])
    generator = torch.Generator().manual_seed(seed)
    drawn = allowed[torch.randint(len(allowed), (size, prompt + columns), generator=generator)].tolist()
    return align([row[:prompt] for row in drawn], [row[prompt:] for row in drawn], pad_id=0)


class DecodeSteps:
    """The decode steps of a batch of known text: the same step may be run again and again, then the next one.

    Args:
        model: The model, not attached: it alone fills the cache.
        batch: The text.
    """

    def __init__(self, model: Any, batch: ForcedBatch) -> None:
        self._model = model
        self._batch = replace(batch, ids=batch.ids.to(model.device), mask=batch.mask.to(model.device))
        self._column = batch.prompt_columns
        with torch.inference_mode():
            self._cache = fill_cache(model, self._batch, self._column)

    @property
    def columns_left(self) -> int:
        """How many steps the text still has; its last token may be its end, and is not run."""
        return self._batch.ids.shape[1] - self._column - 1

    def prepared(self) -> Callable[[], Any]:
        """Return the step on a copy of the cache, so that whoever runs it finds what all others find."""
        return self._on(copy.deepcopy(self._cache), self._column)

    def walk(self) -> Iterator[Callable[[], Any]]:
        """Yield one step after the other up to the end of the text, on one copy of the cache; this goes on nowhere."""
        cache = copy.deepcopy(self._cache)
        for column in range(self._column, self._column + self.columns_left):
            yield self._on(cache, column)

    def advance(self) -> None:
        """Go on to the next step: the model, as it then is, reads the column into the cache."""
        step = self._on(self._cache, self._column)
        with torch.inference_mode():
            step()
        self._column += 1

    def _on(self, cache: Any, column: int) -> Callable[[], Any]:
        batch = self._batch
        arguments = {
            "input_ids": batch.ids[:, column : column + 1],
            "attention_mask": batch.mask[:, : column + 1],
            "position_ids": batch.positions[:, column : column + 1],
            **as_argument(cache, self._model),
            "use_cache": True,
        }
        return lambda: self._model(**arguments)
