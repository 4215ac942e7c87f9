"""What a decode step would take: per MoE layer ``c + b * |A|``, fitted to a machine."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor

from lynx.errors import ConfigError
from lynx.measuring.intervals import Estimate
from lynx.validation import Options

GOOD_FIT = 0.9
"""R^2 from which a line is said to describe a layer."""
QUANTILE = 0.25
"""Of a time over rounds, which a line is fitted to."""
_RESAMPLES = 500


class LayerLatency(Options):
    """One MoE layer.

    Attributes:
        layer: Module path of its router.
        constant: ``c``, seconds whatever is active, with its 95 % interval.
        per_expert: ``b``, seconds per active expert, with its 95 % interval.
        r_squared: Share of the variance of the times that the line explains.
        fewest: Fewest active experts that were timed.
        most: Most of them.
    """

    layer: str
    constant: Estimate
    per_expert: Estimate
    r_squared: float
    fewest: float
    most: float

    @property
    def good(self) -> bool:
        """Whether the line describes the layer, and its slope is surely above 0."""
        return self.r_squared >= GOOD_FIT and self.per_expert.low > 0

    def predict(self, active: float) -> float:
        """Seconds with so many active experts; a guess outside of ``fewest`` to ``most``."""
        return self.constant.value + self.per_expert.value * active


class BatchLatency(Options):
    """All MoE layers at one batch size.

    Attributes:
        batch: ``T``, sequences.
        rest: Seconds of a step beyond those lines: outside of the MoE blocks, and what disturbs them at the median.
        layers: The layers, as they run.
    """

    batch: int = Field(ge=1)
    rest: float
    layers: tuple[LayerLatency, ...] = Field(min_length=1)

    def predict(self, active: float | Sequence[float]) -> float:
        """Seconds of a decode step.

        Args:
            active: Active experts of every layer, or of all layers alike.

        Raises:
            ConfigError: There is another number of layers.
        """
        given = [active] * len(self.layers) if isinstance(active, (int, float)) else list(active)
        if len(given) != len(self.layers):
            raise ConfigError(f"active experts of {len(given)} layers were given; there are {len(self.layers)}.")
        return self.rest + sum(layer.predict(each) for layer, each in zip(self.layers, given, strict=True))

    @property
    def r_squared(self) -> float:
        """Of the layer that is described worst."""
        return min(layer.r_squared for layer in self.layers)

    @property
    def statement(self) -> str:
        """Say whether the lines can be relied on."""
        bad = [layer for layer in self.layers if not layer.good]
        if not bad:
            return f"a line describes each of them (R^2 at least {math.floor(100 * self.r_squared) / 100:.2f})"
        flat = sum(layer.per_expert.low <= 0 for layer in bad)
        words = f"a line does not describe {len(bad)} of them (R^2 down to {self.r_squared:.2f}"
        return words + (f"; in {flat} the time may not depend on the active experts at all)" if flat else ")")


class LatencyModel(Options):
    """What decode steps of one model take on one machine, for those who plan with it.

    Attributes:
        model: What was timed.
        experts: Which implementation ran the experts, ``model`` or ``lynx``.
        batches: The batch sizes that were timed.
        conditions: Machine, versions, text.
    """

    model: str
    experts: str
    batches: tuple[BatchLatency, ...] = Field(min_length=1)
    conditions: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: The file cannot be read or holds something else.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read a latency model from {str(path)!r}: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{str(path)!r} holds no latency model; `lynx bench MODEL --fit {path}` writes one.")
        return cls.build(data)

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def at(self, batch: int) -> BatchLatency:
        """Return the layers at a batch size.

        Raises:
            ConfigError: It was not timed.
        """
        for each in self.batches:
            if each.batch == batch:
                return each
        timed = ", ".join(str(each.batch) for each in self.batches)
        raise ConfigError(
            f"batches of {batch} were not timed; there are {timed}. Time them: lynx bench --batch {batch}."
        )

    def predict(self, active: float | Sequence[float], batch: int) -> float:
        """Seconds of a decode step; see :meth:`BatchLatency.predict`."""
        return self.at(batch).predict(active)


def fit(layers: Sequence[str], active: Tensor, times: Tensor, seed: int = 0) -> tuple[LayerLatency, ...]:
    """Fit a line to each layer, by least squares over the lower quartiles of the rounds.

    What else a machine does only adds to a time, so that the lower quartile is nearer to the layer's own than the
    median. Intervals come from drawing rounds anew.

    Args:
        layers: Names, ``L`` of them.
        active: ``(R, P, L)`` active experts by round, point and layer; a point is one setting.
        times: ``(R, P, L)`` seconds.
        seed: Of the draws.
    """
    active, times = active.double(), times.double()
    constant, slope, r_squared = _lines(active.mean(0), times.quantile(QUANTILE, dim=0))
    drawn = torch.randint(len(times), (_RESAMPLES, len(times)), generator=torch.Generator().manual_seed(seed))
    constants, slopes, _ = _lines(active[drawn].mean(1), times[drawn].quantile(QUANTILE, dim=1))
    seen = active.mean(0)
    return tuple(
        LayerLatency(
            layer=name,
            constant=_estimate(constant[index], constants[:, index]),
            per_expert=_estimate(slope[index], slopes[:, index]),
            r_squared=float(r_squared[index]),
            fewest=float(seen[:, index].min()),
            most=float(seen[:, index].max()),
        )
        for index, name in enumerate(layers)
    )


def _lines(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Constant, slope and R^2 over the last but one dimension; a layer that never varies gets a slope of 0."""
    dx, dy = x - x.mean(-2, keepdim=True), y - y.mean(-2, keepdim=True)
    spread, total = dx.square().sum(-2), dy.square().sum(-2)
    slope = ((dx * dy).sum(-2) / spread).where(spread > 0, 0.0)
    missed = (dy - slope.unsqueeze(-2) * dx).square().sum(-2)
    return y.mean(-2) - slope * x.mean(-2), slope, (1.0 - missed / total).where((total > 0) & (spread > 0), 0.0)


def _estimate(value: Tensor, drawn: Tensor) -> Estimate:
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return Estimate(float(value), low, high)
