"""Choosing a setting for every layer of a user's model: measure, share out, verify."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lynx.attachment import discover
from lynx.config import Config, resolve_config
from lynx.errors import ConfigError
from lynx.measuring.answers import answer, questions
from lynx.measuring.batches import ForcedBatch
from lynx.measuring.evaluate import Protocol
from lynx.measuring.examples import Example, examples_hash, split
from lynx.measuring.intervals import Estimate
from lynx.measuring.origin import origin
from lynx.measuring.quality import Quality, measure
from lynx.measuring.subject import Subject
from lynx.standins import StandIns
from lynx.tuning.allocation import Allocation, allocations
from lynx.tuning.candidates import EXACT, Strategy, answered, candidates
from lynx.tuning.everywhere import best_path, everywhere, rules
from lynx.tuning.goal import Goal, Trial, passes
from lynx.tuning.search import expected, search
from lynx.tuning.sensitivity import Progress, sensitivities


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured.

    Attributes:
        share: Of the examples by which settings are chosen; the others verify them.
        candidates: Most candidates for a layer, 0 for all.
        rounds: Most verifications.
        uniform: Settings that are the same in every layer, measured to compare with.
        seed: Of the split.
        standins: What answers for lost slots in every setting that is tried; None for re-picking.
    """

    share: float = 0.5
    candidates: int = 0
    rounds: int = 6
    uniform: int = 8
    seed: int = 0
    standins: StandIns | None = None


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was chosen, and what it is worth.

    Attributes:
        goal: What was wanted.
        chosen: The trial that met it best; None if none did.
        trials: All trials, the chosen one last.
        path: What was predicted, from exact to the strongest.
        uniform: The same settings in every layer, measured on the same text as the trials.
        conditions: What was run on what.
        standins: What answers for lost slots.
    """

    goal: Goal
    chosen: Trial | None
    trials: tuple[Trial, ...]
    path: tuple[Allocation, ...]
    uniform: tuple[Quality, ...]
    conditions: dict[str, Any]
    standins: StandIns | None = None

    @property
    def config(self) -> Config:
        """The chosen setting with the evidence for it.

        Raises:
            ConfigError: No setting met the goal.
        """
        if self.chosen is None:
            raise ConfigError(
                f"no setting was verified to give {self.goal}; the closest had {_closest(self.goal, self.trials)}. "
                "Give a wider limit, or more text: a limit on KL must hold for the upper end of its interval."
            )
        chosen = answered(self.chosen.allocation.config, self.standins)
        return Config.build({**dict(chosen), "evidence": self.evidence})

    @property
    def evidence(self) -> dict[str, Any]:
        """What the chosen setting rests on, as plain data."""
        assert self.chosen is not None
        return {"goal": str(self.goal), **figures(self.chosen), **self.conditions}


def tune(
    subject: Subject,
    examples: Sequence[Example],
    goal: Goal,
    protocol: Protocol | None = None,
    effort: Effort | None = None,
    seconds: Callable[[Sequence[float]], float] | None = None,
    weights: Sequence[float] | None = None,
    keep: Path | None = None,
    advance: Callable[[str], None] = lambda what: None,
) -> Tuned:
    """Choose a setting for every layer.

    Args:
        subject: The model, not attached.
        examples: The user's text; a part of it chooses, the rest verifies.
        goal: What is wanted.
        protocol: Batch size and length of the measurements, and how many questions are asked.
        effort: How much is measured.
        seconds: Predicts the time per output token from each layer's active experts.
        weights: What an active expert of each layer costs; 1 each without.
        keep: Where sensitivities are kept, so that an interrupted run goes on where it was.
        advance: Called with a few words as the work goes on, :func:`rounds` times at most.

    Raises:
        ConfigError: The goal needs what was not given, or the examples make no batch.
        UnsupportedModelError: No adapter can take the model.
    """
    protocol, effort = protocol or Protocol(), effort or Effort()
    if goal.kind == "max-drop" and not protocol.questions:
        raise ConfigError("a limit on the drop of answers needs questions; ask some (--questions).")
    if goal.kind == "target-tpot" and seconds is None:
        raise ConfigError("a target in time needs a latency model; fit one with `lynx bench --fit` and give it.")
    first, second = split(examples, effort.share, effort.seed)
    choosing, verifying = (protocol.batches(part, subject.pad_id) for part in (first, second))
    layers = len(discover(subject.model).layers)
    if weights is not None and len(weights) != layers:
        raise ConfigError(f"the latency model has {len(weights)} layers, {subject.name} has {layers} MoE layers.")
    offered = candidates(effort.candidates)
    of = {
        "model": [subject.name, fingerprint(subject.model)],
        "versions": [origin(subject.model)[name] for name in ("lynx", "torch", "transformers", "device", "dtype")],
        "data": examples_hash(first),
        "batches": [protocol.batch, protocol.columns, protocol.mix, list(protocol.seeds), protocol.most_batches],
        "candidates": offered,
        **_named(effort.standins),
    }
    progress = Progress(of=of) if keep is None else Progress.read(keep, of)

    def looked() -> None:
        advance("layer by layer")

    curves = sensitivities(subject.model, layers, offered, choosing, progress, keep, looked, effort.standins)
    path = allocations(curves, weights)

    def spent(each: Allocation) -> float:
        return _spent(goal, each, seconds)

    def jointly(each: Allocation) -> Quality:
        config = answered(each.config, effort.standins)
        return measure(subject.model, choosing, [config], lambda: advance("all layers"))[0]

    same = everywhere([progress.layers[layer] for layer in range(layers)], offered)
    path = best_path(path, same, expected(path, goal, spent, 1.0), jointly, weights)
    verify = Verify(subject, second, verifying, goal, protocol, seconds, advance, effort.standins)
    trials = search(path, goal, spent, verify, effort.rounds)
    chosen = trials[-1] if trials and trials[-1].passed else None
    same_everywhere = [resolve_config(strategy, {}) for strategy in _uniform(offered, effort.uniform)]
    compared = [answered(config, effort.standins) for config in same_everywhere]
    uniform = measure(subject.model, verifying, compared, lambda: advance("the same in every layer"))
    conditions = {
        **origin(subject.model),
        "model": subject.name,
        "data": examples_hash(examples),
        "examples_choosing": len(first),
        "examples_verifying": len(second),
        "questions": verify.asked,
        "batches_choosing": len(choosing),
        "batches_verifying": len(verifying),
        "batch": protocol.batch,
        "columns": protocol.columns,
        "mix": protocol.mix,
        "seed": effort.seed,
        **_named(effort.standins),
    }
    return Tuned(goal, chosen, tuple(trials), tuple(path), tuple(uniform), conditions, effort.standins)


def figures(trial: Trial) -> dict[str, Any]:
    """Return what was verified of a setting, as plain data."""
    quality = trial.quality
    found = {
        "kl": asdict(trial.kl),
        "loss_rise": asdict(quality.rise),
        "top1_agreement": asdict(quality.mean("agree")),
        "active_experts": round(quality.active_mean(), 3),
        "active_experts_before": round(quality.active_mean("before"), 3),
        "kept_mass_worst": round(quality.kept_mass_worst, 4),
        "answered_mass_mean": round(quality.answered_mass_mean, 4),
        "answered_mass_most": round(quality.answered_mass_most, 4),
        "predicted_kl": trial.allocation.loss,
    }
    if trial.answers is not None and trial.exact_answers is not None:
        found |= {"answers": asdict(trial.answers), "answers_exact": asdict(trial.exact_answers)}
    if trial.seconds is not None:
        found["predicted_seconds_per_token"] = trial.seconds
    return found


def _named(standins: StandIns | None) -> dict[str, Any]:
    """Stand-ins by their options and a hash of their file; nothing without any."""
    if standins is None:
        return {}
    code = hashlib.sha256(standins.file.read_bytes()).hexdigest()[:16] if standins.file.is_file() else "none"
    return {"standins": [standins.mode, standins.rank, code]}


def fingerprint(model: Any) -> str:
    """Return a hash of a few of every parameter's values: other weights are another model, whatever it is called."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        some = parameter.detach().flatten()[:: max(1, parameter.numel() // 16)][:16]
        digest.update(f"{name} {tuple(parameter.shape)} {some.float().cpu().tolist()}".encode())
    return digest.hexdigest()[:16]


