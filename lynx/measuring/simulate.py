"""What strategies do to recorded decisions, without the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import lynx
from lynx.attachment import chosen_layers
from lynx.config import Config
from lynx.errors import ConfigError
from lynx.measuring.batches import Mix, grouped
from lynx.measuring.settings import describe
from lynx.measuring.trace import Trace, TracedSequence
from lynx.report import Report, make_report
from lynx.routing import Phase
from lynx.selection import LayerSelection


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Which decode batches are formed of a trace.

    Attributes:
        sizes: ``T``, sequences of a decode batch; every setting is simulated at each.
        columns: Decode steps of each batch; None for as many as were recorded of a sequence at most.
        mix: Whether a batch holds all domains or one.
        seeds: Each makes batches of its own from the same sequences.
        most_batches: Most batches of a seed; None for as many as there are.
        stress: Put the prompts under the policy, too; they must have been recorded.
    """

    sizes: tuple[int, ...] = (16,)
    columns: int | None = None
    mix: Mix = "mixed"
    seeds: tuple[int, ...] = (0,)
    most_batches: int | None = None
    stress: bool = False

    def columns_of(self, trace: Trace) -> int:
        """Return the decode steps of each batch.

        Raises:
            ConfigError: More are asked for than were recorded.
        """
        recorded: int = trace.conditions["columns"]
        if self.columns is not None and self.columns > recorded:
            raise ConfigError(
                f"the trace holds {recorded} decode steps of a sequence at most, and {self.columns} are asked for; "
                f"give --columns {recorded} or fewer, or record more with `lynx trace --columns {self.columns}`."
            )
        return self.columns or recorded

    def batches(self, trace: Trace, size: int) -> list[list[TracedSequence]]:
        """Make the batches of one size, of all seeds: those that ``lynx eval`` makes of the same examples.

        Raises:
            ConfigError: Not one batch can be made, or prompts are asked for that were not recorded.
        """
        columns = self.columns_of(trace)
        if self.stress and not trace.has_prompts:
            raise ConfigError("the trace holds no prompts; record them with `lynx trace --prompts`.")
        long_enough = [each for each in trace.sequences if each.continuation >= columns]
        made = (list(grouped(long_enough, size, self.mix, seed)) for seed in self.seeds)
        batches = [batch for batches in made for batch in batches[: self.most_batches]]
        if not batches:
            one = "of one domain " if self.mix == "similar" else ""
            raise ConfigError(
                f"a batch of {size} needs as many sequences {one}that go on for {columns} tokens; of the trace's "
                f"{len(trace.sequences)} {len(long_enough)} go on for so long. Give a smaller batch or fewer columns, "
                "or record more text."
            )
        return batches


@dataclass(frozen=True, slots=True)
class Row:
    """One setting at one batch size.

    Attributes:
        setting: Its configuration as plain data.
        label: It in one phrase.
        batch: Sequences of a decode batch.
        report: All that :meth:`lynx.Handle.report` would say; the phase is ``decode``.
    """

    setting: dict[str, Any]
    label: str
    batch: int
    report: Report

    @property
    def share(self) -> float:
        """Active experts under the setting by those of the model."""
        total = self.report.total["decode"]
        return total.active_after / total.active_before

    @property
    def rows_changed(self) -> float:
        """Share of tokens that lost an expert, over all layers."""
        layers = [layer.phases["decode"] for layer in self.report.layers]
        return sum(each.rows_changed for each in layers) / max(sum(each.tokens for each in layers), 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        figures = ("active_before", "active_after", "kept_mass_mean", "kept_mass_worst", "rows_changed")
        total = self.report.total["decode"]
        return {
            "setting": self.setting,
            "label": self.label,
            "batch": self.batch,
            "steps": total.steps,
            "exact_steps": total.exact_steps,
            "tokens": total.tokens,
            **{name: getattr(total, name) for name in figures[:-1]},
            "share": self.share,
            "rows_changed": self.rows_changed,
            "layers": [
                {"name": layer.name, **{name: getattr(layer.phases["decode"], name) for name in figures}}
                for layer in self.report.layers
            ],
        }


@dataclass(frozen=True, slots=True)
class Simulation:
    """All settings at all batch sizes.

    Attributes:
        rows: By setting, then by batch size.
        conditions: What was replayed of what.
    """

    rows: tuple[Row, ...]
    conditions: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"rows": [row.to_dict() for row in self.rows], "conditions": self.conditions}


