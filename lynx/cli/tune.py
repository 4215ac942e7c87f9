"""``lynx tune``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from lynx.cli.bench import counts_of
from lynx.cli.evaluate import examples_of
from lynx.cli.progress import progress_bar
from lynx.errors import ConfigError
from lynx.measuring.evaluate import Protocol
from lynx.measuring.examples import Example
from lynx.measuring.latency import LatencyModel
from lynx.measuring.subject import Subject, load_subject
from lynx.tuning.goal import Goal, Kind, Trial
from lynx.tuning.report import write_report
from lynx.tuning.sizes import Seconds, Times, TunedSizes, ordered, tune_sizes
from lynx.tuning.sizes import rounds as rounds_of_sizes
from lynx.tuning.tune import Effort, Tuned, rounds, tune


def goal_of(max_kl: float | None, max_drop: str | None, active: float | None, tpot: float | None) -> Goal:
    """Read the one goal of a command line."""
    limits: dict[Kind, float | None] = {
        "max-kl": max_kl,
        "max-drop": None if max_drop is None else _share(max_drop),
        "target-active": active,
        "target-tpot": tpot,
    }
    given = [Goal(kind, limit) for kind, limit in limits.items() if limit is not None]
    if len(given) != 1:
        raise ConfigError("give one goal: --max-kl, --max-drop, --target-active or --target-tpot.")
    if given[0].value <= 0 or (given[0].kind in ("max-drop", "target-active") and given[0].value > 1):
        raise ConfigError(f"--{given[0].kind} is more than 0, and a share is at most 1; got {given[0].value}.")
    return given[0]


def sizes_of(text: str) -> list[int]:
    """Read the batch sizes of a command line, smallest first.

    Raises:
        ConfigError: They are not whole numbers of 2 or more, or one is named twice.
    """
    sizes = counts_of(text)
    given = [int(part) for part in text.split(",")]
    return ordered(given if len(given) > len(sizes) else sizes)


def run_tune(
    model: str,
    data: Path | None,
    goal: Goal,
    sizes: Sequence[int],
    protocol: Protocol,
    effort: Effort,
    latency: Path | None,
    place: tuple[str | None, str],
    out: Path,
    as_json: bool,
) -> None:
    """Tune, write the configuration and the report, and print what was chosen."""
    if not out.parent.is_dir():
        raise ConfigError(f"cannot write {str(out)!r}: there is no folder {str(out.parent)!r}.")
    fitted = None if latency is None else LatencyModel.load(latency)
    times = None if fitted is None else {size: _times(fitted, size, model) for size in sizes}
    subject = load_subject(model, True, *place)
    examples = examples_of(data, subject)
    tuned = _tune(subject, examples, goal, sizes, protocol, effort, times, out)
    report = write_report(tuned, out.with_suffix(".md"))
    config = tuned.config  # raises where nothing met the goal; the report says what was tried
    config.save(out)
    if as_json:
        print(json.dumps({"config": config.dump(), "written": [str(path) for path in (out, *report)]}, indent=2))
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if isinstance(tuned, TunedSizes):
        console.print(f"{goal}, on the half of the text that verifies:")
        for size, trial in tuned.joined.items():
            console.print(f"batches of {size}: {_words(trial)}")
    else:
        assert tuned.chosen is not None
        console.print(f"{goal}: {_words(tuned.chosen)}, on the half of the text that verifies.")
    console.print(f"Written: {', '.join(str(path) for path in (out, *report))}")


def _tune(
    subject: Subject,
    examples: Sequence[Example],
    goal: Goal,
    sizes: Sequence[int],
    protocol: Protocol,
    effort: Effort,
    times: Times | None,
    out: Path,
) -> Tuned | TunedSizes:
    if len(sizes) > 1:
        kept_of = {each: out.with_suffix(f".batch-{each}.measured.json") for each in sizes}
        with progress_bar(rounds_of_sizes(subject, examples, sizes, protocol, effort)) as advance:
            return tune_sizes(subject, examples, goal, sizes, protocol, effort, times, kept_of, advance)
    (size,) = sizes
    seconds, weights = (None, None) if times is None else times[size]
    protocol = replace(protocol, batch=size)
    with progress_bar(rounds(subject, examples, protocol, effort)) as advance:
        kept = out.with_suffix(".measured.json")
        return tune(subject, examples, goal, protocol, effort, seconds, weights, keep=kept, advance=advance)


def _words(trial: Trial) -> str:
    return f"{trial.quality.share:.0%} of the active experts at a KL of {trial.kl} nats per token"


def _times(model: LatencyModel, batch: int, asked: str) -> tuple[Seconds, list[float]]:
    """A step's time from its layers' active experts, and what an expert of each layer takes."""
    if model.model != asked:
        raise ConfigError(
            f"the latency model is of {model.model!r}, not of {asked!r}; fit one with `lynx bench --fit`."
        )
    fitted = model.at(batch)
    # a slope below nothing is noise: such a layer's experts cost as little as any
    slopes = [layer.per_expert.value for layer in fitted.layers]
    least = max(min((slope for slope in slopes if slope > 0), default=1.0), 1e-12)
    return lambda active: model.predict(active, batch), [max(slope, least) for slope in slopes]


def _share(text: str) -> float:
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise ConfigError(f"--max-drop is a share such as 1% or 0.01; got {text!r}.") from error
