"""What a verdict rests on: figures of one batch size, and from where on they say something."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Thresholds:
    """From where on a rule speaks.

    Attributes:
        gain: Least share of the model's own step time that half the experts must save to call it help.
        host_share: A GPU waits for the host if work is issued for this share of a step.
        expert_share: A step barely depends on the active experts if less than this share of it does.
        sharing: Active experts by those of one token, below which there is nothing to share.
        saturated: Active experts by all experts, from which on every expert matters to someone, ...
        per_slot: ... if there are fewer experts per slot of a token than this.
        overhead: Time with all experts kept by that of the model alone, above which Lynx costs before it saves.
        break_even: Share of active experts that must suffice to win that back; below, the gain is eaten.
        r_squared: A line that explains less of a layer's time is no ground for predictions.
        own: A machine is busy with something else if the thread has its core for less than this share of a step.
    """

    gain: float = 0.05
    host_share: float = 0.9
    expert_share: float = 0.15
    sharing: float = 1.25
    saturated: float = 0.8
    per_slot: float = 8.0
    overhead: float = 1.05
    break_even: float = 0.5
    r_squared: float = 0.9
    own: float = 0.9


THRESHOLDS = Thresholds()


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What was measured at one batch size, and what is known of the model.

    Attributes:
        batch: ``T``, sequences.
        num_experts: ``E``, mean over layers.
        top_k: ``k``, mean over layers.
        active: Active experts as the model routes, mean over layers.
        alone: Seconds of a step of the model alone, the fastest way that was tried.
        attached: Seconds of a step under Lynx with selection at work and every expert kept.
        by_experts: Seconds of that which depend on the active experts, by the fitted lines.
        r_squared: Of the layer that is described worst.
        experts: What ran the experts under Lynx, as ``model: grouped_mm``.
        host: Share of the step for which the host issued work; None on a CPU.
        own: Share of the step in which the thread had its core; None where that is not known or was not the clock.
        silent: Layers whose router did not decide.
        layers: MoE layers.
        expert_bytes: Bytes of all experts of all layers, 0 where unknown.
        cache_bytes: Last cache before memory, 0 where it does not matter or is unknown.
        random_tokens: Whether there was no text.
    """

    batch: int
    num_experts: float
    top_k: float
    active: float
    alone: float
    attached: float
    by_experts: float
    r_squared: float
    experts: str
    host: float | None = None
    own: float | None = None
    silent: int = 0
    layers: int = 1
    expert_bytes: int = 0
    cache_bytes: int = 0
    random_tokens: bool = False

    @property
    def expert_share(self) -> float:
        """Share of a step that depends on the active experts."""
        return max(self.by_experts, 0.0) / self.attached

    @property
    def ratio_at_half(self) -> float:
        """Predicted time with half the active experts by that of the model alone."""
        return self.half / self.alone

    @property
    def half(self) -> float:
        """Predicted seconds with half the active experts."""
        return self.attached - max(self.by_experts, 0.0) / 2

    @property
    def break_even(self) -> float:
        """Share of the active experts at which Lynx takes as long as the model alone; below 0 if none does."""
        return 1 - (self.attached - self.alone) / self.by_experts if self.by_experts > 0 else -1.0
