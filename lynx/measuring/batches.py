"""Decode batches of known text: token t of every sequence is one decode step."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from lynx.errors import ConfigError
from lynx.measuring.examples import Example

Mix = Literal["mixed", "similar"]


class HasDomain(Protocol):
    """What batches are made of."""

    @property
    def domain(self) -> str:
        """What kind of text it is."""
        ...


_Item = TypeVar("_Item", bound=HasDomain)


@dataclass(frozen=True, slots=True)
class ForcedBatch:
    """Prompts with their true continuations, aligned so that every continuation starts in the same column.

    Attributes:
        ids: ``(B, L)`` tokens; prompts are padded on the left, continuations on the right.
        mask: ``(B, L)``, 1 for tokens.
        prompt_columns: Columns before the continuation.
        scored: ``(B, L - 1)`` bool: places whose next token is predicted from a decode column and is a token.
        examples: Which text each row is, so that what was measured of one twice is not taken for two; ``B`` of them.
    """

    ids: Tensor
    mask: Tensor
    prompt_columns: int
    scored: Tensor
    examples: tuple[int, ...] = ()

    @property
    def positions(self) -> Tensor:
        """``(B, L)`` positions that count tokens only, as ``generate`` does."""
        return (self.mask.cumsum(-1) - 1).clamp_min(0)


def forced_batches(
    examples: Sequence[Example], size: int, columns: int, pad_id: int, mix: Mix = "mixed", seed: int = 0
) -> Iterator[ForcedBatch]:
    """Make batches of examples drawn without putting back, one after the other until they run out.

    Args:
        examples: Those with a shorter continuation than ``columns`` are left out, so that every decode batch is as
            large as it is said to be.
        size: ``B``, sequences per batch.
        columns: Columns of continuation.
        pad_id: What rows are filled up with.
        mix: ``mixed`` batches hold every domain, in equal parts as far as they last; ``similar`` ones are of one.
        seed: Of the order.

    Raises:
        ConfigError: Not one batch can be made.
    """
    places = {id(example): place for place, example in enumerate(examples)}
    long_enough = [example for example in examples if len(example.continuation) >= columns]
    batches = list(grouped(long_enough, size, mix, seed))
    if not batches:
        one = "of one domain " if mix == "similar" else ""
        raise ConfigError(
            f"{len(long_enough)} of {len(examples)} examples {one}go on for {columns} tokens or more, which makes no "
            f"batch of {size}; give more text, or a smaller batch or fewer columns."
        )
    for group in batches:
        made = align(
            [example.prompt for example in group], [example.continuation[:columns] for example in group], pad_id
        )
        yield replace(made, examples=tuple(places[id(example)] for example in group))


def align(prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], pad_id: int) -> ForcedBatch:
    """Put prompts with their continuations side by side, all continuations starting in the same column."""
    start, columns = max(map(len, prompts)), max(map(len, continuations))
    ids = torch.full((len(prompts), start + columns), pad_id)
    mask = torch.zeros_like(ids)
    for row, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        tokens = [*prompt, *continuation]
        begin = start - len(prompt)
        ids[row, begin : begin + len(tokens)] = torch.tensor(tokens)
        mask[row, begin : begin + len(tokens)] = 1
    scored = mask[:, 1:].bool() & (torch.arange(start + columns - 1) >= start)
    return ForcedBatch(ids, mask, start, scored)


def grouped(items: Sequence[_Item], size: int, mix: Mix, seed: int) -> Iterator[list[_Item]]:
    """Draw whole batches of items without putting back; the same for the same domains in the same order."""
    domains = [list(group) for _, group in itertools.groupby(sorted(items, key=_domain), key=_domain)]
    chance = random.Random(seed)
    for domain in domains:
        chance.shuffle(domain)
    if mix == "mixed":
        # one of each domain in turn, so that a batch is never of one kind while there are others
        turns = itertools.zip_longest(*domains)
        domains = [[item for turn in turns for item in turn if item is not None]]
    made = [domain[i : i + size] for domain in domains for i in range(0, len(domain) - size + 1, size)]
    chance.shuffle(made)
    yield from made


def _domain(item: HasDomain) -> str:
    return item.domain