def simulate(
    trace: Trace,
    settings: Sequence[Config],
    traffic: Traffic | None = None,
    advance: Callable[[str], None] = lambda what: None,
) -> Simulation:
    """Replay settings on recorded decisions: what attaching does to routers that are shown the same hidden states.

    Every layer is shown what the model alone gives it. In a run, layers behind the first see what selection before
    them left; :func:`lynx.measuring.evaluate.evaluate` measures that.

    Args:
        trace: What was recorded.
        settings: Configurations to replay.
        traffic: The decode batches; as by default without it.
        advance: Called with a few words after each of the :func:`rounds` of work.

    Raises:
        ConfigError: No batch can be made, a setting does not fit the layers, or one does nothing at decode.
    """
    traffic = traffic or Traffic()
    chosen = [chosen_layers(trace.layers, setting) for setting in settings]
    for setting in settings:
        if not setting.strategy.acts_on(Phase.DECODE):
            raise ConfigError(f"{describe(setting)} leaves decode exact, and decode steps are what is simulated.")
    rows: dict[tuple[int, int], Row] = {}
    for size in traffic.sizes:
        selections = [
            {info.index: LayerSelection(info, setting.strategy, setting.min_tokens) for info in layers}
            for setting, layers in zip(settings, chosen, strict=True)
        ]
        for batch in traffic.batches(trace, size):
            steps = decode_steps(batch, traffic.columns_of(trace), traffic.stress)
            with torch.inference_mode():
                # layer by layer within a batch, as a model runs: strategies may hold state
                for info in trace.layers:
                    replaying = [layers[info.index] for layers in selections if info.index in layers]
                    routing = trace.routing(info, steps) if replaying else None
                    for selection in replaying:
                        assert routing is not None
                        selection(routing)
            advance(f"batches of {size}")
        for place, (setting, layers) in enumerate(zip(settings, selections, strict=True)):
            counted = [(each.info, each.counters.failures, each.counters.read()) for each in layers.values()]
            report = make_report(setting.strategy.model_dump(mode="json"), "none", counted)
            rows[place, size] = Row(setting.dump(), describe(setting), size, report)
    conditions = {
        "lynx": lynx.__version__,
        "torch": str(torch.__version__),
        **asdict(traffic),
        "columns": traffic.columns_of(trace),
        "trace": trace.conditions,
    }
    return Simulation(tuple(rows[key] for key in sorted(rows)), conditions)


def rounds(trace: Trace, traffic: Traffic) -> int:
    """How often :func:`simulate` calls ``advance``."""
    return sum(len(traffic.batches(trace, size)) for size in traffic.sizes)


def decode_steps(batch: Sequence[TracedSequence], columns: int, stress: bool = False) -> Tensor:
    """Align sequences as teacher forcing does: ``(steps, B)`` rows of a trace, -1 where a sequence has no token yet.

    Args:
        batch: ``B`` sequences.
        columns: Steps of continuation.
        stress: Put steps of prompt, which ends in the same column, before them.
    """
    ahead = max(each.prompt for each in batch) if stress else 0
    place = torch.arange(-ahead, columns).unsqueeze(-1)
    prompts, starts = (torch.tensor([getattr(each, name) for each in batch]) for name in ("prompt", "start"))
    return torch.where(place >= -prompts, starts + prompts + place, -1)
