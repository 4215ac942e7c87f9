"""The plan of one layer's execution: which experts run, over which slots, and where each slot's result will lie.

Symbols: T tokens, k slots per token, E experts, S = T * k slots. Slot `t * k + j` is the j-th slot of token t. A slot
is run if its weight is not zero and its id is an expert; A experts are active and R slots are run.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan on the device, in one contiguous int32 tensor whose length depends on E and S alone.

    | part | length | meaning |
    |---|---|---|
    | `count` | 1 | A, how many experts are active |
    | `experts` | E | the active experts, ascending; -1 from A on |
    | `offsets` | E + 1 | the first sorted row of each active expert; R from A on |
    | `slots` | S | the slot of each sorted row, by expert and then by slot; -1 from R on |
    | `place` | S | the sorted row of each slot; -1 for a slot that is not run |

    The rows of the a-th active expert are `offsets[a]` to `offsets[a + 1]`.
    """

    buffer: Tensor
    num_experts: int
    num_slots: int

    @staticmethod
    def size(num_experts: int, num_slots: int) -> int:
        """Return the length of the buffer of a plan for E experts and S slots."""
        return 2 * num_experts + 2 + 2 * num_slots

    @property
    def count(self) -> Tensor:
        """How many experts are active `(1,)`."""
        return self.buffer[:1]

    @property
    def experts(self) -> Tensor:
        """The active experts `(E,)`, then -1."""
        return self.buffer[1 : 1 + self.num_experts]

    @property
    def offsets(self) -> Tensor:
        """The first sorted row of each active expert `(E + 1,)`, then the number of rows."""
        return self.buffer[1 + self.num_experts : 2 * self.num_experts + 2]

    @property
    def slots(self) -> Tensor:
        """The slot of each sorted row `(S,)`, then -1."""
        start = 2 * self.num_experts + 2
        return self.buffer[start : start + self.num_slots]

    @property
    def place(self) -> Tensor:
        """The sorted row of each slot `(S,)`; -1 for a slot that is not run."""
        start = 2 * self.num_experts + 2 + self.num_slots
        return self.buffer[start : start + self.num_slots]


def make_plan(ids: Tensor, weights: Tensor, num_experts: int) -> Plan:
    """Make a plan in plain torch: static shapes, no wait for the device.

    Args:
        ids: Expert of each slot `(T, k)`, any integer type. Slots with ids outside [0, E) are not run.
        weights: Combine weight of each slot `(T, k)`. Slots with weight 0 are not run.
        num_experts: E.

    Returns:
        The plan, on the device of `ids`.
    """
    E, S, device = num_experts, ids.numel(), ids.device
    flat = ids.reshape(-1).long()
    run = (weights.reshape(-1) != 0) & (flat >= 0) & (flat < E)  # (S,)
    expert, slot = torch.where(run, flat, E).sort(stable=True)  # slots that are not run sort behind every expert
    each = torch.arange(E, device=device)
    ends = torch.searchsorted(expert, each, right=True)
    starts = torch.searchsorted(expert, each)
    rows = run.sum().view(1)  # (1,): R

    active = ends > starts
    rank = torch.where(active, active.cumsum(0) - 1, E)  # E is a place that is cut off again
    experts = torch.full((E + 1,), -1, device=device).scatter(0, rank, each)[:E]
    # From A on stands R; the cut-off place takes what the inactive experts write.
    rank = torch.where(active, rank, E + 1)
    offsets = rows.expand(E + 2).scatter(0, rank, starts)[: E + 1]

    row = torch.arange(S, device=device)
    slots = torch.where(row < rows, slot, -1)
    place = torch.empty_like(slot).scatter(0, slot, torch.where(row < rows, row, -1))
    parts = (active.sum().view(1), experts, offsets, slots, place)
    return Plan(torch.cat([part.to(torch.int32) for part in parts]), E, S)
