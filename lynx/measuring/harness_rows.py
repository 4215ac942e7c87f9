"""What the harness found of a setting, as rows beside what selection did."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lynx.config import Config
from lynx.measuring.intervals import Estimate, bootstrap, wilson
from lynx.measuring.settings import describe
from lynx.report import PhaseReport


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One setting on one task, by one of its metrics.

    Attributes:
        setting: Its configuration as plain data.
        label: It in one phrase.
        control: Whether it is there for comparison and was not asked for.
        task: The task, or a group of them.
        metric: What is measured, and behind a comma how answers were filtered, as the harness writes it.
        higher_is_better: What the task says of the metric; None where it says nothing.
        documents: How many were asked; for a group, of all its tasks.
        score: The harness's figure.
        interval: Its 95 % interval over documents; None where it is no mean over them.
        change: Score minus that of exact routing.
        change_interval: Its 95 % interval, document by document.
        steps: Decode steps.
        rows: Mean sequences of a decode step: those that had ended are not among them.
        active_before: Mean active experts per layer and decode step, as the model routes.
        active_after: The same under the setting.
        kept_mass_mean: Mean share of a token's own weight that was kept.
        kept_mass_worst: The worst token's share.
    """

    setting: dict[str, Any]
    label: str
    control: bool
    task: str
    metric: str
    higher_is_better: bool | None
    documents: int
    score: float
    interval: tuple[float, float] | None
    change: float
    change_interval: tuple[float, float] | None
    steps: int
    rows: float
    active_before: float
    active_after: float
    kept_mass_mean: float
    kept_mass_worst: float

    @property
    def share(self) -> float:
        """Active experts under the setting by those of the model; 1 where no step was run."""
        return self.active_after / self.active_before if self.steps else 1.0


@dataclass(frozen=True, slots=True)
class Run:
    """What the harness found of one setting.

    Attributes:
        results: As the harness returns them, with a sample for every document.
        decode: Reports of the decode phase, by task.
        truncated: How many requests lost the front of their prompts.
    """

    results: dict[str, Any]
    decode: dict[str, list[PhaseReport]]
    truncated: int

    @property
    def prompts(self) -> str:
        """A hash of the documents and of what was made of them."""
        names = ("doc_hash", "prompt_hash", "target_hash")
        content = {
            task: [[sample[name] for name in names] for sample in samples]
            for task, samples in self.results["samples"].items()
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def values(self, task: str, metric: str) -> dict[int, float]:
        """A metric's value by document, empty where there is no number for each."""
        name, _, key = metric.partition(",")
        found = {}
        for sample in self.results["samples"].get(task, ()):
            if sample["filter"] == key and name in sample:
                value = sample[name]
                if not _is_number(value):
                    return {}
                found[int(sample["doc_id"])] = float(value)
        return found


def rows_of(setting: Config, control: bool, run: Run, exact: Run) -> Iterator[TaskRow]:
    """Yield a row for every task and metric.

    Args:
        setting: What was run.
        control: Whether it is a control.
        run: What was found.
        exact: What was found of exact routing.
    """
    scores = {**run.results["results"], **run.results.get("groups", {})}
    sizes = run.results["n-samples"]
    for task, found in scores.items():
        members = _leaves(task, run.results.get("group_subtasks", {}))
        decode = [report for member in members for report in run.decode.get(member, ())]
        for metric, score in found.items():
            if "," not in metric or metric.partition(",")[0].endswith("_stderr") or not _is_number(score):
                continue
            values, before = run.values(task, metric), exact.values(task, metric)
            both = [document for document in values if document in before]
            mean = bool(values) and math.isclose(sum(values.values()) / len(values), score, rel_tol=1e-6, abs_tol=1e-9)
            base = (exact.results["results"].get(task) or exact.results["groups"][task])[metric]
            yield TaskRow(
                setting=setting.dump(),
                label=describe(setting),
                control=control,
                task=task,
                metric=metric,
                higher_is_better=run.results["higher_is_better"].get(task, {}).get(metric.partition(",")[0]),
                documents=sum(sizes[member]["effective"] for member in members),
                score=float(score),
                interval=_interval([values[each] for each in values]) if mean else None,
                change=float(score - base),
                change_interval=_ends(_mean([values[each] - before[each] for each in both])) if mean and both else None,
                **_selection(decode),
            )


def _leaves(task: str, children: dict[str, list[str]]) -> list[str]:
    """The tasks of a group, those of groups in it included; a task alone is its own."""
    below = [child for child in children.get(task, ()) if child != task]
    return [leaf for child in below for leaf in _leaves(child, children)] or [task]


def _selection(reports: Sequence[PhaseReport]) -> dict[str, Any]:
    steps = sum(report.steps for report in reports)
    open_rows = sum(report.open_rows for report in reports)

    def over_steps(name: str) -> float:
        return math.fsum(getattr(report, name) * report.steps for report in reports) / max(steps, 1)

    kept = math.fsum(r.kept_mass_mean * r.open_rows for r in reports if r.kept_mass_mean is not None)
    return {
        "steps": steps,
        "rows": sum(report.tokens for report in reports) / max(steps, 1),
        "active_before": over_steps("active_before"),
        "active_after": over_steps("active_after"),
        "kept_mass_mean": kept / open_rows if open_rows else 1.0,
        "kept_mass_worst": min((r.kept_mass_worst for r in reports if r.kept_mass_worst is not None), default=1.0),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (hasattr(value, "item") and getattr(value, "ndim", 1) == 0)


def _interval(values: Sequence[float]) -> tuple[float, float]:
    if set(values) <= {0.0, 1.0}:
        return _ends(wilson(round(sum(values)), len(values)))
    return _ends(_mean(values))


def _mean(values: Sequence[float]) -> Estimate:
    return bootstrap(torch.tensor(values, dtype=torch.float64), torch.ones(len(values)))


def _ends(estimate: Estimate) -> tuple[float, float]:
    return estimate.low, estimate.high
