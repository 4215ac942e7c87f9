"""Stand-ins: what answers for experts that were left out, as a configuration names it and as one layer runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_serializer
from torch import Tensor

from lynx.counters import as_tensors_name
from lynx.errors import ConfigError
from lynx.kernels.answer import answer, takes_answer
from lynx.kernels.backends import requested, try_at_first_call
from lynx.kernels.standins import StandInWeights, add_standins, why_not_standins
from lynx.rerouting import Rerouted
from lynx.routing import Routing
from lynx.standins_file import StandInLayer
from lynx.validation import Options

_RE_PICKED = {"blend": 0.2, "stand-in": 0.0}
"""How much of a token's answer its next best active experts give. Measured: see docs/stand-ins.md."""


class StandIns(Options):
    """Answer for lost slots with a file that ``lynx calibrate`` made.

    Attributes:
        file: The file; in a configuration file, its path from there.
        mode: ``blend`` mixes what stand-ins answer with re-picking, ``stand-in`` takes stand-ins alone, ``re-pick``
            leaves the file unused.
        rank: Use only so many leading directions of every stand-in; None for all that are in the file.
    """

    file: Path = Field(description="what `lynx calibrate` wrote")
    mode: Literal["blend", "stand-in", "re-pick"] = Field("blend", description="how lost slots are answered")
    rank: int | None = Field(None, ge=0, description="leading directions to use; all without it")

    @classmethod
    def described(cls) -> str:
        """Return what error messages call the option."""
        return "`standins`"

    @field_serializer("file")
    def _as_posix(self, file: Path) -> str:
        return file.as_posix()

    def beside(self, folder: Path) -> StandIns:
        """Read the file's path from a folder."""
        return self.model_copy(update={"file": folder / self.file})


def read_standins_option(value: Any) -> Any:
    """Take a path, a mapping with ``file``, finished options, or None."""
    if value is None or isinstance(value, StandIns):
        return value
    if isinstance(value, (str, Path)):
        return StandIns.build({"file": value})
    if isinstance(value, Mapping):
        return StandIns.build(value)
    raise ConfigError(f"`standins` is the path of a file, or a mapping with `file`; got {type(value).__name__}.")


class LayerStandIns:
    """The stand-ins of one layer at work.

    Rows that lost nothing are left as they are, bit for bit. A row that lost an expert without a stand-in, or all of
    its experts, is re-picked as if there were no stand-ins.

    Args:
        layer: From the file.
        mode: ``blend`` or ``stand-in``.
        rank: Leading directions to use; None for all.
    """

    def __init__(
        self, layer: StandInLayer, mode: Literal["blend", "stand-in"] = "blend", rank: int | None = None
    ) -> None:
        self.weights = layer.weights(rank)
        self.known = layer.known
        self.re_picked = _RE_PICKED[mode]

    def place(self, device: torch.device) -> None:
        """Put them on a device.

        Raises:
            ConfigError: ``LYNX_KERNELS`` asks for Triton, which cannot run there.
        """
        if device.type == "cuda":
            try_at_first_call(as_tensors_name(device))
        with torch.inference_mode(False):  # inference tensors could not be used outside of inference mode
            parts = (part.to(device) for part in (self.weights.inner, self.weights.outer, self.weights.bias))
            self.weights, self.known = StandInWeights(*parts), self.known.to(device)
        if requested() == "triton" and (reason := why_not_standins(self.weights)):
            raise ConfigError(f"LYNX_KERNELS=triton, but stand-ins cannot run on it: {reason}.")

    def answer(self, routing: Routing, result: Rerouted) -> Rerouted:
        """Say how much of each lost slot its stand-in answers; static shapes, no wait for the device.

        Kept slots get their original weights back, as nobody else answers for the lost ones, and lost slots go to their
        stand-ins at their original weights. A blend mixes that with what re-picking gives.

        Args:
            routing: The model's own decision.
            result: What re-routing made of it, by re-picking.

        Returns:
            The same with new weights, and with ``answered``.
        """
        lost, own_ids = result.lost, routing.slot_ids
        kept = routing.routed & ~lost
        rows = lost.any(-1, keepdim=True) & kept.any(-1, keepdim=True)
        rows = rows & (self.known[own_ids] | ~lost).all(-1, keepdim=True)
        own, given, share = result.own_weights.float(), result.weights.float(), self.re_picked
        mixed = torch.where(lost, share * given, share * given + (1 - share) * own)
        weights = torch.where(rows & routing.routed, mixed.to(result.weights.dtype), result.weights)
        answered = torch.where(rows & lost, (1 - share) * own, 0.0)
        ids, plan = result.ids, result.plan
        if not share:
            rank = routing.slot_rank.masked_fill(~kept, routing.top_k)
            best = own_ids.gather(-1, rank.argmin(-1, keepdim=True))
            ids, plan = torch.where(rows & lost, best.to(ids.dtype), ids), None  # the plan was of the ids before
        return replace(result, ids=ids, weights=weights, answered=answered, plan=plan)

    def fused(self, result: Rerouted) -> bool:
        """Whether `answer_and_count` takes a batch; known without waiting for the device."""
        return takes_answer(result.own_ids, result.own_weights, result.weights, self.known)

    def answer_and_count(self, routing: Routing, result: Rerouted, counted: Tensor) -> Rerouted:
        """Do what `answer` does, and the counting, in one launch of Lynx's kernel.

        Args:
            routing: The model's own decision.
            result: What re-routing made of it, by re-picking.
            counted: ``Counters.answered_on()``, changed in place.
        """
        own_ids, own_weights, share = result.own_ids, result.own_weights, self.re_picked
        given = result.ids, result.weights, result.lost, routing.choice, self.known, routing.phase
        done = answer(own_ids, own_weights, *given, counted, share)
        return replace(
            result,
            ids=done.ids,
            weights=done.weights,
            answered=done.answered,
            plan=result.plan if share else None,  # the plan was of the ids before
            known_lost_ids=done.lost_ids,
        )

    def add(self, output: Tensor, hidden: Tensor, ids: Tensor, answered: Tensor) -> Tensor:
        """Add what the stand-ins answer to what the experts gave, ``(T, H)``.

        Args:
            output: ``(T, H)``.
            hidden: ``(T, H)``, what the experts were given.
            ids: ``(T, k)``, the experts of the slots, 0 where none is lost.
            answered: ``(T, k)``, weights of their stand-ins, 0 where none is lost.
        """
        return add_standins(output, hidden, ids, answered, self.weights)
