"""The file of a trace: safetensors that are written row by row, so that a trace may be larger than memory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lynx.errors import ConfigError

FORMAT = "lynx-trace"
VERSION = "1"
_HOW = "make one with `lynx trace MODEL --data FILE -o trace.safetensors`"
_DTYPES = {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


class TraceWriter:
    """Writes a trace; a context manager that leaves a whole file, or none.

    The safetensors library writes tensors that are in memory. This writes the same format, whose sizes are known
    before its content is.

    Args:
        path: The file; put in place when the block ends.
        rows: Rows of every tensor that is written in parts.
        whole: Tensors that are written at once.
        metadata: Texts beside them.

    Raises:
        ConfigError: The file cannot be written.
    """

    def __init__(self, path: Path, rows: int, whole: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self._path, self._partial = path, path.with_name(f"{path.name}.part")
        self._rows, self._whole = rows, whole
        self._metadata = {"format": FORMAT, "version": VERSION, **metadata}
        self._begins: dict[str, int] = {}
        try:
            self._file: BinaryIO = self._partial.open("wb")
        except OSError as error:
            raise ConfigError(f"cannot write the trace {str(path)!r}: {error}") from error

    def write(self, row: int, parts: Mapping[str, Tensor]) -> None:
        """Put parts of tensors in their place.

        Args:
            row: The first row.
            parts: ``(n, ...)`` each; every call brings the same tensors.
        """
        try:
            if not self._begins:
                self._lay_out(parts)
            for name, part in parts.items():
                self._put(self._begins[name] + row * part[0].numel() * part.element_size(), part)
        except OSError as error:
            raise ConfigError(f"cannot write the trace {str(self._path)!r}: {error}") from error

    def _lay_out(self, parts: Mapping[str, Tensor]) -> None:
        shapes = {name: (part, (self._rows, *part.shape[1:])) for name, part in parts.items()}
        shapes |= {name: (tensor, tuple(tensor.shape)) for name, tensor in self._whole.items()}
        header: dict[str, Any] = {"__metadata__": self._metadata}
        end = 0
        # widest types first: everything is aligned without gaps, which the format does not allow
        for name, (tensor, shape) in sorted(shapes.items(), key=lambda item: -item[1][0].element_size()):
            begin, end = end, end + tensor.element_size() * torch.Size(shape).numel()
            header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file.write(len(text).to_bytes(8, "little") + text)
        data = self._file.tell()
        self._begins = {name: data + header[name]["data_offsets"][0] for name in shapes}
        self._file.truncate(data + end)
        for name, tensor in self._whole.items():
            self._put(self._begins[name], tensor)

    def _put(self, place: int, tensor: Tensor) -> None:
        self._file.seek(place)
        self._file.write(tensor.contiguous().view(torch.uint8).numpy().data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            os.replace(self._partial, self._path)
        else:
            self._partial.unlink(missing_ok=True)


def read_trace_file(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Open the file of a trace; its tensors are mapped, and read when they are used.

    Returns:
        Its texts and its tensors.

    Raises:
        ConfigError: There is no such file, it is no trace, or it was written in another version of the format.
    """
    if not path.is_file():
        raise ConfigError(f"there is no trace {str(path)!r}; {_HOW}.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{str(path)!r} is no trace: {error}. Traces are whole safetensors; {_HOW}.") from error
    if metadata.get("format") != FORMAT:
        raise ConfigError(f"{str(path)!r} holds safetensors, but is no trace; {_HOW}.")
    if metadata.get("version") != VERSION:
        raise ConfigError(
            f"{str(path)!r} is a trace in version {metadata.get('version')} of the format, and this version of Lynx "
            f"reads version {VERSION}; record it again."
        )
    return metadata, tensors
