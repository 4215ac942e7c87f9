"""Batches of held-out prompts: of one kind, as when one job is served, and mixed, as when many users are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lynx.measuring.batches import ForcedBatch, align
from lynx.reference_model import Problem, ReferenceModel
from lynx.reference_model.model import EOS_ID, PAD_ID

Kind = Literal["mixed", "code", "problems"]
KINDS: tuple[Kind, ...] = ("mixed", "code", "problems")


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts to generate from.

    Attributes:
        texts: ``B`` prompts.
        problems: The problems among them by row; rows of code have none.
    """

    texts: tuple[str, ...]
    problems: dict[int, Problem]


def forced_batches(reference: ReferenceModel, kind: Kind, count: int, size: int, columns: int) -> list[ForcedBatch]:
    """Make teacher-forced batches.

    Args:
        reference: Where the prompts come from; batches of all kinds start at the first prompt.
        kind: What a batch is made of; mixed batches are half code, half problems.
        count: Number of batches.
        size: ``B``, sequences per batch.
        columns: Columns of continuation.
    """
    code = iter([(item.prompt, item.continuation.encode()) for item in reference.code])
    # Only solutions that fill the columns, so that every decode batch is as large as it is said to be.
    long_enough = [item for item in reference.problems if len(item.solution) + 1 >= columns]
    problems = iter([(item.prompt, item.solution.encode()) for item in long_enough])
    batches = []
    for _ in range(count):
        share = {"mixed": size // 2, "code": size, "problems": 0}[kind]
        rows = [next(code) for _ in range(share)] + [next(problems) for _ in range(size - share)]
        tokens = [[*text] if index < share else [*text, EOS_ID] for index, (_, text) in enumerate(rows)]
        cut = [row[:columns] for row in tokens]
        batches.append(align([[*prompt.encode()] for prompt, _ in rows], cut, PAD_ID))
    return batches


def prompt_batches(
    reference: ReferenceModel, kind: Literal["mixed", "problems"], count: int, size: int, skip: int = 0
) -> list[PromptBatch]:
    """Make batches to generate from, past the first ``skip`` problems; mixed ones start with code."""
    problems, code = iter(reference.problems[skip:]), iter(reference.code)
    batches = []
    for _ in range(count):
        share = size // 2 if kind == "mixed" else 0
        texts = [next(code).prompt for _ in range(share)]
        chosen = {row: next(problems) for row in range(share, size)}
        batches.append(PromptBatch((*texts, *(problem.prompt for problem in chosen.values())), chosen))
    return batches
