"""Calibrate: read text once, keep the moments of every expert, and fit what can stand in for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lynx.adapter import FoundLayer, LayerExperts
from lynx.attachment import discover, handle_of
from lynx.calibration.fit import LEAST, LayerFit, fit, smallest_rank, unexplained
from lynx.calibration.listening import Passage, doubt, listen, outputs_of
from lynx.calibration.moments import Moments
from lynx.calibration.progress import Progress, Unfinished
from lynx.errors import AttachError, ConfigError, MeasureError, UnsupportedModelError
from lynx.layers import MoESpec
from lynx.matching import experts_of, refuse_one_slot
from lynx.standins_file import StandInFile, StandInLayer, experts_hash, read_standins, write_standins

HELD_OUT = 5
"""Every so many-th passage is held out to choose ranks by, before stand-ins are fitted to all of them."""
_LEAST_DOUBT = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How stand-ins are made.

    Attributes:
        ranks: One rank for all layers; or several, of which each layer takes the smallest that is nearly the best.
        least: Experts that saw less than as many slots of equal weight get no stand-in.
        memory: GiB that moments may take. Layers that do not fit are left to another reading of the text.
        save_every: Seconds after which what was read is saved, to go on from.
    """

    ranks: tuple[int, ...] = (16,)
    least: float = LEAST
    memory: float = 4.0
    save_every: float = 300.0

    def check(self) -> None:
        """Raise :class:`lynx.ConfigError` where a number makes no sense."""
        if not self.ranks or min(self.ranks) < 0:
            raise ConfigError(f"a rank is a whole number from 0; got {list(self.ranks)}.")
        if self.memory <= 0 or self.least < 1:
            raise ConfigError(f"memory is above 0 GiB and least at least 1; got {self.memory} and {self.least}.")


@dataclass(frozen=True, slots=True)
class _Source:
    """One layer and its experts."""

    layer: FoundLayer
    experts: LayerExperts

    @property
    def name(self) -> str:
        return self.layer.info.name


