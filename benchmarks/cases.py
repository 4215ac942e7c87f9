"""One layer under selection at one number of tokens and one part of its experts: contenders, and the row they make."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from layers import Batch, Kind, Layer, make_batch
from machine import free_memory
from peers import PEERS, attempt, differs, refused
from timing import Contender, measure, ratio
from torch import Tensor

import lynx
from lynx.kernels import choose_backend, run_experts
from lynx.kernels.plan import Plan
from lynx.kernels.tune import generation_of
from lynx.selection import LayerSelection
from lynx.standins import LayerStandIns
from lynx.standins_file import StandInLayer
from lynx.strategy import LayerInfo

OURS = ("layer", "route", "experts", "standins")


class Case:
    """A layer's copies at one number of tokens and one fraction of their active experts.

    Args:
        layers: The copies.
        batches: One for each.
        fraction: The part of the active experts that is kept.
        absent: By peer, why it does not run at this number of tokens; empty if it does.
    """

    def __init__(self, layers: list[Layer], batches: list[Batch], fraction: float, absent: dict[str, str]) -> None:
        self.absent = absent
        self.layers, self.batches, self.fraction = layers, batches, fraction
        self.budgets = [max(1, round(fraction * batch.active)) for batch in batches]
        self.selections = [self._selection(layer, budget) for layer, budget in zip(layers, self.budgets, strict=True)]
        standins = [standins_of(layer) for layer in layers]
        self.answering = [self._selection(*each) for each in zip(layers, self.budgets, standins, strict=True)]
        self.chosen = [select(batch.routing) for select, batch in zip(self.selections, batches, strict=True)]
        self.active = statistics.mean(self._awake(copy) for copy in range(len(layers)))
        self.contenders = self._contenders()

    @property
    def floor_bytes(self) -> float:
        """Bytes of the experts that stay active, mean over copies."""
        return self.active * self.layers[0].expert_bytes

    def _selection(self, layer: Layer, budget: int, standins: LayerStandIns | None = None) -> LayerSelection:
        shape = layer.shape
        info = LayerInfo("benchmark", 0, shape.E, shape.k, shape.rule, layer.expert_bytes)
        # Nothing is protected, which no one should use: so the active set is the budget at every T.
        strategy = lynx.make_strategy("top-budget", budget=budget, protect=0)
        # also a batch of 1 is cut: the same work at every T
        selection = LayerSelection(info, strategy, min_tokens=1, standins=standins)
        selection.place(layer.weights.down.device)
        return selection

    def _awake(self, copy: int) -> int:
        chosen = self.chosen[copy]
        return chosen.ids[chosen.weights != 0].unique().numel()

    def _contenders(self) -> list[Contender]:
        calls = {"layer": self._layer, "route": self._route, "experts": self._experts, "standins": self._standins}
        ours = [Contender(self._key(name), call) for name, call in calls.items()]
        peers = []
        for name, run in PEERS.items():

            def call(copy: int, run: Any = run) -> Tensor:
                chosen = self.chosen[copy]
                result: Tensor = run(self.layers[copy], self.batches[copy].hidden, chosen.ids, chosen.weights)
                return result

            reason = self.absent[name] or self._check(call)
            peers.append(Contender(self._key(name), call, peer=True, refused=reason))
        return ours + peers

    def _key(self, name: str) -> str:
        return f"{name}@{self.fraction}"

    def _layer(self, copy: int) -> Tensor:
        batch = self.batches[copy]
        chosen = self.selections[copy](batch.routing)
        return run_experts(batch.hidden, chosen.ids, chosen.weights, self.layers[copy].weights, plan=chosen.plan)

    def _route(self, copy: int) -> Any:
        return self.selections[copy](self.batches[copy].routing)

    def _experts(self, copy: int) -> Tensor:
        batch, chosen = self.batches[copy], self.chosen[copy]
        return run_experts(batch.hidden, chosen.ids, chosen.weights, self.layers[copy].weights, plan=chosen.plan)

    def _standins(self, copy: int) -> Tensor:
        batch, selection = self.batches[copy], self.answering[copy]
        result = selection.answer(batch.routing, self.chosen[copy])
        assert selection.standins is not None
        assert result.answered is not None
        return selection.standins.add(batch.hidden, batch.hidden, result.lost_ids, result.answered)

    def _check(self, call: Any) -> str:
        """Compare a peer's output with Lynx's: times of different results say nothing."""
        result, reason = attempt(lambda: call(0))
        return reason or differs(result, self._experts(0))

    def row(self, full: Case, speed: dict[str, float]) -> dict[str, Any]:
        """Work out what goes into the results; `full` is the case of fraction 1 of the same run."""
        shape, layer = self.layers[0].shape, self.layers[0]
        by_name = {contender.name.split("@")[0]: contender for contender in self.contenders}
        floor = self.floor_bytes / (1e3 * speed["copy"])
        peers = {name: statistics.median(by_name[name].rounds) for name in PEERS if by_name[name].rounds}
        best = min(peers, key=lambda name: peers[name], default="")
        layer_us = by_name["layer"].figures().get("us")
        backend = choose_backend(layer.weights, len(self.batches[0].ids))
        return {
            "shape": shape.name,
            "E": shape.E,
            "k": shape.k,
            "H": shape.H,
            "I": shape.I,
            "layout": layer.layout,
            "T": len(self.batches[0].ids),
            "fraction": self.fraction,
            "budget": statistics.mean(self.budgets),
            "active_before": statistics.mean(batch.active for batch in self.batches),
            "active": self.active,
            "expert_bytes": layer.expert_bytes,
            "copies": len(self.layers),
            "bandwidth_gb_per_s": speed,
            "floor_us": floor,
            "experts_run_by": backend.backend,
            "route_run_by": launches(self._route(0).plan, self.batches[0].choice, shape.k),
            "route_why": self.selections[0].why_not_fused,
            "timed": bool(by_name["layer"].rounds),
            "contenders": {name: contender.figures() for name, contender in by_name.items()},
            "layer_by_floor": {key: value / floor for key, value in layer_us.items()} if layer_us else None,
            "layer_by_full": ratio(by_name["layer"], full.contenders[0]),
            "lost": statistics.mean(int((chosen.lost_weights != 0).sum()) for chosen in self.chosen),
            "standins_by_layer": ratio(by_name["standins"], by_name["layer"]),
            "best_peer": best,
            "layer_by_best_peer": ratio(by_name["layer"], by_name[best]) if best else None,
        }


def standins_of(layer: Layer) -> LayerStandIns:
    """A layer's stand-ins at work, one for every expert."""
    own = layer.standins
    known = torch.ones(own.num_experts, dtype=torch.bool, device=own.bias.device)
    return LayerStandIns(
        StandInLayer("benchmark", 0, "", own.inner, own.outer, torch.zeros_like(own.bias), own.bias, known)
    )


