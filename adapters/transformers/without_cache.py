"""Generation without a cache: every step is a whole forward, which nothing tells from a prompt."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lynx.adapters.transformers.step import CACHE_NAMES
from lynx.errors import LynxWarning
from lynx.log import logger


@dataclass(slots=True)
class WithoutCache:
    """Notices a forward that runs the tokens of the one before again, with one more, and says so once.

    Selection in decode finds no step to act on there. It is looked for only in forwards without a cache, where two
    of them fit by shape are their tokens compared.

    Attributes:
        tokens: ``(B, q)`` of the last forward without a cache.
        told: Whether it has been said.
    """

    tokens: Tensor | None = None
    told: bool = False

    def look(self, arguments: Mapping[str, Any], tokens: Any) -> None:
        """Look at one forward.

        Args:
            arguments: Of the backbone, by name.
            tokens: ``(B, q)`` token ids, or None where they are not known.
        """
        if torch.compiler.is_compiling() or self.told:
            return
        before, self.tokens = self.tokens, None
        packed = arguments.get("cu_seq_lens_q") is not None
        if packed or not isinstance(tokens, Tensor) or any(arguments.get(name) is not None for name in CACHE_NAMES):
            return
        if before is not None and _grew(before, tokens):
            self.told = True
            logger.warning("lynx.cache_not_used", tokens=tokens.shape[1])
            message = "generation without a cache runs all tokens again for each new one: it has no decode steps"
            warnings.warn(f"{message}, so nothing is selected; generate with use_cache=True", LynxWarning, 2)
            return
        self.tokens = tokens


def _grew(before: Tensor, tokens: Tensor) -> bool:
    """Whether these are the tokens from before and one more column."""
    if tokens.ndim != 2 or tokens.shape != (before.shape[0], before.shape[1] + 1) or tokens.device != before.device:
        return False
    if tokens.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return torch.equal(tokens[:, :-1], before)
