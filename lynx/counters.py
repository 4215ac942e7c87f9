"""Counters of one layer: kept on the device, read only when a report is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lynx.rerouting import Rerouted
from lynx.routing import Phase, Role, Routing

_FIELDS = (
    "steps",
    "exact_steps",
    "padding_rows",
    "exact_rows",
    "open_rows",
    "active_before",
    "active_after",
    "open_active_before",
    "open_active_after",
    "rows_changed",
    "unsound_rows",
)


@dataclass(frozen=True, slots=True)
class PhaseCounts:
    """What one layer counted in one phase; sums over steps unless said otherwise.

    Attributes:
        steps: Batches with at least one row that is not padding.
        exact_steps: Of those, batches without an OPEN row.
        padding_rows: PADDING rows.
        exact_rows: EXACT rows.
        open_rows: OPEN rows.
        active_before: Distinct experts with non-zero weight over all rows but padding, as the model routed.
        active_after: The same after selection.
        open_active_before: Distinct experts over OPEN rows alone, as the model routed.
        open_active_after: The same after selection.
        rows_changed: Rows that lost at least one expert.
        unsound_rows: Rows left exact because a score was not finite.
        kept_mass: Sum over OPEN rows of the share of their own mass that was kept.
        kept_mass_worst: The smallest such share of any OPEN row, 1 if there was none.
        answered_mass: Sum over OPEN rows of the share of their own mass that stand-ins answered for.
        answered_mass_most: The largest such share of any OPEN row.
    """

    steps: int
    exact_steps: int
    padding_rows: int
    exact_rows: int
    open_rows: int
    active_before: int
    active_after: int
    open_active_before: int
    open_active_after: int
    rows_changed: int
    unsound_rows: int
    kept_mass: float
    kept_mass_worst: float
    answered_mass: float = 0.0
    answered_mass_most: float = 0.0


class Counters:
    """Device-resident sums, one row per phase.

    Tensors are made on the first batch, on its device, and changed in place from then on.
    """

    def __init__(self) -> None:
        self.failures = 0
        self._counts: Tensor | None = None
        self._mass: Tensor | None = None
        self._worst: Tensor | None = None
        self._answered: Tensor | None = None

    @torch.no_grad()
    def add(self, routing: Routing, result: Rerouted | None, unsound: Tensor, failed: bool) -> None:
        """Count one batch (or one per leading index); no host synchronisation.

        Args:
            routing: The model's decision with final roles.
            result: What re-routing made of it; None if it was left alone.
            unsound: ``(T,)`` bool rows left exact for scores that are not finite.
            failed: Whether the strategy raised.
        """
        self.failures += failed
        counts, masses, worsts = self.on(routing.ids.device)

        # Masks over rows have the phase before the row, (..., 2, T), and all sums are taken together: on a CPU and on
        # an eager GPU the price of counting is the number of operations, not their size.
        role = routing.role
        in_phase = torch.stack([routing.phase == int(phase) for phase in Phase], dim=-2)
        padding, is_open = role == int(Role.PADDING), role == int(Role.OPEN)
        lost = torch.zeros_like(routing.routed) if result is None else result.lost
        rows = torch.stack([padding, ~(padding | is_open), is_open, lost.any(-1), unsound], dim=-2)
        row_counts = (in_phase.unsqueeze(-2) & rows.unsqueeze(-3)).sum(-1)  # (..., 2, 5)

        live_or_open = torch.stack([~padding, is_open], dim=-2).unsqueeze(-3) & in_phase.unsqueeze(-2)
        live_steps, open_steps = live_or_open.any(-1).unbind(-1)
        step_counts = torch.stack([live_steps, live_steps & ~open_steps], dim=-1)
        distinct = _active(routing, result, live_or_open)
        columns = [step_counts, row_counts[..., :3], distinct.flatten(-2), row_counts[..., 3:]]
        counts += torch.cat(columns, dim=-1).reshape(-1, len(Phase), len(_FIELDS)).sum(0)

        share = 1.0 - routing.slot_mass.masked_fill(~lost, 0.0).sum(-1)
        share = share.clamp(0.0, 1.0).nan_to_num(1.0).unsqueeze(-2)
        counted = in_phase & is_open.unsqueeze(-2)
        masses += share.masked_fill(~counted, 0.0).double().sum(-1).reshape(-1, len(Phase)).sum(0)
        if share.numel():
            worst = share.masked_fill(~counted, 1.0).amin(-1).reshape(-1, len(Phase)).amin(0)
            worsts.copy_(torch.minimum(worsts, worst))

    @torch.no_grad()
    def add_answered(self, routing: Routing, result: Rerouted) -> None:
        """Count what stand-ins answered for in one batch; no host synchronisation."""
        counted = self.answered_on(routing.ids.device)
        assert result.answered is not None
        share = routing.slot_mass.masked_fill(result.answered == 0, 0.0).sum(-1).nan_to_num(0.0).unsqueeze(-2)
        in_phase = torch.stack([routing.phase == int(phase) for phase in Phase], dim=-2)
        share = share.masked_fill(~in_phase, 0.0).double()  # (..., 2, T)
        counted[0] += share.sum(-1).reshape(-1, len(Phase)).sum(0)
        if share.numel():
            most = share.amax(-1).reshape(-1, len(Phase)).amax(0)
            counted[1].copy_(torch.maximum(counted[1], most))

    def read(self) -> dict[Phase, PhaseCounts]:
        """Copy the counters to the host; the only place that waits for the device."""
        if self._counts is None or self._mass is None or self._worst is None or self._answered is None:
            return {phase: _counts([0] * len(_FIELDS), 0.0, 1.0, [0.0, 0.0]) for phase in Phase}
        counts, mass, worst = self._counts.tolist(), self._mass.tolist(), self._worst.tolist()
        answered = self._answered.T.tolist()
        return {phase: _counts(counts[phase], mass[phase], worst[phase], answered[phase]) for phase in Phase}

    def reset(self) -> None:
        """Set everything to zero, in place."""
        self.failures = 0
        if self._answered is not None:
            self._answered.zero_()
        if self._counts is not None and self._mass is not None and self._worst is not None:
            self._counts.zero_()
            self._mass.zero_()
            self._worst.fill_(1.0)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums to add to on a device.

        Returns:
            int64 ``(2, 11)`` counts by phase, float64 ``(2,)`` kept mass, float32 ``(2,)`` its worst.
        """
        device = as_tensors_name(device)
        if self._counts is None or self._counts.device != device:
            self._allocate(device)
        assert self._counts is not None
        assert self._mass is not None
        assert self._worst is not None
        return self._counts, self._mass, self._worst

    def answered_on(self, device: torch.device) -> Tensor:
        """Return what stand-ins answered for on a device: float64 ``(2, 2)``, by phase the sum and the most."""
        self.on(device)
        assert self._answered is not None
        return self._answered

    def _allocate(self, device: torch.device) -> None:
        # An inference tensor could not be changed in place outside of inference mode.
        with torch.inference_mode(False):
            self._counts = torch.zeros(len(Phase), len(_FIELDS), dtype=torch.int64, device=device)
            self._mass = torch.zeros(len(Phase), dtype=torch.float64, device=device)
            self._worst = torch.ones(len(Phase), dtype=torch.float32, device=device)
            self._answered = torch.zeros(2, len(Phase), dtype=torch.float64, device=device)  # sums, and the most


