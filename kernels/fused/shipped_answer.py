"""The configurations of the kernel that shares out lost slots, which are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from lynx.kernels.fused.answer import answer_kernel
from lynx.kernels.fused.launch_answer import constants, options


class _Case(NamedTuple):
    """A kind of batch, and what the host gives."""

    name: str
    k: int
    tokens: int
    re_picked: float = 0.3
    weights: str = "bf16"
    ids: str = "i64"


_CASES = (
    *(_Case(f"k{k}/blend/tokens{tokens}", k, tokens) for k in (4, 8, 10) for tokens in (16, 64, 256)),
    *(_Case(f"k8/alone/tokens{tokens}", 8, tokens, 0.0) for tokens in (16, 64, 256)),
    _Case("k2/blend/tokens16", 2, 16, weights="fp16"),
    _Case("k8/blend/tokens16/fp32", 8, 16, weights="fp32", ids="i32"),
    _Case("k32/alone/tokens256", 32, 256, 0.0, weights="fp32", ids="i32"),
)
_TYPES = {
    "lost_slots": "*i1:16",
    "choice": "*fp32:16",
    "known": "*i1:16",
    "phase": "*i8:16",
    "answered": "*fp32:16",
    "counted": "*fp64:16",
    "T": "i32",  # on which the kernel is not specialised
    "E": "i32",
    "E_known": "i32",
}


def shipped_answer() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """List name, kernel, signature, compile-time values and options, the same for every target."""
    for case in _CASES:
        compiled_for = constants(case.re_picked, case.tokens, case.k)
        signature = {arg: "constexpr" if arg in compiled_for else _type(arg, case) for arg in answer_kernel.arg_names}
        yield f"answer/{case.name}", answer_kernel, signature, compiled_for, options(case.tokens, case.k)


def _type(argument: str, case: _Case) -> str:
    """The type of a run-time argument, as Triton makes it of a launch; tensors come aligned from the allocator."""
    return _TYPES.get(argument, f"*{case.ids if argument.endswith('ids') else case.weights}:16")
