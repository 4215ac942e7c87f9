"""The file of stand-ins: safetensors with one low-rank map for each expert, and whose experts they stand in for."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lynx.errors import ConfigError
from lynx.kernels.standins import StandInWeights

FORMAT = "lynx-standins"
VERSION = "1"
_HOW = "make one with `lynx calibrate MODEL --data FILE -o standins.safetensors`"
_HASHED = 64
_TENSORS = ("inner", "outer", "mean_in", "mean_out", "known")


@dataclass(frozen=True, slots=True)
class StandInLayer:
    """The stand-ins of one layer. That of expert ``e`` maps ``x`` to ``mean_out + outer' inner (x - mean_in)``.

    Leading directions come first, so that the first few are the best stand-in of a lower rank.

    Attributes:
        name: Module path of the layer's router, where they were made.
        index: The layer's place among the model's MoE layers.
        experts: Hash of its experts' weights, see :func:`experts_hash`.
        inner: ``(E, r, H)``.
        outer: ``(E, r, H)``.
        mean_in: ``(E, H)``.
        mean_out: ``(E, H)``.
        known: ``(E,)`` bool: experts that have a stand-in; the others saw too few tokens.
        unexplained: Share of the experts' outputs, as squares, that the stand-ins miss on text that was held out; by
            rank, from 0 to r.
    """

    name: str
    index: int
    experts: str
    inner: Tensor
    outer: Tensor
    mean_in: Tensor
    mean_out: Tensor
    known: Tensor
    unexplained: tuple[float, ...] = ()

    @property
    def num_experts(self) -> int:
        """``E``."""
        return self.inner.shape[0]

    @property
    def rank(self) -> int:
        """``r``."""
        return self.inner.shape[1]

    @property
    def hidden_size(self) -> int:
        """``H``."""
        return self.inner.shape[2]

    @property
    def num_bytes(self) -> int:
        """What a step may read of them."""
        return sum(part.numel() * part.element_size() for part in (self.inner, self.outer, self.mean_out))

    def weights(self, rank: int | None = None) -> StandInWeights:
        """Return them as they are run, at their own rank or a lower one.

        Raises:
            ConfigError: The file has no such rank.
        """
        rank = self.rank if rank is None else rank
        if rank > self.rank:
            raise ConfigError(
                f"rank={rank}, but the stand-ins of layer {self.name!r} have rank {self.rank}; give less, or calibrate "
                "with a higher one."
            )
        inner, outer = self.inner[:, :rank].contiguous(), self.outer[:, :rank].contiguous()
        seen = torch.einsum("eh,erh->er", self.mean_in.double(), inner.double())
        bias = self.mean_out.double() - torch.einsum("er,erh->eh", seen, outer.double())
        return StandInWeights(inner, outer, bias.to(inner.dtype))


@dataclass(frozen=True, slots=True)
class StandInFile:
    """All stand-ins of a model.

    Attributes:
        layers: By their index.
        conditions: What they were made of: model, data, versions.
    """

    layers: dict[int, StandInLayer]
    conditions: dict[str, Any]

    @property
    def missing(self) -> dict[str, list[int]]:
        """Experts without a stand-in, by layer."""
        return {
            layer.name: (~layer.known).nonzero().flatten().tolist()
            for layer in self.layers.values()
            if not bool(layer.known.all())
        }


def experts_hash(tensors: Iterable[Tensor]) -> str:
    """Return a hash by which the experts of one layer are known again.

    It is of values spread evenly over the weights, 64 of each expert's matrix, rounded to bfloat16: the same for
    weights that were loaded in another precision, another one for weights that were trained on.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        count = _HASHED * (tensor.shape[0] if tensor.ndim > 1 else 1)
        step = max(1, flat.numel() // max(count, 1))
        while math.gcd(step, tensor.shape[-1]) > 1:  # else a few columns would be all that is looked at
            step += 1
        picked = flat[::step]
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(picked.float().bfloat16().cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def write_standins(path: Path, layers: Sequence[StandInLayer], conditions: Mapping[str, Any]) -> None:
    """Write a whole file, or none.

    Raises:
        ConfigError: It cannot be written.
    """
    described = [
        {"name": layer.name, "index": layer.index, "experts": layer.experts, "unexplained": layer.unexplained}
        for layer in layers
    ]
    tensors = {
        # a copy of each: the format takes no tensor twice
        f"layers.{layer.index}.{name}": getattr(layer, name).clone(memory_format=torch.contiguous_format)
        for layer in layers
        for name in _TENSORS
    }
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "layers": json.dumps(described),
        "conditions": json.dumps(dict(conditions)),
    }
    partial = path.with_name(f"{path.name}.part")
    try:
        save_file(tensors, partial, metadata)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write the stand-ins {str(path)!r}: {error}") from error


def read_standins(path: Path) -> StandInFile:
    """Read a file.

    Raises:
        ConfigError: There is no such file, it holds no stand-ins, or it is of another version of the format.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file of stand-ins {str(path)!r}; {_HOW}.")
    found = path.stat()
    return _read(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=2)
def _read(path: Path, *known_by: int) -> StandInFile:
    """Read a file once, however often it is attached with; nobody changes the tensors."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{str(path)!r} holds no stand-ins: {error}; {_HOW}.") from error
    if metadata.get("format") != FORMAT:
        raise ConfigError(f"{str(path)!r} holds safetensors, but no stand-ins; {_HOW}.")
    if metadata.get("version") != VERSION:
        raise ConfigError(
            f"{str(path)!r} is in version {metadata.get('version')} of the format, and this version of Lynx reads "
            f"version {VERSION}; calibrate again."
        )
    try:
        layers = [_layer(said, tensors) for said in json.loads(metadata["layers"])]
        conditions = json.loads(metadata["conditions"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} is damaged: {error}; {_HOW}.") from error
    return StandInFile({layer.index: layer for layer in layers}, conditions)


def _layer(said: dict[str, Any], tensors: Mapping[str, Tensor]) -> StandInLayer:
    """Put a layer together, or raise ValueError or KeyError where its parts do not fit."""
    parts = {name: tensors[f"layers.{said['index']}.{name}"] for name in _TENSORS}
    E, r, H = parts["inner"].shape
    wanted = {"inner": (E, r, H), "outer": (E, r, H), "mean_in": (E, H), "mean_out": (E, H), "known": (E,)}
    for name, shape in wanted.items():
        if parts[name].shape != shape:
            raise ValueError(f"{name} of layer {said['name']!r} is {tuple(parts[name].shape)}, not {shape}")
        if not bool(torch.isfinite(parts[name].float()).all()):
            raise ValueError(f"{name} of layer {said['name']!r} holds values that are not finite")
    return StandInLayer(
        name=said["name"],
        index=said["index"],
        experts=said["experts"],
        inner=parts["inner"],
        outer=parts["outer"],
        mean_in=parts["mean_in"],
        mean_out=parts["mean_out"],
        known=parts["known"],
        unexplained=tuple(said["unexplained"]),
    )
