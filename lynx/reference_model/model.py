"""Load the reference model with its prompts, and turn text into its tokens and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PAD_ID = 256
EOS_ID = 257
STANDINS = Path(__file__).parent / "standins.safetensors"
"""Stand-ins for its experts, made of text such as it was trained on: what is held out can judge them."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A held-out arithmetic word problem.

    Attributes:
        prompt: What the model is given.
        answer: The number it should end on.
        solution: The worked answer, step by step.
        kind: ``single``, ``chain-2`` or ``chain-3``.
    """

    prompt: str
    answer: str
    solution: str
    kind: str

    def solved_by(self, text: str) -> bool:
        """Say whether a completion ends on the right answer."""
        lines = text.strip().splitlines()
        return bool(lines) and lines[-1].strip() == f"Answer: {self.answer}"


@dataclass(frozen=True, slots=True)
class CodePrompt:
    """An excerpt of held-out source code.

    Attributes:
        prompt: What the model is given.
        continuation: How the file goes on.
        source: The file, relative to Python's standard library.
    """

    prompt: str
    continuation: str
    source: str


@dataclass(frozen=True, slots=True)
class ReferenceModel:
    """The model and its held-out prompts.

    Attributes:
        model: A transformers causal language model in float32, in eval mode.
        problems: Held-out word problems.
        code: Held-out source code.
        figures: What was measured of it when it was made, see the model card.
    """

    model: Any
    problems: tuple[Problem, ...]
    code: tuple[CodePrompt, ...]
    figures: dict[str, Any] = field(repr=False)

    @property
    def standins(self) -> Path:
        """The file of stand-ins for its experts, made of text such as it was trained on."""
        return STANDINS

    @staticmethod
    def encode(texts: Sequence[str]) -> dict[str, Tensor]:
        """Turn texts into left-padded ``input_ids`` and ``attention_mask``, each ``(B, L)`` int64: tokens are bytes."""
        rows = [list(text.encode()) for text in texts]
        longest = max((len(row) for row in rows), default=0)
        ids = [[PAD_ID] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    @staticmethod
    def decode(ids: Tensor) -> list[str]:
        """Turn ``(B, L)`` tokens into texts, each up to its end of sequence, without padding."""
        texts = []
        for row in ids.tolist():
            if EOS_ID in row:
                row = row[: row.index(EOS_ID)]
            texts.append(bytes(token for token in row if token < 256).decode(errors="replace"))
        return texts


def load_reference_model() -> ReferenceModel:
    """Load the reference model and its held-out prompts from the installed package.

    Returns:
        The model in float32 and eval mode, on the CPU.

    Example:
        >>> import lynx
        >>> reference = lynx.load_reference_model()
        >>> batch = reference.encode([problem.prompt for problem in reference.problems[:4]])
        >>> tokens = reference.model.generate(**batch, max_new_tokens=80, do_sample=False)
        >>> texts = reference.decode(tokens[:, batch["input_ids"].shape[1] :])
        >>> len(texts)
        4
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    with as_file(files("lynx.reference_model")) as folder:
        # 12 MB need no progress bar
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        finally:
            if shown:
                logging.enable_progress_bar()
        prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
        figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    return ReferenceModel(
        model,
        tuple(Problem(**problem) for problem in prompts["problems"]),
        tuple(CodePrompt(**code) for code in prompts["code"]),
        figures,
    )
