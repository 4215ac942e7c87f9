"""What settings take on a user's machine: a decode step and its MoE layers, beside exact routing and no Lynx."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lynx.adapter import FoundLayer
from lynx.attachment import attach, discover
from lynx.config import Config
from lynx.measuring.batches import ForcedBatch, Mix, forced_batches
from lynx.measuring.clock import Clock, StepClock
from lynx.measuring.contenders import Contender, Experts, Measured, contenders, interleave, measure, stock
from lynx.measuring.decode import DecodeSteps, random_batch
from lynx.measuring.examples import Example, examples_hash
from lynx.measuring.latency import BatchLatency, LatencyModel
from lynx.measuring.origin import cache_bytes, origin
from lynx.measuring.subject import Subject
from lynx.measuring.times import TimedRow, latency_of, observe, timed_rows
from lynx.measuring.verdict import Verdict, judge


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchPlan:
    """What is timed.

    Attributes:
        batches: Batch sizes, ``T`` sequences each.
        rounds: Measurements of each contender, interleaved with those of all others.
        experts: What runs the experts under Lynx; ``auto`` leaves it to each setting.
        mix: Whether a batch of text holds all domains or one.
        prompt: Tokens in the cache before the first step, where tokens are random.
        clock: Of a CPU: ``wall``, or ``thread`` to leave out what else the machine does.
    """

    batches: tuple[int, ...] = (1, 4, 16)
    rounds: int = 9
    experts: Experts = "auto"
    mix: Mix = "mixed"
    prompt: int = 128
    clock: Clock = "wall"


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """What was timed at one batch size.

    Attributes:
        batch: ``T``, sequences.
        rows: The model alone, exact routing, the settings, and budgets for the fit.
        latency: The line that was fitted to each layer.
        verdict: Whether selection helps here.
    """

    batch: int
    rows: tuple[TimedRow, ...]
    latency: BatchLatency
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Everything that was timed.

    Attributes:
        batches: By batch size.
        latency: The lines of all batch sizes, to plan with.
        conditions: What was run on what.
    """

    batches: tuple[BatchTimes, ...]
    latency: LatencyModel
    conditions: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        batches = [
            {
                "batch": each.batch,
                "rows": [asdict(row) for row in each.rows],
                "latency": each.latency.model_dump(mode="json"),
                "verdict": asdict(each.verdict),
            }
            for each in self.batches
        ]
        return {"conditions": self.conditions, "batches": batches}


def bench(
    subject: Subject,
    examples: Sequence[Example] | None = None,
    settings: Sequence[Config] = (),
    plan: BenchPlan | None = None,
    advance: Callable[[str], None] = lambda what: None,
    command: str = "",
) -> Benchmark:
    """Time decode steps on a filled cache, all contenders in turn.

    Args:
        subject: The model, not attached, on its device.
        examples: The text; random tokens without it, which flatter.
        settings: Configurations to time beside exact routing and the model alone.
        plan: What is timed; as by default without one.
        advance: Called with a few words after each of the :func:`rounds` of work.
        command: What was asked for on a command line, for the conditions.

    Raises:
        ConfigError: The examples make no batch, or the device cannot be timed.
        UnsupportedModelError: No adapter can take the model.
    """
    plan = plan or BenchPlan()
    layers = discover(subject.model).layers
    clock = StepClock(subject.model, [layer.info.name for layer in layers], plan.clock)
    conditions = _conditions(subject, examples, plan, layers, clock) | ({"command": command} if command else {})
    # all of them first: what is wrong is told before anything runs
    texts = [_text(subject, examples, size, plan) for size in plan.batches]
    with clock:
        batches = tuple(_at(subject, text, layers, settings, plan, clock, examples is None, advance) for text in texts)
    experts = next(row.experts for row in batches[0].rows if row.kind == "budget")
    latency = LatencyModel(
        model=subject.name,
        experts=experts,
        batches=tuple(each.latency for each in batches),
        conditions=conditions,
    )
    return Benchmark(batches, latency, conditions)


def rounds(plan: BenchPlan) -> int:
    """How often :func:`bench` calls ``advance``."""
    return len(plan.batches) * (plan.rounds + 1)


def _at(
    subject: Subject,
    text: ForcedBatch,
    layers: Sequence[FoundLayer],
    settings: Sequence[Config],
    plan: BenchPlan,
    clock: StepClock,
    random_tokens: bool,
    advance: Callable[[str], None],
) -> BatchTimes:
    size = len(text.ids)
    steps = DecodeSteps(subject.model, text)
    infos = [layer.info for layer in layers]
    alone = stock(subject.model, gathered=size * max(info.top_k * info.expert_bytes for info in infos))
    full = min(info.num_experts for info in infos)
    running = contenders(settings, plan.experts, alone, full, _active(subject.model, steps))

    def one(contender: Contender) -> Measured:
        return measure(contender, subject.model, steps, clock)

    def next_step() -> None:
        steps.advance()
        advance(f"batch {size}")

    found = interleave(running, plan.rounds, one, next_step)
    rows = timed_rows(running, found, infos)
    latency = latency_of(size, running, found, infos)
    caches = cache_bytes() if subject.model.device.type == "cpu" else 0
    seen = observe(size, rows, latency, found, infos, caches, plan.clock, random_tokens)
    return BatchTimes(size, rows, latency, judge(seen))


def _active(model: Any, steps: DecodeSteps) -> float:
    """Experts that exact routing wakes in all steps that will be timed, mean over layers."""
    with attach(model, "exact") as handle, torch.inference_mode():
        for step in steps.walk():
            step()
        return handle.report().total["decode"].active_before


def _text(subject: Subject, examples: Sequence[Example] | None, size: int, plan: BenchPlan) -> ForcedBatch:
    """Make one batch that goes on for as many steps as there are rounds."""
    columns = plan.rounds + 2  # one round warms up, and the last token is not run
    if examples is not None:
        return next(forced_batches(examples, size, columns, subject.pad_id, plan.mix))
    config = subject.model.config.get_text_config()
    ends = [getattr(config, name, None) for name in ("eos_token_id", "pad_token_id", "bos_token_id")]
    special = {token for each in ends for token in (each if isinstance(each, (list, tuple)) else [each])}
    without = tuple(token for token in special if token is not None)
    return random_batch(config.vocab_size, size, plan.prompt, columns, (*without, subject.pad_id, *subject.stop_ids))


def _conditions(
    subject: Subject,
    examples: Sequence[Example] | None,
    plan: BenchPlan,
    layers: Sequence[FoundLayer],
    clock: StepClock,
) -> dict[str, Any]:
    return {
        **origin(subject.model),
        "model": subject.name,
        "layers": len(layers),
        "experts_bytes": sum(layer.info.num_experts * layer.info.expert_bytes for layer in layers),
        "timed_layer": clock.contents(),
        "data": "random tokens" if examples is None else examples_hash(examples),
        **asdict(plan),
    }
