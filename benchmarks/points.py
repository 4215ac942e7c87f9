"""Where tune.py measures: a layer's copies at one number of tokens, and the kernels to launch there."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from layers import Layer, make_batch

Settings = dict[str, int]


class Point:
    """One layer's copies at one number of tokens, with the inputs of each kernel."""

    def __init__(self, layers: list[Layer], T: int) -> None:
        from lynx.kernels.fused import launch

        self.layers, self.T = layers, T
        self.k, self.E = layers[0].shape.k, layers[0].shape.E
        self.batches = [make_batch(layer, T, "skewed", seed=copy) for copy, layer in enumerate(layers)]
        copies = range(len(layers))
        self.plans = [launch.plan(batch.ids, batch.weights, self.E) for batch in self.batches]
        self.inner = [self.gate_up(copy, None) for copy in copies]
        self.rows = [self.down(copy, None) for copy in copies]
        # of each token the lighter half of its slots is lost; one of one
        late = torch.arange(self.k, device=self.batches[0].weights.device) >= self.k // 2
        self.lost = [batch.weights * late for batch in self.batches]
        self.projected = [self.standin_inner(copy, None) for copy in copies]
        self.calls: dict[str, Callable[[int, Settings], Any]] = {
            "gate_up": self.gate_up,
            "down": self.down,
            "combine": self.combine,
            "plan": self.plan,
            "standin_inner": self.standin_inner,
            "standin_outer": self.standin_outer,
        }

    def gate_up(self, copy: int, chosen: Settings | None) -> Any:
        """Run the kernel on a copy; the file's own settings where none are given."""
        from lynx.kernels.fused import launch

        own, hidden = self.layers[copy].weights, self.batches[copy].hidden
        return launch.gate_up(
            hidden, self.plans[copy], self.k, own.gate_up, own.gate_up_bias, own.transposed, own.gate, chosen
        )

    def down(self, copy: int, chosen: Settings | None) -> Any:
        """Likewise."""
        from lynx.kernels.fused import launch

        own, combine = self.layers[copy].weights, self.batches[copy].weights
        inner = self.inner[copy]
        return launch.down(inner, self.plans[copy], combine, own.down, own.down_bias, own.transposed, chosen)

    def combine(self, copy: int, chosen: Settings) -> Any:
        """Likewise."""
        from lynx.kernels.fused import launch

        dtype = self.batches[copy].hidden.dtype
        return launch.combine(self.rows[copy], self.plans[copy], self.E, self.k, dtype, chosen)

    def plan(self, copy: int, chosen: Settings) -> Any:
        """Likewise."""
        from lynx.kernels.fused import launch

        return launch.plan(self.batches[copy].ids, self.batches[copy].weights, self.E, chosen)

    def standin_inner(self, copy: int, chosen: Settings | None) -> Any:
        """Likewise."""
        from lynx.kernels.fused import launch_standins

        batch, own = self.batches[copy], self.layers[copy].standins
        return launch_standins.inner(batch.hidden, batch.ids, self.lost[copy], own.inner, chosen)

    def standin_outer(self, copy: int, chosen: Settings) -> Any:
        """Likewise."""
        from lynx.kernels.fused import launch_standins

        batch, own, rows = self.batches[copy], self.layers[copy].standins, self.projected[copy]
        return launch_standins.outer(batch.hidden, batch.ids, self.lost[copy], rows, own.outer, own.bias, chosen)


def points_of(all_points: list[Point], above: int, up_to: int, most: int) -> list[Point]:
    """Choose the points of a load: of each shape those nearest to its upper end."""
    chosen = []
    for _, group in itertools.groupby(all_points, key=lambda point: point.layers[0].shape.name):
        inside = [point for point in group if above < point.T <= up_to]
        chosen += sorted(inside, key=lambda point: -point.T)[:most]
    return chosen
