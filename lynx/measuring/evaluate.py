"""What settings cost on a user's model and text, beside the controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lynx.attachment import discover
from lynx.config import Config
from lynx.measuring.answers import answer, questions
from lynx.measuring.batches import ForcedBatch, Mix, forced_batches
from lynx.measuring.examples import Example, examples_hash
from lynx.measuring.intervals import Estimate
from lynx.measuring.origin import origin
from lynx.measuring.quality import Quality, measure
from lynx.measuring.settings import controls, describe
from lynx.measuring.subject import Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How a setting is measured.

    Attributes:
        batch: ``T``, sequences of a decode batch.
        columns: Decode steps of each batch.
        mix: Whether a batch holds all domains or one.
        seeds: Each makes batches of its own from the same examples.
        most_batches: Most batches of a seed; None for as many as there are.
        stress: Put the prompts under the policy, too.
        questions: Examples with an answer that are generated for; 0 for none.
        max_new_tokens: Longest generated answer.
    """

    batch: int = 16
    columns: int = 64
    mix: Mix = "mixed"
    seeds: tuple[int, ...] = (0,)
    most_batches: int | None = None
    stress: bool = False
    questions: int = 0
    max_new_tokens: int = 128

    def batches(self, examples: Sequence[Example], pad_id: int) -> list[ForcedBatch]:
        """Make the batches of all seeds."""
        made = (list(forced_batches(examples, self.batch, self.columns, pad_id, self.mix, seed)) for seed in self.seeds)
        return [batch for batches in made for batch in batches[: self.most_batches]]


@dataclass(frozen=True, slots=True)
class Row:
    """One setting, measured.

    Attributes:
        setting: Its configuration as plain data.
        label: It in one phrase.
        control: Whether it is there for comparison and was not asked for.
        active_before: Mean active experts per layer and decode step, as the model routes.
        active_after: The same under the setting.
        layers: `active_after` by layer.
        kept_mass_mean: Mean share of a token's own weight that was kept.
        kept_mass_worst: The worst token's share.
        answered_mass_mean: Mean share of a token's own weight that stand-ins answered for.
        answered_mass_most: The largest share of any token.
        kl: KL(exact || policy) in nats per token.
        rise: Rise of the cross-entropy in nats per token.
        agreement: Share of places where both find the same token likeliest.
        answers: Share of questions answered; None where none were asked.
    """

    setting: dict[str, Any]
    label: str
    control: bool
    active_before: float
    active_after: float
    layers: tuple[float, ...]
    kept_mass_mean: float
    kept_mass_worst: float
    answered_mass_mean: float
    answered_mass_most: float
    kl: Estimate
    rise: Estimate
    agreement: Estimate
    answers: Estimate | None

    @property
    def share(self) -> float:
        """Active experts under the setting by those of the model."""
        return self.active_after / self.active_before


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All settings, measured on the same batches.

    Attributes:
        rows: The settings asked for, then the controls.
        conditions: What was run on what.
    """

    rows: tuple[Row, ...]
    conditions: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def evaluate(
    subject: Subject,
    examples: Sequence[Example],
    settings: Sequence[Config],
    protocol: Protocol | None = None,
    advance: Callable[[str], None] = lambda what: None,
) -> Evaluation:
    """Measure settings and the controls.

    Args:
        subject: The model, not attached.
        examples: The text.
        settings: Configurations to measure.
        protocol: How; as by default without one.
        advance: Called with a few words after each of the :func:`rounds` of work.

    Raises:
        ConfigError: The examples make no batch, or none has an answer where answers are asked for.
        UnsupportedModelError: No adapter can take the model.
    """
    protocol = protocol or Protocol()
    rows = with_controls(subject.model, settings)
    batches = protocol.batches(examples, subject.pad_id)
    asked = questions(examples, protocol.questions) if protocol.questions else []
    measured = measure(subject.model, batches, rows, lambda: advance("text"), protocol.stress)
    found = []
    for index, (setting, quality) in enumerate(zip(rows, measured, strict=True)):
        answers = None
        if asked:
            each = protocol.batch, protocol.max_new_tokens, lambda: advance("answers")
            answers = answer(subject, asked, setting, *each)
        found.append(_row(setting, quality, index >= len(settings), answers))
    conditions = {
        **origin(subject.model),
        "model": subject.name,
        "data": examples_hash(examples),
        "examples": len(examples),
        "batches": len(batches),
        "questions": len(asked),
        **asdict(protocol),
    }
    return Evaluation(tuple(found), conditions)


def rounds(subject: Subject, examples: Sequence[Example], settings: Sequence[Config], protocol: Protocol) -> int:
    """How often :func:`evaluate` calls ``advance``."""
    count = len(with_controls(subject.model, settings))
    asked = len(questions(examples, protocol.questions)) if protocol.questions else 0
    return count * (len(protocol.batches(examples, subject.pad_id)) + -(-asked // protocol.batch))


def with_controls(model: Any, settings: Sequence[Config]) -> list[Config]:
    """The settings asked for, then the controls that are not among them."""
    layers = discover(model).layers
    beside = controls(settings, min(layer.info.top_k for layer in layers if not layer.refused))
    return [*settings, *(control for control in beside if control not in settings)]


def _row(setting: Config, quality: Quality, control: bool, answers: Estimate | None) -> Row:
    return Row(
        setting=setting.dump(),
        label=describe(setting),
        control=control,
        active_before=quality.active_mean("before"),
        active_after=quality.active_mean(),
        layers=tuple(quality.active()),
        kept_mass_mean=quality.kept_mass_mean,
        kept_mass_worst=quality.kept_mass_worst,
        answered_mass_mean=quality.answered_mass_mean,
        answered_mass_most=quality.answered_mass_most,
        kl=quality.mean("kl"),
        rise=quality.rise,
        agreement=quality.mean("agree"),
        answers=answers,
    )