def calibrate(
    model: Any,
    passages: Sequence[Passage],
    path: str | Path,
    effort: Effort | None = None,
    *,
    spec: MoESpec | None = None,
    conditions: Mapping[str, Any] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> StandInFile:
    """Make stand-ins for all experts of a model, and write them to a file.

    A slot counts by its squared weight, as its error does; by how far it is from the token's best, since those near it
    are seldom lost; and by how open the next token is (see :func:`lynx.calibration.listening.doubt`).

    Args:
        model: In eval mode, not attached.
        passages: The text. Every fifth is held out to choose the rank.
        path: The file. What was read so far stands beside it, with ``.unfinished`` behind its name, until it is done.
        effort: How; as by default without one.
        spec: What hand-written MoE blocks are made of, if somebody has to say it.
        conditions: What the file says of where it comes from.
        advance: Called after each of the :func:`readings`.

    Raises:
        AttachError: Lynx is attached to the model.
        ConfigError: A number makes no sense, there are too few passages, or the file cannot be written.
        MeasureError: What experts give is not finite.
        UnsupportedModelError: No adapter can take the model, or its experts cannot be run one by one.
    """
    path, effort = Path(path), effort or Effort()
    sources = _sources(model, passages, effort, spec)
    hashes = [experts_hash(source.experts.tensors()) for source in sources]
    said = {"passages": len(passages), "tokens": sum(passage.tokens for passage in passages), **(conditions or {})}
    asked = {**said, "experts": hashes, "text": [passage.code for passage in passages], "effort": repr(effort)}
    progress = Progress.open(path, asked, effort.save_every)
    while len(progress.done) < len(sources):
        rest = sources[len(progress.done) :]
        group = rest[: _that_fit(model, passages[0], rest, effort.memory)]
        fitted = _read(model, passages, group, progress, effort, advance)
        progress.finish(fitted)
    layers = [
        _layer(source, code, fitted, shares, effort)
        for source, code, (fitted, shares) in zip(sources, hashes, progress.done, strict=True)
    ]
    if not any(bool(layer.known.any()) for layer in layers):
        raise ConfigError(
            f"no expert saw as much as {effort.least:g} slots of equal weight in {said['tokens']} tokens, so there is "
            "nothing to write; give more text."
        )
    write_standins(path, layers, said)
    progress.remove()
    return read_standins(path)


def readings(model: Any, passages: Sequence[Passage], effort: Effort, spec: MoESpec | None = None) -> int:
    """How often :func:`calibrate` calls ``advance``, if it starts anew."""
    sources = _sources(model, passages, effort, spec)
    return len(passages) * -(-len(sources) // _that_fit(model, passages[0], sources, effort.memory))


def _sources(model: Any, passages: Sequence[Passage], effort: Effort, spec: MoESpec | None) -> list[_Source]:
    """Check what can stand against calibrating, and return the layers."""
    effort.check()
    if len(passages) < 2:
        raise ConfigError(f"{len(passages)} passages of text: one is held out, so two are needed at least.")
    _refuse_attached(model)
    if getattr(model, "training", False):
        raise ConfigError("the model is in training mode; call model.eval() first.")
    discovery = discover(model, spec)
    taken = [layer for layer in discovery.layers if not layer.refused]
    if not taken:
        raise UnsupportedModelError(f"none of the MoE layers can be taken: {discovery.layers[0].refused}")
    for layer in taken:
        refuse_one_slot(layer.info)
    return [_Source(layer, experts_of(discovery.adapter, model, layer)) for layer in taken]


def _read(
    model: Any,
    passages: Sequence[Passage],
    group: Sequence[_Source],
    progress: Progress,
    effort: Effort,
    advance: Callable[[], None],
) -> list[tuple[LayerFit, list[float]]]:
    """Read the text for some layers, and fit them."""
    unfinished = progress.unfinished or Unfinished(0, [])
    for place in range(unfinished.passages, len(passages)):
        _hear(model, passages[place], group, unfinished, place % HELD_OUT == HELD_OUT - 1 or place == 1)
        unfinished.passages = place + 1
        progress.keep(unfinished)
        advance()
    rank = max(effort.ranks)
    done = []
    for chosen, held_out in unfinished.moments:
        shares = unexplained(held_out, fit(chosen, min(rank, len(chosen.origin)), effort.least))
        chosen.join(held_out)  # in place: these are what memory is needed for
        done.append((fit(chosen, min(rank, len(chosen.origin)), effort.least), shares))
    return done


def _hear(model: Any, passage: Passage, group: Sequence[_Source], unfinished: Unfinished, hold_out: bool) -> None:
    """Add one passage to the moments of some layers."""
    layers = [(source.name, source.experts) for source in group]
    heard, output = listen(model, passage, layers)
    for place, (source, ear) in enumerate(zip(group, heard, strict=True)):
        rows = len(ear.parts[0][0]) if ear.parts else 0
        hidden, ids, weights = ear.one(passage.live.numel() if passage.live is not None else rows)
        living = slice(None) if passage.live is None else passage.live.flatten().to(hidden.device)
        open_next = doubt(output, len(hidden))
        if open_next is not None and not bool(torch.isfinite(open_next[living]).all()):
            raise MeasureError("the model gives out scores that are not finite on this text; try a wider dtype.")
        counted = _counted(ids, weights, open_next, passage.live, source.layer.info.num_experts)
        if place == len(unfinished.moments):
            origin = hidden[living].float().mean(0)
            origin = origin.double() if origin.numel() <= 512 else origin
            E = source.layer.info.num_experts
            unfinished.moments.append((Moments.empty(E, origin), Moments.empty(E, origin)))
        if unfinished.moments[place][0].origin.device != hidden.device:  # they were read from a file
            first, second = unfinished.moments[place]
            unfinished.moments[place] = first.to(hidden.device), second.to(hidden.device)
        moments = unfinished.moments[place][hold_out]
        with torch.inference_mode():
            for part, outputs in outputs_of(source.experts, hidden, ids.clamp_min(0)):
                if not bool(torch.isfinite(outputs[counted[part] > 0]).all()):
                    raise MeasureError(f"the experts of layer {source.name!r} give values that are not finite.")
                inputs = hidden[part].unsqueeze(1).expand(outputs.shape)
                flat = (inputs.flatten(0, 1), outputs.flatten(0, 1), ids[part].flatten(), counted[part].flatten())
                moments.add(*flat)


def _counted(ids: Tensor, weights: Tensor, open_next: Tensor | None, live: Tensor | None, E: int) -> Tensor:
    """By what each slot counts, ``(T, k)``; 0 for the token's best one, which no strategy drops, and for padding."""
    share = weights.float() / weights.float().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    counted = weights.float().square() * (1 - share).square()
    if open_next is not None:
        counted = counted * (open_next.to(counted.device) + _LEAST_DOUBT).unsqueeze(-1)
    if live is not None:
        counted = counted.masked_fill(~live.reshape(-1, 1).to(counted.device), 0.0)
    return counted.masked_fill((ids < 0) | (ids >= E), 0.0).nan_to_num(0.0)


def _layer(source: _Source, code: str, fitted: LayerFit, shares: list[float], effort: Effort) -> StandInLayer:
    rank = smallest_rank(shares, [min(rank, fitted.rank) for rank in effort.ranks])
    chosen, info = fitted.cut(rank), source.layer.info
    kind = _dtype_of(source.experts)
    return StandInLayer(
        name=info.name,
        index=info.index,
        experts=code,
        inner=chosen.inner.to(kind),
        outer=chosen.outer.to(kind),
        mean_in=chosen.mean_in.to(kind),
        mean_out=chosen.mean_out.to(kind),
        known=chosen.known,
        unexplained=tuple(shares[: rank + 1]),
    )


def _dtype_of(experts: LayerExperts) -> torch.dtype:
    """In which the model computes, as far as its experts tell."""
    kinds = {tensor.dtype for tensor in experts.tensors()}
    return next((kind for kind in (torch.bfloat16, torch.float16) if kind in kinds), torch.float32)


def _that_fit(model: Any, passage: Passage, sources: Sequence[_Source], memory: float) -> int:
    """How many of the next layers' moments fit into memory at once; at least one."""
    heard, _ = listen(model, passage, [(source.name, source.experts) for source in sources[:1]])
    width = heard[0].parts[0][0].shape[-1] if heard[0].parts else 1
    kind = torch.float64 if width <= 512 else torch.float32
    each = 2 * Moments.bytes_for(max(source.layer.info.num_experts for source in sources), width, kind)
    if each > memory * 2**30:
        raise ConfigError(
            f"what is kept of one layer's experts takes {each / 2**30:.3g} GiB, and {memory:g} may be used; give more "
            "memory (--memory)."
        )
    return min(len(sources), int(memory * 2**30 // each))


def _refuse_attached(model: Any) -> None:
    try:
        handle_of(model)
    except AttachError:
        return
    raise AttachError("Lynx is attached to this model; calibrate it while it is not (lynx.detach).")
