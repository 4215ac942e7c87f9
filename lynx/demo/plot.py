"""Quality against active experts, one line a method."""

from __future__ import annotations

import importlib.util
import textwrap
from pathlib import Path
from typing import Any

from lynx.demo.run import Outcome, Results
from lynx.errors import LynxError

# Okabe and Ito's palette, which stays apart for all common kinds of colour vision
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888")
_MARKERS = "osD^vPXd"
_PLATE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6}  # behind names that cross a line


def plot(results: Results, folder: Path) -> list[Path]:
    """Draw KL to exact routing against the share of active experts as PNG and SVG.

    Raises:
        LynxError: matplotlib is not installed.
    """
    require()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.4))
    methods: dict[str, list[Outcome]] = {}
    for outcome in results.outcomes:
        methods.setdefault(_method(outcome), []).append(outcome)
    labels = []
    for number, (name, outcomes) in enumerate(sorted(methods.items())):
        points = sorted((100 * o.share, max(o.forced["mixed"].kl, 1e-6)) for o in outcomes)
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot(*zip(*points, strict=True), marker=_MARKERS[number % len(_MARKERS)], color=colour, linewidth=1.4)
        labels.append((points[0], name, colour))
    axes.set_yscale("log")
    axes.set_xlabel("active experts per layer and step, % of exact routing")
    axes.set_ylabel("KL(exact || policy), nats per byte")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    _place(axes, labels)
    axes.set_title("Fewer active experts, and what they cost", loc="left")
    figure.text(0.01, 0.01, textwrap.fill(_conditions(results), 128), fontsize=7, color="#444444", va="bottom")
    figure.subplots_adjust(left=0.11, right=0.97, top=0.93, bottom=0.22)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "demo.png", folder / "demo.svg"]
    matplotlib.rcParams["svg.hashsalt"] = "lynx"
    figure.savefig(paths[0], dpi=150)
    figure.savefig(paths[1], metadata={"Date": None})
    pyplot.close(figure)
    return paths


def require() -> None:
    """Raise :class:`lynx.LynxError` if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise LynxError("the plot needs matplotlib: pip install 'lynx-moe[plot]'")


def _method(outcome: Outcome) -> str:
    name = str(outcome.setting["name"])
    name += " (mass)" if "mass" in outcome.setting else " (ratio)" if "ratio" in outcome.setting else ""
    return name + (" + stand-ins" if outcome.setting.get("standins") else "")


def _place(axes: Any, labels: list[tuple[tuple[float, float], str, str]]) -> None:
    """Write each method's name beside its leftmost point, apart from the names written before."""
    taken: list[tuple[float, float]] = []
    for (x, y), name, colour in sorted(labels, key=lambda item: -item[0][1]):
        px, py = axes.transData.transform((x, y))
        shift = 8.0
        while any(abs(px - ox) < 130 and abs(py + shift - oy) < 13 for ox, oy in taken):
            shift -= 13.0
        taken.append((px, py + shift))
        axes.annotate(
            name, (x, y), xytext=(7, shift), textcoords="offset points", color=colour, fontsize=8.5, bbox=_PLATE
        )


def _conditions(results: Results) -> str:
    conditions = results.conditions
    model = conditions["reference_model"]
    return (
        f"Reference model, {model['layers']} layers, {model['experts']} experts, top-{model['top_k']}; decode batches "
        f"of {conditions['batch']} held-out sequences, half code and half word problems; prompt exact, "
        f"{results.exact.forced['mixed'].bytes_scored} bytes of continuation under the policy; exact routing wakes "
        f"{results.exact.forced['mixed'].active_before:.1f} experts. lynx {conditions['lynx']}, torch "
        f"{conditions['torch']}."
    )
