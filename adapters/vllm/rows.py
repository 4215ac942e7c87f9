"""What the rows of the step under way may do: written by the host before the step, read on the device by every hook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lynx.routing import Phase, Role


@dataclass(frozen=True, slots=True)
class Requests:
    """The requests of a step, in the order of their rows.

    Attributes:
        scheduled: Tokens of each in this step, ``(R,)``.
        computed: Tokens of each that are in the cache, ``(R,)``; what was drafted may be counted too.
        prompt: Tokens that each came with, ``(R,)``.
        exact: Whether each asked for exact routing, ``(R,)`` bool.
        priority: What the votes of each are worth, ``(R,)`` float32; None where all are alike.
    """

    scheduled: Any
    computed: Any
    prompt: Any
    exact: Any
    priority: Any = None


class StepRows:
    """Role and phase of every row of a step, for the hooks of one installation.

    A request is in decode if its prompt is behind it. If more than ``max_decode_q`` tokens of it are here, they are
    drafts to be verified, and exact.

    Args:
        width: Most rows of a step.
        device: Where the model runs.
        max_decode_q: Longest query that may be re-routed.

    Attributes:
        kinds: ``(2, width)`` int8, roles and phases. Captured graphs read it, so that it is written and never replaced.
            Rows of no request are padding, and so is all that vLLM runs before its first step.
        votes: ``(width,)`` float32, what the votes of a row are worth; written like `kinds`.
        deciding: Whether a row is open in decode, as the host knows; True until a step was written.
        total: Rows of requests, 0 until a step was written.
        tokens: How many rows are open, where the step brings each of its requests one token of decode: what it takes is
            the time of an output token then. None for other steps.
    """

    def __init__(self, width: int, device: torch.device, max_decode_q: int = 1) -> None:
        self.kinds = torch.zeros((2, width), dtype=torch.int8, device=device)
        self.votes = torch.ones(width, dtype=torch.float32, device=device)
        self._weighed = False
        self.deciding, self.total = True, 0
        self.tokens: int | None = None
        self._max_decode_q, self._silent = max_decode_q, False

    @property
    def silent(self) -> bool:
        """While True every row is padding, which hooks leave alone; those in captured graphs, too."""
        return self._silent

    @silent.setter
    def silent(self, value: bool) -> None:
        self._silent = value
        if value:
            self.kinds.zero_()

    def write(self, requests: Requests) -> None:
        """Write the step that comes next; does not wait for the device."""
        self.tokens = None
        if self._silent:
            return
        kinds = np.zeros(tuple(self.kinds.shape), dtype=np.int8)
        decode = requests.computed >= requests.prompt
        exact = requests.exact | (decode & (requests.scheduled > self._max_decode_q))
        roles = np.where(exact, int(Role.EXACT), int(Role.OPEN))
        phases = np.where(decode, int(Phase.DECODE), int(Phase.PREFILL))
        self.total = int(np.sum(requests.scheduled))
        rows = min(self.total, kinds.shape[1])
        kinds[0, :rows] = np.repeat(roles, requests.scheduled)[:rows]
        kinds[1, :rows] = np.repeat(phases, requests.scheduled)[:rows]
        self.deciding = bool((decode & ~exact).any())
        if (decode & (requests.scheduled == 1)).all():
            self.tokens = int((~exact).sum())
        _put(kinds, self.kinds)
        if requests.priority is not None or self._weighed:
            votes = np.ones(len(self.votes), dtype=np.float32)
            if requests.priority is not None:
                votes[:rows] = np.repeat(requests.priority, requests.scheduled)[:rows]
            self._weighed = requests.priority is not None
            _put(votes, self.votes)

    def read(self, rows: int) -> tuple[Tensor, Tensor] | None:
        """Roles and phases of the first ``rows`` rows, ``(T,)`` each; None for more than there can be."""
        return (self.kinds[0, :rows], self.kinds[1, :rows]) if rows <= self.kinds.shape[1] else None


def _put(written: Any, there: Tensor) -> None:
    given = torch.from_numpy(written)
    # memory that is not pinned would make the copy wait for the device
    there.copy_(given.pin_memory() if there.is_cuda else given, non_blocking=True)
