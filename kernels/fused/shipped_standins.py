"""The configurations of the stand-ins' kernels that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from lynx.kernels import tune
from lynx.kernels.fused import launch
from lynx.kernels.fused.launch_standins import constants
from lynx.kernels.fused.standins import standin_inner_kernel, standin_outer_kernel


class _Case(NamedTuple):
    """A layer's stand-ins, and what the host gives; sizes are those of known models."""

    name: str
    E: int
    k: int
    H: int
    r: int
    standins: str = "bf16"  # dtype of the stand-ins
    host: str = "bf16"  # dtype of hidden states, weights and output
    ids: str = "i64"


_CASES = (
    *(_Case(f"rank{r}/qwen3", 128, 8, 2048, r) for r in (4, 8, 16, 64)),
    _Case("rank8/qwen3/fp32", 128, 8, 2048, 8, "fp32", "fp32"),
    _Case("rank8/qwen3/mixed", 128, 8, 2048, 8, "fp32", "bf16", "i32"),
    *(_Case(f"rank{r}/gpt_oss", 128, 4, 2880, r) for r in (8, 16)),
    _Case("rank16/mixtral", 8, 2, 4096, 16),
    _Case("rank8/slots16", 512, 16, 2048, 8),
    _Case("rank4/small", 32, 4, 256, 4, "fp32", "fp32"),
    _Case("rank8/ragged", 64, 6, 1030, 8),
)


def shipped_standins(target: str) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """List name, kernel, signature, compile-time values and options for a target."""
    generation = target.replace(":", "_")
    kernels = (("standin_inner", standin_inner_kernel), ("standin_outer", standin_outer_kernel))
    for case in _CASES:
        for name, kernel in kernels:
            for row in tune.table(generation)[name]:
                compiled_for = constants(row, case.k, case.r, case.H)
                signature = {
                    arg: "constexpr" if arg in compiled_for else _type(arg, case, name) for arg in kernel.arg_names
                }
                yield f"{name}/{case.name}/tokens{row['up_to']}", kernel, signature, compiled_for, launch.options(row)


def _type(argument: str, case: _Case, kernel: str) -> str:
    """The type of a run-time argument, as Triton makes it of a launch; tensors come aligned from the allocator."""
    numbers = {"E": case.E, "H": case.H, "expert_stride": case.r * case.H}
    if argument in numbers:
        return "i32" if numbers[argument] % 16 else "i32:16"
    if argument == "r":  # on which no kernel is specialised
        return "i32"
    between = argument == ("out" if kernel == "standin_inner" else "inner")
    if argument == "ids" or between:
        return "*fp32:16" if between else f"*{case.ids}:16"
    return f"*{case.standins if argument in ('inner', 'outer', 'bias') else case.host}:16"
