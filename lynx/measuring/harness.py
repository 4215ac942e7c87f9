"""What settings cost on tasks of lm-evaluation-harness, beside the controls."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch

from lynx.config import Config, resolve_config
from lynx.errors import ConfigError, MeasureError
from lynx.measuring.evaluate import with_controls
from lynx.measuring.harness_rows import Run, TaskRow, rows_of
from lynx.measuring.harness_tasks import Tasks
from lynx.measuring.origin import origin
from lynx.measuring.subject import Subject

_SEED = 0  # the harness's own


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskProtocol:
    """How settings are measured on tasks.

    Attributes:
        batch: ``T``, sequences of a decode batch.
        limit: Most documents of a task; None for all.
        fewshot: Solved examples before each question; None for what a task says.
        chat: Put prompts into the model's chat template.
        stress: Put the prompts of texts that are scored under the setting, too.
        max_new_tokens: Longest generated answer; None for what a task says.
        all_controls: Measure all controls, and not exact routing alone.
    """

    batch: int = 16
    limit: int | None = None
    fewshot: int | None = None
    chat: bool = False
    stress: bool = False
    max_new_tokens: int | None = None
    all_controls: bool = True


@dataclass(frozen=True, slots=True)
class TaskEvaluation:
    """All settings on all tasks.

    Attributes:
        rows: The settings asked for, then the controls, each with all tasks.
        conditions: What was run on what.
    """

    rows: tuple[TaskRow, ...]
    conditions: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def evaluate_tasks(
    subject: Subject,
    tasks: Tasks,
    settings: Sequence[Config],
    protocol: TaskProtocol | None = None,
    advance: Callable[[str], None] = lambda what: None,
) -> TaskEvaluation:
    """Measure settings and the controls on tasks.

    Answers are generated in true batches. Texts that a task scores are run as if they had been generated: prompts are
    exact, and every column of the continuations is one decode step of the batch.

    Args:
        subject: The model, not attached.
        tasks: What :func:`lynx.measuring.harness_tasks.load_tasks` returned.
        settings: Configurations to measure.
        protocol: How; as by default without one.
        advance: Called with a task's name after each of the :func:`rounds` of work.

    Raises:
        ConfigError: A task scores nothing that comes from a decode step, or what is asked for cannot be: stress where
            nothing is scored, or a chat template that is not there.
        MeasureError: A task builds other prompts in another run, or its texts are longer than the model reads.
        UnsupportedModelError: No adapter can take the model.
    """
    protocol = protocol or TaskProtocol()
    if protocol.stress and all(task.OUTPUT_TYPE == "generate_until" for task in tasks.tasks.values()):
        raise ConfigError("--stress is for texts that are scored, and these tasks generate; their prompts are exact.")
    measured = _all(subject, settings, protocol)
    exact = measured.index(resolve_config("exact", {}))
    order = [exact, *(place for place in range(len(measured)) if place != exact)]
    runs = {place: _run(subject, tasks, measured[place], protocol, advance) for place in order}
    if len({run.prompts for run in runs.values()}) > 1:
        raise MeasureError("a task builds other prompts in another run, so its scores do not compare.")
    rows = [
        row
        for place, setting in enumerate(measured)
        for row in rows_of(setting, place >= len(settings), runs[place], runs[exact])
    ]
    conditions = {
        **origin(subject.model),
        "lm_eval": version("lm_eval"),
        "model": subject.name,
        "tasks": {
            task: {
                "version": runs[exact].results["versions"].get(task),
                "fewshot": runs[exact].results["n-shot"].get(task),
                "documents": runs[exact].results["n-samples"][task]["effective"],
            }
            for task in tasks.tasks
        },
        "data": runs[exact].prompts,
        "truncated": max(run.truncated for run in runs.values()),
        **asdict(protocol),
    }
    return TaskEvaluation(tuple(rows), conditions)


def rounds(subject: Subject, tasks: Tasks, settings: Sequence[Config], protocol: TaskProtocol) -> int:
    """How often :func:`evaluate_tasks` calls ``advance``."""
    return len(_all(subject, settings, protocol)) * tasks.documents(protocol.limit)


def _all(subject: Subject, settings: Sequence[Config], protocol: TaskProtocol) -> list[Config]:
    measured = with_controls(subject.model, settings)
    if protocol.all_controls:
        return measured
    return [*settings, *(control for control in measured[len(settings) :] if control == resolve_config("exact", {}))]


def _run(
    subject: Subject, tasks: Tasks, setting: Config, protocol: TaskProtocol, advance: Callable[[str], None]
) -> Run:
    from lm_eval.evaluator import evaluate

    from lynx.measuring.harness_model import HarnessModel

    model = HarnessModel(subject, setting, protocol.batch, protocol.stress, protocol.max_new_tokens, advance)
    tasks.prepare(protocol.fewshot)
    with _seeded():
        results = evaluate(
            model,
            {"tasks": tasks.tasks, "groups": tasks.groups},
            limit=protocol.limit,
            bootstrap_iters=0,
            apply_chat_template=protocol.chat,
            fewshot_as_multiturn=protocol.chat,
        )
    return Run(results, dict(model.decode), model.truncated)


@contextmanager
def _seeded() -> Iterator[None]:
    """The same random numbers in every run, for tasks that draw; those of the program go on where they were."""
    state = random.getstate()
    random.seed(_SEED)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(_SEED)
            yield
    finally:
        random.setstate(state)
