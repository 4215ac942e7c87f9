"""Models of the recipe and their held-out text, for scripts that measure quality."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lynx.measuring.examples import Example, read_examples, reference_examples
from lynx.measuring.subject import Subject, load_subject


def subject_of(model: str) -> Subject:
    """The reference model, or the folder of another model of the recipe, which reads bytes as it does."""
    reference = load_subject("reference")
    if model == "reference":
        return reference
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True).eval()
    return replace(reference, name=Path(model).name, model=loaded)


def text_of(data: Path | None, subject: Subject, columns: int) -> list[Example]:
    """What the recipe wrote, or the prompts in the package, as much of every domain."""
    return even(reference_examples() if data is None else read_examples(data, subject), columns)


def even(examples: Sequence[Example], columns: int) -> list[Example]:
    """As many examples of every domain, so that no batch is of one alone; those that go on for enough tokens."""
    usable = sorted((each for each in examples if len(each.continuation) >= columns), key=lambda each: each.domain)
    domains = [list(group) for _, group in itertools.groupby(usable, key=lambda each: each.domain)]
    fewest = min(map(len, domains))
    return [example for domain in domains for example in domain[:fewest]]
