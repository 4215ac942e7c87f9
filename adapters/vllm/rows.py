"""What the rows of the step under way may do: written by the host before the step, read on the device by every hook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lynx.adapters.vllm.requests import ExactRequests
from lynx.routing import Phase, Role


@dataclass(frozen=True, slots=True)
class Requests:
    """The requests of a step, in the order of their rows.

    Attributes:
        scheduled: Tokens of each in this step, ``(R,)``.
        computed: Tokens of each that are in the cache, ``(R,)``; what was drafted may be counted too.
        prompt: Tokens that each came with, ``(R,)``.
        exact: Whether each asked for exact routing, ``(R,)`` bool.
    """

    scheduled: Any
    computed: Any
    prompt: Any
    exact: Any


class StepRows:
    """Role and phase of every row of a model's step.

    A request is in decode if its prompt is behind it and no more than ``max_decode_q`` tokens of it are here.

    Args:
        width: Most rows of a step.
        device: Where the model runs.

    Attributes:
        max_decode_q: Longest query that counts as decode.
        kinds: ``(2, width)`` int8, roles and phases. Captured graphs read it, so that it is written and never replaced.
            Rows of no request are padding, and so is all that vLLM runs before its first step.
        deciding: Whether a row is in decode, as the host knows; True until a step was written.
        exact: The requests that ask for exact routing.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.max_decode_q = 1
        self.kinds = torch.zeros((2, width), dtype=torch.int8, device=device)
        self.deciding = True
        self.exact = ExactRequests()

    def write(self, requests: Requests) -> None:
        """Write the step that comes next; does not wait for the device."""
        kinds = np.zeros(tuple(self.kinds.shape), dtype=np.int8)
        decode = (requests.scheduled <= self.max_decode_q) & (requests.computed >= requests.prompt)
        roles = np.where(requests.exact, int(Role.EXACT), int(Role.OPEN))
        phases = np.where(decode, int(Phase.DECODE), int(Phase.PREFILL))
        rows = min(int(np.sum(requests.scheduled)), kinds.shape[1])
        kinds[0, :rows] = np.repeat(roles, requests.scheduled)[:rows]
        kinds[1, :rows] = np.repeat(phases, requests.scheduled)[:rows]
        self.deciding = bool((decode & ~requests.exact).any())
        given = torch.from_numpy(kinds)
        # memory that is not pinned would make the copy wait for the device
        self.kinds.copy_(given.pin_memory() if self.kinds.is_cuda else given, non_blocking=True)

    def read(self, rows: int) -> tuple[Tensor, Tensor] | None:
        """Roles and phases of the first ``rows`` rows, ``(T,)`` each; None for more than there can be."""
        return (self.kinds[0, :rows], self.kinds[1, :rows]) if rows <= self.kinds.shape[1] else None