def run_case(
    layers: list[Layer], kind: Kind, T: int, fractions: list[float], rounds: int, speed: dict[str, float]
) -> list[dict[str, Any]]:
    """Time a layer at one number of tokens, all fractions beside each other; a row for each."""
    free_memory(layers[0].weights.down.device)
    absent = {name: refused(name, layers[0], T * layers[0].shape.k) for name in PEERS}
    batches = [make_batch(layer, T, kind, seed=1000 * T + copy) for copy, layer in enumerate(layers)]
    device = batches[0].hidden.device
    cases = [Case(layers, batches, fraction, absent) for fraction in fractions]
    measure([contender for case in cases for contender in case.contenders], len(layers), rounds, device)
    return [{"routing": kind} | case.row(cases[0], speed) for case in cases]


def launches(plan: Plan | None, choice: Tensor, k: int) -> str:
    """Say in words what made a selection: torch, which makes no plan, or the kernel, whose launches depend on T.

    Args:
        plan: Of the selection.
        choice: `(T, E)`.
        k: Experts per token.
    """
    if plan is None:
        return "torch"
    from lynx.kernels.fused.launch_route import shape_options  # loads triton, which is there where a plan is

    T, E = choice.shape
    rows_of_a_program: int = shape_options(T, E, k, generation_of(choice.device))["PART"]
    return "one launch" if rows_of_a_program >= T else "two launches"