def rounds(subject: Subject, examples: Sequence[Example], protocol: Protocol, effort: Effort) -> int:
    """How often :func:`tune` calls ``advance``, at most."""
    first, second = split(examples, effort.share, effort.seed)
    choosing, verifying = (len(protocol.batches(part, subject.pad_id)) for part in (first, second))
    layers, offered = len(discover(subject.model).layers), candidates(effort.candidates)
    jointly = 1 + 2 * len(rules(offered))
    return (layers * len(offered) + jointly) * choosing + (effort.rounds + effort.uniform) * verifying


class Verify:
    """Measures an allocation on text that it was not chosen by.

    Args:
        subject: The model, not attached.
        examples: The text, for questions.
        batches: The text, as decode batches.
        goal: What is wanted.
        protocol: Batch size, and how many questions are asked.
        seconds: Predicts the time per output token from each layer's active experts.
        advance: Called after each batch.
        standins: What answers for lost slots.
    """

    def __init__(
        self,
        subject: Subject,
        examples: Sequence[Example],
        batches: Sequence[ForcedBatch],
        goal: Goal,
        protocol: Protocol,
        seconds: Callable[[Sequence[float]], float] | None,
        advance: Callable[[str], None],
        standins: StandIns | None = None,
    ) -> None:
        self._subject, self._batches, self._goal, self._protocol = subject, batches, goal, protocol
        self._seconds, self._advance, self._standins = seconds, advance, standins
        self._asked = questions(examples, protocol.questions) if protocol.questions else []
        self._exact = self._answers(EXACT)
        if goal.kind == "max-drop" and self._exact is not None and self._exact.value <= goal.value:
            raise ConfigError(
                f"the model answers {self._exact.value:.1%} of {len(self._asked)} questions, so that no setting could "
                f"lose more than {goal.value:.1%}; ask more, allow longer answers (--max-new-tokens), or see how "
                "answers are checked."
            )

    @property
    def asked(self) -> int:
        """How many questions there were to ask."""
        return len(self._asked)

    def __call__(self, allocation: Allocation, config: Config | None = None) -> Trial:
        """Verify an allocation, or a configuration that it is a part of."""
        config = config or answered(allocation.config, self._standins)
        (quality,) = measure(self._subject.model, self._batches, [config], lambda: self._advance("verifying"))
        answers = self._answers(config)
        seconds = None if self._seconds is None else self._seconds(quality.active())
        passed = passes(self._goal, quality, answers, self._exact, seconds)
        return Trial(allocation, quality, answers, self._exact, seconds, passed)

    def _answers(self, setting: Any) -> Estimate | None:
        if not self._asked:
            return None
        return answer(self._subject, self._asked, setting, self._protocol.batch, self._protocol.max_new_tokens)


def _spent(goal: Goal, allocation: Allocation, seconds: Callable[[Sequence[float]], float] | None) -> float:
    if goal.kind == "target-tpot" and seconds is not None:
        return seconds(allocation.by_layer)
    return allocation.share


def _uniform(offered: Sequence[Strategy], count: int) -> list[Strategy]:
    """Candidates that the chosen setting is compared with, spread over what was offered."""
    last = len(offered) - 1
    places = dict.fromkeys(round(place * last / max(count - 1, 1)) for place in range(count))
    return [offered[place] for place in places]


def _closest(goal: Goal, trials: Sequence[Trial]) -> str:
    if goal.of_loss:
        best = min(trials, key=lambda trial: trial.kl.high)
        answers = "" if best.answers is None else f" and {best.answers.value:.1%} of the answers"
        return f"a KL of {best.kl}{answers} at {best.quality.share:.0%} of the experts"
    least = min(trials, key=lambda trial: trial.quality.share)
    return f"{least.quality.share:.0%} of the experts" + ("" if least.seconds is None else f", {least.seconds:.3g} s")
