"""What a setting does to the model's distribution, on given text with the prompt exact."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lynx.attachment import attach, chosen_layers, discover
from lynx.config import Config, resolve_config
from lynx.demo.cache import as_argument
from lynx.errors import MeasureError
from lynx.handle import Handle
from lynx.layers import LayerFilter
from lynx.measuring.batches import ForcedBatch
from lynx.measuring.decode import fill_cache
from lynx.measuring.intervals import Estimate, bootstrap
from lynx.report import PhaseReport
from lynx.strategy import BaseStrategy


@dataclass(slots=True)
class Quality:
    """What was measured of one setting; sums are over a sequence's scored places.

    Attributes:
        setting: The strategy and its options, or a configuration.
        kl: ``(S,)`` sums of KL(exact || policy), in nats.
        loss: ``(S,)`` sums of cross-entropy under the policy, in nats.
        exact_loss: ``(S,)`` sums of cross-entropy of the model alone, in nats.
        agree: ``(S,)`` places where both find the same token likeliest.
        places: ``(S,)`` places scored.
        examples: ``(S,)`` which text each sequence is: one that was measured in several batches counts once.
        layers: One report of the decode phase for every batch and layer.
    """

    setting: Any
    kl: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    exact_loss: list[float] = field(default_factory=list)
    agree: list[float] = field(default_factory=list)
    places: list[float] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)
    layers: list[list[PhaseReport]] = field(default_factory=list)

    def mean(self, name: str) -> Estimate:
        """Mean per place of ``kl``, ``loss``, ``exact_loss`` or ``agree``, with its interval over texts."""
        return bootstrap(self.by_text(getattr(self, name)), self.by_text(self.places))

    @property
    def kl_value(self) -> float:
        """Mean KL per place, in nats."""
        return math.fsum(self.kl) / math.fsum(self.places)

    @property
    def rise(self) -> Estimate:
        """Rise of the cross-entropy over exact routing, in nats per place."""
        difference = self.by_text(self.loss) - self.by_text(self.exact_loss)
        return bootstrap(difference, self.by_text(self.places))

    def by_text(self, values: Sequence[float]) -> Tensor:
        """Sums over the sequences of each text."""
        _, place = torch.tensor(self.examples).unique(return_inverse=True)
        sums = torch.zeros(int(place.max()) + 1, dtype=torch.float64)
        return sums.index_add(0, place, torch.tensor(values, dtype=torch.float64))

    def active(self, when: str = "after") -> list[float]:
        """Mean active experts per decode step of each layer, ``before`` or ``after`` selection."""
        return [_mean(reports, f"active_{when}", "steps") for reports in zip(*self.layers, strict=True)]

    def active_mean(self, when: str = "after") -> float:
        """Mean active experts per layer and decode step, ``before`` or ``after`` selection."""
        return math.fsum(self.active(when)) / len(self.active(when))

    @property
    def share(self) -> float:
        """Active experts after selection by those before, over all layers."""
        return math.fsum(self.active()) / math.fsum(self.active("before"))

    @property
    def kept_mass_mean(self) -> float:
        """Mean share of a token's own weight that was kept."""
        return _mean([report for batch in self.layers for report in batch], "kept_mass_mean", "open_rows")

    @property
    def answered_mass_mean(self) -> float:
        """Mean share of a token's own weight that stand-ins answered for."""
        return _mean([report for batch in self.layers for report in batch], "answered_mass_mean", "open_rows")

    @property
    def answered_mass_most(self) -> float:
        """The largest share of any token."""
        return max((r.answered_mass_most or 0.0 for batch in self.layers for r in batch), default=0.0)

    @property
    def kept_mass_worst(self) -> float:
        """The worst token's share."""
        return min(
            (r.kept_mass_worst for batch in self.layers for r in batch if r.kept_mass_worst is not None), default=1.0
        )