def as_tensors_name(device: torch.device) -> torch.device:
    """Return the device with its index, which a tensor's device has and ``torch.device("cuda")`` lacks."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _counts(columns: list[int], mass: float, worst: float, answered: list[float]) -> PhaseCounts:
    named: dict[str, Any] = dict(zip(_FIELDS, columns, strict=True))
    return PhaseCounts(
        **named, kept_mass=mass, kept_mass_worst=worst, answered_mass=answered[0], answered_mass_most=answered[1]
    )


def _active(routing: Routing, result: Rerouted | None, rows: Tensor) -> Tensor:
    """Count distinct experts with non-zero weight over sets of rows, before and after selection.

    Args:
        routing: The model's decision.
        result: What became of it.
        rows: ``(..., 2, 2, T)`` bool sets of rows.

    Returns:
        ``(..., 2, 2, 2)``: for every set, before and after.
    """
    ids, weights = [routing.ids], [routing.weights]
    if result is not None:
        ids.append(result.ids)
        weights.append(result.weights)
    unused = (torch.stack(weights, dim=-2) == 0) | ~routing.routed.unsqueeze(-2)
    target = torch.stack(ids, dim=-2).long().masked_fill(unused, routing.num_experts)  # (..., T, 1 or 2, k)
    shape = (*target.shape[:-1], routing.num_experts + 1)
    used = torch.zeros(shape, dtype=torch.float32, device=target.device).scatter(-1, target, 1.0)[..., :-1]
    # A product counts the rows of each set that use each expert; whole numbers, so exact in float32.
    users = rows.flatten(-3, -2).float() @ used.flatten(-2)  # (..., 4, 1 or 2 times E)
    distinct = (users.reshape(*users.shape[:-1], len(ids), -1) > 0).sum(-1)
    both: Tensor = distinct.expand(*distinct.shape[:-1], 2)
    return both.reshape(*both.shape[:-2], 2, 2, 2)
