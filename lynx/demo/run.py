"""Run the demo: every setting on the same batches, then its time on layers of a real shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

import lynx
from lynx.attachment import attach
from lynx.demo import speed
from lynx.demo.batches import KINDS, Kind, forced_batches, prompt_batches
from lynx.demo.quality import Answers, Forced, answers, forced_quality, prefill
from lynx.demo.settings import EXACT, FULL, QUICK, Setting, label
from lynx.measuring.origin import processor
from lynx.reference_model import ReferenceModel, load_reference_model


@dataclass(frozen=True, slots=True)
class Plan:
    """How much the demo measures.

    Attributes:
        settings: What is compared with exact routing.
        batch: ``B``, sequences per batch.
        forced: Teacher-forced batches of each kind.
        columns: Columns of continuation in them.
        generated: Batches generated of problems alone, and as many of mixed prompts.
        max_new_tokens: Longest answer.
        rounds: Rounds of timing, 0 for none.
        layers: Most layers of the timing model.
    """

    settings: tuple[Setting, ...]
    batch: int
    forced: int
    columns: int
    generated: int
    max_new_tokens: int
    rounds: int
    layers: int


FULL_PLAN = Plan(FULL, batch=16, forced=6, columns=64, generated=3, max_new_tokens=112, rounds=7, layers=3)
QUICK_PLAN = Plan(QUICK, batch=16, forced=1, columns=64, generated=1, max_new_tokens=112, rounds=5, layers=1)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured of one setting.

    Attributes:
        setting: The strategy and its options.
        forced: Distribution, by kind of batch.
        answers: Held-out problems answered, over batches of problems and mixed ones.
        timing: Decode time on the second model, None if it was not timed.
    """

    setting: Setting
    forced: dict[Kind, Forced]
    answers: Answers
    timing: speed.Timing | None = None

    @property
    def label(self) -> str:
        """The setting in one phrase."""
        return label(self.setting)

    @property
    def share(self) -> float:
        """Active experts under the policy by those of exact routing, on mixed batches."""
        return self.forced["mixed"].active_after / self.forced["mixed"].active_before


@dataclass(frozen=True, slots=True)
class Results:
    """Everything the demo measured.

    Attributes:
        exact: Exact routing with Lynx attached.
        outcomes: The settings, best trade first.
        conditions: What was run on what.
    """

    exact: Outcome
    outcomes: tuple[Outcome, ...]
    conditions: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        rows = []
        for outcome in (self.exact, *self.outcomes):
            low, high = outcome.answers.interval
            rows.append(
                {
                    "setting": outcome.setting,
                    "label": outcome.label,
                    "on_frontier": on_frontier(outcome, self.outcomes),
                    "forced": {kind: asdict(part) for kind, part in outcome.forced.items()},
                    "exact_match": {
                        "right": outcome.answers.right,
                        "n": outcome.answers.asked,
                        "share": outcome.answers.share,
                        "low_95": low,
                        "high_95": high,
                    },
                    "decode_time": None if outcome.timing is None else asdict(outcome.timing),
                }
            )
        return {"conditions": self.conditions, "outcomes": rows}


def run(plan: Plan, advance: Callable[[str], None] = lambda what: None) -> Results:
    """Measure all settings of a plan.

    Everything runs on one thread: on a shared machine two threads spin against each other, and the sums of one
    thread come out the same every time.

    Args:
        plan: What to measure.
        advance: Called with a few words after each of the :func:`steps` of a plan.
    """
    with _one_thread():
        reference = load_reference_model()
        outcomes = _quality(reference, plan, advance)
        layers = min(plan.layers, speed.layers_that_fit()) if plan.rounds else 0
        outcomes = _timed(outcomes, layers, plan, advance)
    exact, *rest = outcomes
    conditions = {
        "lynx": lynx.__version__,
        "torch": torch.__version__,
        "processor": processor(),
        "threads": 1,
        "batch": plan.batch,
        "reference_model": {
            "weights": "float32",
            "parameters": sum(p.numel() for p in reference.model.parameters()),
            "layers": reference.model.config.num_hidden_layers,
            "experts": reference.model.config.num_experts,
            "top_k": reference.model.config.num_experts_per_tok,
        },
        "forced_batches_per_kind": plan.forced,
        "continuation_columns": plan.columns,
        "generated_batches_per_kind": plan.generated,
        "timing_model": _timing_conditions(layers, plan),
    }
    return Results(exact, tuple(best_first(rest)), conditions)


