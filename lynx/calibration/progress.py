"""What was read and fitted so far, kept beside the file that is being made, to go on from."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lynx.calibration.fit import LayerFit
from lynx.calibration.moments import Moments
from lynx.errors import ConfigError

Done = tuple[LayerFit, list[float]]
_FIT = tuple(each.name for each in fields(LayerFit))


@dataclass(slots=True)
class Unfinished:
    """Layers that are being read.

    Attributes:
        passages: How many passages they have.
        moments: For each layer, of text to fit to and of text that is held out.
    """

    passages: int
    moments: list[tuple[Moments, Moments]]


class Progress:
    """The state of a calibration in a file; of no use to anybody but the same calibration again.

    Attributes:
        done: Layers that are fitted, each with what its stand-ins miss by rank.
        unfinished: Layers that were being read when the last run ended, None if there are none.
    """

    def __init__(self, path: Path, asked: str, every: float) -> None:
        self._path, self._asked, self._every = path, asked, every
        self._saved = time.monotonic()
        self.done: list[Done] = []
        self.unfinished: Unfinished | None = None

    @classmethod
    def open(cls, path: Path, asked: Mapping[str, Any], every: float) -> Self:
        """Go on from the file beside `path`, if it is there and of the same calibration.

        Raises:
            ConfigError: The folder is not there.
        """
        if not path.parent.is_dir():
            raise ConfigError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}.")
        code = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
        progress = cls(path.with_name(f"{path.name}.unfinished"), code, every)
        progress._load()
        return progress

    def keep(self, unfinished: Unfinished) -> None:
        """Save what was read, if that is long ago."""
        self.unfinished = unfinished
        if time.monotonic() - self._saved >= self._every:
            self._save()

    def finish(self, fitted: Sequence[Done]) -> None:
        """Save layers that are fitted; what was read of them is not needed any more."""
        self.done.extend(fitted)
        self.unfinished = None
        self._save()

    def remove(self) -> None:
        """Delete the file."""
        self._path.unlink(missing_ok=True)

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {}
        for place, (fitted, _) in enumerate(self.done):
            tensors |= {f"done.{place}.{name}": getattr(fitted, name).contiguous() for name in _FIT}
        for place, pair in enumerate(self.unfinished.moments if self.unfinished else ()):
            for side, moments in zip(("chosen", "held_out"), pair, strict=True):
                # the origin is one tensor for both, which safetensors would refuse
                parts = {name: part.clone() if name == "origin" else part for name, part in moments.tensors().items()}
                tensors |= {f"read.{place}.{side}.{name}": part for name, part in parts.items()}
        said = {
            "done": [shares for _, shares in self.done],
            "passages": self.unfinished.passages if self.unfinished else 0,
            "layers": len(self.unfinished.moments) if self.unfinished else 0,
        }
        partial = self._path.with_name(f"{self._path.name}.part")
        try:
            save_file(tensors, partial, {"asked": self._asked, "said": json.dumps(said)})
            os.replace(partial, self._path)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"cannot write {str(self._path)!r}: {error}") from error
        self._saved = time.monotonic()

    def _load(self) -> None:
        try:
            with safe_open(self._path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("asked") != self._asked:
                    return
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return  # none, or one that was cut off: it is made anew
        said = json.loads(metadata["said"])
        for place, shares in enumerate(said["done"]):
            self.done.append((LayerFit(*(tensors[f"done.{place}.{name}"] for name in _FIT)), shares))
        if said["layers"]:
            pairs = [
                (_moments(tensors, f"read.{place}.chosen"), _moments(tensors, f"read.{place}.held_out"))
                for place in range(said["layers"])
            ]
            self.unfinished = Unfinished(said["passages"], pairs)


def _moments(tensors: Mapping[str, Tensor], prefix: str) -> Moments:
    with torch.inference_mode(False):
        return Moments(*(tensors[f"{prefix}.{each.name}"] for each in fields(Moments)))
