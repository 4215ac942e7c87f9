"""``lynx tune``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from lynx.cli.evaluate import examples_of
from lynx.cli.progress import progress_bar
from lynx.errors import ConfigError
from lynx.measuring.evaluate import Protocol
from lynx.measuring.latency import LatencyModel
from lynx.measuring.subject import load_subject
from lynx.tuning.goal import Goal, Kind
from lynx.tuning.report import write_report
from lynx.tuning.tune import Effort, rounds, tune


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


def run_tune(
    model: str,
    data: Path | None,
    goal: Goal,
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
    seconds, weights = (None, None) if latency is None else _times(LatencyModel.load(latency), protocol.batch, model)
    subject = load_subject(model, True, *place)
    examples = examples_of(data, subject)
    with progress_bar(rounds(subject, examples, protocol, effort)) as advance:
        kept = out.with_suffix(".measured.json")
        tuned = tune(subject, examples, goal, protocol, effort, seconds, weights, keep=kept, advance=advance)
    report = write_report(tuned, out.with_suffix(".md"))
    config = tuned.config  # raises where nothing met the goal; the report says what was tried
    config.save(out)
    assert tuned.chosen is not None
    if as_json:
        print(json.dumps({"config": config.dump(), "written": [str(path) for path in (out, *report)]}, indent=2))
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    quality = tuned.chosen.quality
    console.print(
        f"{goal}: {quality.share:.0%} of the active experts at a KL of {tuned.chosen.kl} nats per token, on "
        "the half of the text that verifies."
    )
    console.print(f"Written: {', '.join(str(path) for path in (out, *report))}")


def _times(model: LatencyModel, batch: int, asked: str) -> tuple[Callable[[Sequence[float]], float], list[float]]:
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
