"""One pass of text through a model, with all that its experts are given and what they make of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lynx.adapter import LayerExperts
from lynx.errors import UnsupportedModelError

_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Passage:
    """Text for one forward.

    Attributes:
        inputs: What the model is called with, by keyword, or its one argument.
        live: ``(B, L)`` bool, which places hold a token; None for all.
    """

    inputs: Mapping[str, Any] | Tensor
    live: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many tokens it has, or rows of its one argument."""
        if self.live is not None:
            return int(self.live.sum())
        return len(self.inputs) if isinstance(self.inputs, Tensor) else 0

    @property
    def code(self) -> str:
        """A hash of what the model is called with."""
        named = {"": self.inputs} if isinstance(self.inputs, Tensor) else dict(self.inputs)
        digest = hashlib.sha256()
        for name, value in {**named, "live": self.live}.items():
            told = f"{name} {value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{name} {value!r}"
            digest.update(told.encode())
            if isinstance(value, Tensor):
                digest.update(bytes(value.detach().cpu().double().numpy()))
        return digest.hexdigest()[:16]

    def forward(self, model: Any) -> Any:
        """Call the model."""
        return model(self.inputs) if isinstance(self.inputs, Tensor) else model(**self.inputs)


@dataclass(slots=True)
class Heard:
    """What the experts of one layer were given in one pass: ``(T, H)``, ``(T, k)`` and ``(T, k)``."""

    name: str
    parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Keep it."""
        self.parts.append((hidden.detach(), ids.detach(), weights.detach()))

    def one(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return it.

        Raises:
            UnsupportedModelError: The layer did not run once, over the pass's tokens.
        """
        seen = [len(hidden) for hidden, _, _ in self.parts]
        if seen != [rows]:
            raise UnsupportedModelError(
                f"the experts of layer {self.name!r} ran over {sum(seen)} tokens in {len(seen)} calls, where one pass "
                f"read {rows}; what they are given cannot be told apart by token."
            )
        return self.parts[0]


def listen(model: Any, passage: Passage, layers: Sequence[tuple[str, LayerExperts]]) -> tuple[list[Heard], Any]:
    """Run a pass and keep what the experts of some layers are given, and what the model gives."""
    heard = [Heard(name) for name, _ in layers]
    with ExitStack() as stack, torch.inference_mode():
        for (_, experts), ear in zip(layers, heard, strict=True):
            stack.callback(experts.listen(ear).remove)
        return heard, passage.forward(model)


def outputs_of(experts: LayerExperts, hidden: Tensor, ids: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Run every slot's expert by itself.

    Args:
        experts: The layer's.
        hidden: ``(T, H)``.
        ids: ``(T, k)``.

    Yields:
        Some tokens, and their outputs ``(tokens, k, H)``.
    """
    tokens, k = ids.shape
    step = max(1, _ROWS // k)
    for begin in range(0, tokens, step):
        part = slice(begin, min(begin + step, tokens))
        rows = hidden[part].repeat_interleave(k, dim=0)
        yield part, experts.run(rows, ids[part].reshape(-1)).view(-1, k, hidden.shape[-1])


def doubt(output: Any, rows: int) -> Tensor | None:
    """How open the next token is at each place, ``1 - sum p^2``, ``(T,)`` float32; None if the model gives no logits.

    What an expert adds where the next token is certain does not show, so such places count for little.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim < 2 or logits.shape[:-1].numel() != rows:
        return None
    flat = logits.reshape(rows, -1)
    parts = [torch.softmax(part.float(), dim=-1).square().sum(-1) for part in flat.split(_ROWS)]
    return 1 - torch.cat(parts)