def measure(
    model: Any,
    batches: Iterable[ForcedBatch],
    settings: Sequence[Any],
    advance: Callable[[], None] = lambda: None,
    stress: bool = False,
) -> list[Quality]:
    """Run every setting on every batch, each column of continuation as one decode step of the batch.

    Args:
        model: A transformers causal language model, not attached.
        batches: The text.
        settings: What :func:`lynx.attach` takes: strategies or configurations.
        advance: Called after each batch and setting.
        stress: Put the prompts under the policy, too.
    """
    pairs = [(_in_all_layers(model, setting), Quality(setting)) for setting in settings]
    # one that remembers steps must see all batches; the others share what was read of each
    learning = [pair for pair in pairs if pair[0].strategy.remembers()]
    plain = [pair for pair in pairs if not pair[0].strategy.remembers()]
    texts = list(batches)
    for batch in texts if plain else ():
        prompt = Prompted(model, batch, stress)
        for config, quality in plain:
            with attach(model, config) as handle:
                prompt.score(quality, handle)
            advance()
    for config, quality in learning:
        with attach(model, config) as handle:
            for batch in texts:
                with handle.paused():
                    prompt = Prompted(model, batch, stress)
                prompt.score(quality, handle)
                handle.reset()  # the counters; what a strategy has learnt stays
                advance()
    return [quality for _, quality in pairs]


class Prompted:
    """A batch whose prompt the model alone has read, unless it is to be under the policy.

    Args:
        model: The model, not attached or paused.
        batch: The text.
        stress: Leave the prompt to the policy.
    """

    def __init__(self, model: Any, batch: ForcedBatch, stress: bool = False) -> None:
        self._model = model
        device = model.device
        self._batch = ForcedBatch(
            batch.ids.to(device),
            batch.mask.to(device),
            batch.prompt_columns,
            batch.scored.to(device),
            batch.examples or tuple(range(len(batch.ids))),
        )
        self._read = 0 if stress else batch.prompt_columns
        with torch.inference_mode():
            self._cache = fill_cache(model, self._batch, self._read) if self._read else None
            self._exact = self._log_probs()

    def score(self, quality: Quality, handle: Handle) -> None:
        """Run the continuations under the setting that is attached, and add what is found."""
        batch = self._batch
        with torch.inference_mode(), handle.teacher_forced(0):
            policy = self._log_probs()
            quality.layers.append([layer.phases["decode"] for layer in handle.report().layers])
        rows = batch.scored.nonzero()[:, 0]
        targets = batch.ids[:, 1:][batch.scored].unsqueeze(-1)
        exact = self._exact
        sums = {
            "kl": (exact.exp() * (exact - policy)).sum(-1),
            "loss": -policy.gather(-1, targets).squeeze(-1),
            "exact_loss": -exact.gather(-1, targets).squeeze(-1),
            "agree": (policy.argmax(-1) == exact.argmax(-1)).float(),
            "places": torch.ones(len(rows), device=rows.device),
        }
        for name, values in sums.items():
            per_row = torch.zeros(len(batch.ids), dtype=torch.float64, device=rows.device)
            getattr(quality, name).extend(per_row.index_add(0, rows, values.double()).tolist())
        quality.examples.extend(batch.examples)
        if not all(map(math.isfinite, quality.kl)):
            raise MeasureError(
                "the KL is not finite: the model gives out infinite or undefined scores on this text; try a wider "
                "dtype, or leave out the text on which it does."
            )

    def _log_probs(self) -> Tensor:
        """``(N, V)`` log-probabilities at the scored places."""
        batch, rest = self._batch, slice(self._read, None)
        # the next setting starts from the same prompt
        cached = {} if self._cache is None else as_argument(copy.deepcopy(self._cache), self._model)
        logits = self._model(
            input_ids=batch.ids[:, rest],
            attention_mask=batch.mask,
            position_ids=batch.positions[:, rest],
            **cached,
            use_cache=self._cache is not None,
        ).logits
        return torch.log_softmax(logits[:, :-1][batch.scored[:, rest]].float(), dim=-1)


def _in_all_layers(model: Any, setting: Any) -> Config:
    """The same with layers that are left out attached and exact, so that they are counted, too."""
    config = resolve_config(setting, {})
    if not isinstance(config.layers, LayerFilter) or not _nests(config.strategy):
        return config
    chosen = chosen_layers([layer.info for layer in discover(model).layers], config)
    strategies = {info.index: config.strategy for info in chosen}
    layered = {"name": "per-layer", "default": "exact", "strategies": strategies}
    return Config.build(
        {**{key: getattr(config, key) for key in Config.model_fields}, "strategy": layered, "layers": "all"}
    )


def _nests(strategy: BaseStrategy) -> bool:
    return type(strategy).acts_on is BaseStrategy.acts_on  # one that chooses phases must stay outermost


def _mean(reports: Sequence[PhaseReport], name: str, weight: str) -> float:
    known = [
        (getattr(report, name), getattr(report, weight)) for report in reports if getattr(report, name) is not None
    ]
    total = math.fsum(count for _, count in known)
    return math.fsum(value * count for value, count in known) / total if total else math.nan