def steps(plan: Plan) -> int:
    """Return how often :func:`run` calls ``advance``."""
    return 2 + 2 * (len(plan.settings) + 1) + (plan.rounds + 1 if plan.rounds else 0)


def best_first(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Order by trade: settings that no other beats on both experts and KL first, then by KL per share saved."""

    def price(outcome: Outcome) -> tuple[bool, float]:
        saved = max(1.0 - outcome.share, 1e-6)
        return not on_frontier(outcome, outcomes), outcome.forced["mixed"].kl / saved

    return sorted(outcomes, key=price)


def on_frontier(outcome: Outcome, others: Sequence[Outcome]) -> bool:
    """Say whether no other setting has both fewer active experts and a smaller KL, on mixed batches."""
    mine = outcome.forced["mixed"]
    return not any(
        other.forced["mixed"].kl < mine.kl and other.forced["mixed"].active_after <= mine.active_after
        for other in others
    )


def _quality(reference: ReferenceModel, plan: Plan, advance: Callable[[str], None]) -> list[Outcome]:
    forced = {kind: forced_batches(reference, kind, plan.forced, plan.batch, plan.columns) for kind in KINDS}
    prompts = [
        *prompt_batches(reference, "problems", plan.generated, plan.batch),
        *prompt_batches(reference, "mixed", plan.generated, plan.batch, skip=plan.generated * plan.batch),
    ]
    advance("exact routing")
    prefilled = {kind: prefill(reference.model, forced[kind]) for kind in KINDS}
    advance("exact routing")
    outcomes = []
    for setting in (EXACT, *plan.settings):
        quality = {kind: forced_quality(reference.model, setting, prefilled[kind]) for kind in KINDS}
        advance(label(setting))
        outcomes.append(Outcome(setting, quality, answers(reference, setting, prompts, plan.max_new_tokens)))
        advance(label(setting))
    return outcomes


def _timed(outcomes: list[Outcome], layers: int, plan: Plan, advance: Callable[[str], None]) -> list[Outcome]:
    """Time every setting at its own share of active experts; the same share is timed once."""
    if not layers:
        return outcomes
    model = speed.real_shape_model(layers)
    full = _active_alone(model, plan.batch)
    budgets = {outcome.label: max(1, round(outcome.share * full)) for outcome in outcomes if outcome.setting != EXACT}
    times = speed.decode_times(
        model, sorted(set(budgets.values()), reverse=True), plan.batch, plan.rounds, lambda: advance("decode time")
    )
    return [Outcome(o.setting, o.forced, o.answers, times[budgets.get(o.label)]) for o in outcomes]


@torch.inference_mode()
def _active_alone(model: Any, batch: int) -> float:
    """Experts that exact routing wakes per layer in one decode step of the timing model."""
    tokens = torch.randint(2, 512, (batch, 1), generator=torch.Generator().manual_seed(2))
    with attach(model, "exact") as handle, handle.teacher_forced(0):
        model(input_ids=tokens, use_cache=False)
        return handle.report().total["decode"].active_before


def _timing_conditions(layers: int, plan: Plan) -> dict[str, Any] | str:
    if not plan.rounds:
        return "not timed"
    if not layers:
        return f"not timed: a quarter of the free memory is less than one layer of {speed.LAYER_BYTES / 1e9:.1f} GB"
    return {
        "weights": "float32, random",
        "layers": layers,
        "hidden": speed.HIDDEN,
        "intermediate": speed.INTERMEDIATE,
        "experts": speed.EXPERTS,
        "top_k": speed.TOP_K,
        "gigabytes": round(layers * speed.LAYER_BYTES / 1e9, 1),
        "rounds": plan.rounds,
        "baseline": "exact routing with the same experts implementation (experts='lynx')",
        "alone": "the model without Lynx, with its default experts implementation (grouped_mm)",
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
