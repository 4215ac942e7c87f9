"""Priorities of the sequences of a forward, and the step's rows that they come down to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lynx.adapters.transformers.step import Step
from lynx.errors import ConfigError
from lynx.routing import Role


@dataclass(slots=True)
class Priorities:
    """What the sequences of every forward are worth, while it is set.

    Attributes:
        values: Vote weight of each sequence, None for exact.
        copies: How often ``generate`` repeats each sequence, one copy behind the other.
        rows: ``(B,)`` float32 weights, 0 for exact, copies included; made on the CPU and moved once.
    """

    values: tuple[float | None, ...]
    copies: int = 1
    rows: Tensor = field(init=False)

    def __post_init__(self) -> None:
        given = torch.tensor([0.0 if value is None else value for value in self.values], dtype=torch.float32)
        self.rows = given.repeat_interleave(self.copies)

    def on(self, step: Step) -> Step:
        """Return a step whose rows have the priorities of their sequences.

        Raises:
            ConfigError: The forward has another number of sequences, or packs them into one row.
        """
        if step.sequences != len(self.rows):
            got = f"this forward has {step.sequences}" if step.sequences else "this forward packs them end to end"
            times = f" times {self.copies} copies" if self.copies > 1 else ""
            raise ConfigError(
                f"priorities were given for {len(self.values)} sequences{times}, and {got}; give one for each, and "
                "copies=num_beams * num_return_sequences where generate() repeats them."
            )
        if self.rows.device != step.role.device:
            self.rows = self.rows.to(step.role.device)
        rows = self.rows.repeat_interleave(step.role.shape[0] // step.sequences)
        exact = (rows == 0.0) & (step.role == int(Role.OPEN))
        return replace(step, role=step.role.masked_fill(exact, int(Role.EXACT)), priority=rows)
