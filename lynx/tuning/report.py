"""What was tuned, for people: Markdown, with a plot where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lynx.measuring.intervals import Estimate
from lynx.measuring.settings import describe
from lynx.tuning.allocation import Allocation
from lynx.tuning.candidates import label
from lynx.tuning.goal import Trial
from lynx.tuning.sizes import TunedSizes
from lynx.tuning.tune import Tuned


def write_report(tuned: Tuned | TunedSizes, path: Path) -> list[Path]:
    """Write the report, and the plots beside it as SVG; return what was written."""
    if isinstance(tuned, TunedSizes):
        drawn = {size: _plot(part, path.with_suffix(f".batch-{size}.svg")) for size, part in tuned.parts.items()}
        text = _by_size(tuned, drawn)
    else:
        drawn = {0: _plot(tuned, path.with_suffix(".svg"))}
        head = [f"# Settings for {tuned.conditions['model']}", f"Wanted: {tuned.goal}."]
        text = [*head, *_body(tuned, drawn[0]), *_conditions(tuned)]
    path.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return [path, *(plot for plot in drawn.values() if plot is not None)]


def _by_size(tuned: TunedSizes, plots: dict[int, Path | None]) -> list[str]:
    sizes = list(tuned.parts)
    parts = [f"# Settings for {tuned.conditions['model']}, by batch size"]
    parts.append(f"Wanted, in batches of {', '.join(map(str, sizes))} sequences: {tuned.goal}.")
    if tuned.joined:
        rows = [
            (
                str(size),
                f"{trial.quality.share:.1%}",
                _figure(trial.kl),
                f"{trial.quality.kept_mass_worst:.0%}",
                "yes" if trial.passed else "no",
            )
            for size, trial in tuned.joined.items()
        ]
        head = ("batch", "active experts", "KL (nats)", "kept by the worst token", "meets the goal")
        parts += ["The joined setting, attached as it is written, on the half of the text that verifies:"]
        parts += [_table(head, rows)]
    else:
        missed = ", ".join(str(size) for size, part in tuned.parts.items() if part.chosen is None)
        parts.append(f"**No setting was verified to give that in batches of {missed}**, so that there is none to use.")
    parts.append(
        f"A step takes the setting of the largest of these sizes that its open rows reach. With fewer than {sizes[0]} "
        "of them it is exact."
    )
    for size, part in tuned.parts.items():
        parts += [f"## Batches of {size}", *_body(part, plots[size])]
    return [*parts, "## Conditions", *_conditions(tuned)]


def _body(tuned: Tuned, plot: Path | None) -> list[str]:
    parts = []
    if tuned.chosen is None:
        parts.append("**No setting was verified to give that.** What was tried:")
    else:
        parts += [
            _verdict(tuned.chosen),
            _layers(tuned.chosen),
            "What was tried on the way, on the half of the text that verifies:",
        ]
    parts += [_trials(tuned.trials)]
    if plot is not None:
        parts.append(f"![KL by active experts]({plot.name})")
    parts.append("The same setting in every layer, on the same text:")
    rows = [(describe(each.setting), f"{each.share:.1%}", _figure(each.mean("kl"))) for each in tuned.uniform]
    return [*parts, _table(("setting", "active experts", "KL (nats)"), rows)]


def _conditions(tuned: Tuned | TunedSizes) -> list[str]:
    rows = [(key, str(value)) for key, value in tuned.conditions.items()]
    return ["Measured with:", _table(("what", "value"), rows)]


def _verdict(trial: Trial) -> str:
    active, before = trial.quality.active_mean(), trial.quality.active_mean("before")
    words = [
        f"Verified: {active:.1f} of {before:.1f} active experts ({trial.quality.share:.0%})",
        f"KL {_figure(trial.kl)} nats per token",
        f"the loss rises by {_figure(trial.quality.rise)} nats",
        f"the likeliest token is the same in {trial.quality.mean('agree').value:.1%} of places",
        f"the worst token keeps {trial.quality.kept_mass_worst:.0%} of its own weight",
    ]
    if trial.answers is not None and trial.exact_answers is not None:
        words.append(f"{_share(trial.answers)} of questions answered, {_share(trial.exact_answers)} without Lynx")
    if trial.seconds is not None:
        words.append(f"{trial.seconds:.4g} s per token by the latency model")
    return "; ".join(words) + "."


def _layers(trial: Trial) -> str:
    active, before = trial.quality.active(), trial.quality.active("before")
    rows = [
        (str(index), label(strategy), f"{active[index]:.1f} of {before[index]:.1f}")
        for index, strategy in enumerate(trial.allocation.strategies)
    ]
    return _table(("layer", "setting", "active experts"), rows)


def _trials(trials: Sequence[Trial]) -> str:
    rows = [
        (
            f"{trial.quality.share:.1%}",
            f"{trial.allocation.share:.1%}",
            _figure(trial.kl),
            f"{trial.allocation.loss:.2g}",
            "yes" if trial.passed else "no",
        )
        for trial in trials
    ]
    return _table(("active experts", "predicted", "KL (nats)", "predicted", "meets the goal"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _figure(estimate: Estimate) -> str:
    return f"{estimate.value:.2g} ({estimate.low:.2g} to {estimate.high:.2g})"


def _share(estimate: Estimate) -> str:
    return f"{estimate.value:.1%} ({estimate.low:.1%} to {estimate.high:.1%})"


def _plot(tuned: Tuned, path: Path) -> Path | None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    _line(axes, [(each.share, each.kl_value) for each in tuned.uniform], "o", "the same in every layer", "tab:gray")
    predicted: list[Allocation] = [each for each in tuned.path if each.loss > 0]
    axes.plot([e.share for e in predicted], [e.loss for e in predicted], "-", color="tab:blue", label="predicted")
    _line(axes, [(t.quality.share, t.quality.kl_value) for t in tuned.trials], "s", "verified", "tab:blue")
    if tuned.chosen is not None:
        axes.plot(
            tuned.chosen.quality.share, tuned.chosen.quality.kl_value, "*", ms=16, color="tab:red", label="chosen"
        )
    axes.set_yscale("log")
    axes.set_xlabel("active experts, share of the model's")
    axes.set_ylabel("KL(exact || policy), nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    return path


def _line(axes: object, points: Sequence[tuple[float, float]], mark: str, words: str, color: str) -> None:
    shown = [(x, y) for x, y in points if y > 0]  # the axis is logarithmic
    axes.plot([x for x, _ in shown], [y for _, y in shown], mark, color=color, label=words)  # type: ignore[attr-defined]
