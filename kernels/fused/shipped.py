"""Every configuration of the kernels that the launches pick for models of today, to be compiled ahead of time.

`shipped` needs no GPU and compiles nothing. A configuration is what Triton's compiler takes: a kernel, the types of
its arguments, its compile-time values and its options.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from lynx.kernels import tune
from lynx.kernels.fused import launch
from lynx.kernels.fused.experts import combine_kernel, down_kernel, gate_up_kernel
from lynx.kernels.fused.plan import plan_kernel
from lynx.kernels.fused.shipped_answer import shipped_answer
from lynx.kernels.fused.shipped_route import shipped_route
from lynx.kernels.fused.shipped_standins import shipped_standins

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")


class Configuration(NamedTuple):
    """One compiled form of a kernel.

    Attributes:
        name: Unique for a target, "kernel/variant/...".
        kernel: The `triton.JITFunction`.
        signature: Argument types in the kernel's order, as "*bf16:16" or "i32:16" where pointer or number is known to
            be a multiple of 16, and "constexpr".
        constexprs: Compile-time values by name, among them arguments that are None.
        options: `num_warps`, `num_stages`.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]


class _Layer(NamedTuple):
    """A kind of experts. Sizes matter for whether blocks, or 16, divide them; one of each kind stands for its like."""

    name: str
    gate: str | None = "swiglu"
    transposed: bool = False
    bias: bool = False
    dtype: str = "bf16"
    H: int = 2048
    I: int = 768  # noqa: E741
    E: int = 128


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LAYERS = (
    _Layer("swiglu/bf16"),
    _Layer("swiglu/fp16", dtype="fp16"),
    _Layer("swiglu/fp32", dtype="fp32"),
    _Layer("swiglu/ragged", H=2064, I=1040),
    _Layer("swiglu/E8", H=4096, I=14336, E=8),
    _Layer("gpt_oss/bf16", "gpt_oss", transposed=True, bias=True, H=2880, I=2880),
    _Layer("gpt_oss_halves/bf16", "gpt_oss_halves", transposed=True, bias=True, H=640, I=640),
    _Layer("geglu_tanh/bf16", "geglu_tanh", H=2816, I=704),
    _Layer("relu2/bf16", "relu2", H=2688, I=1856),
    _Layer("own_gate/bf16", None),
)


def shipped(target: str) -> Iterator[Configuration]:
    """List the configurations for a target, one of `TARGETS`."""
    generation = target.replace(":", "_")
    for layer in _LAYERS:
        yield from _gate_up(layer, generation)
    for layer in _LAYERS:
        if layer.gate in ("swiglu", "gpt_oss"):
            yield from _down(layer, generation)
    for top_k in (1, 2, 4, 6, 8):
        yield from _combine(top_k, 128, generation)
    yield from _combine(2, 8, generation)
    for experts in (8, 32, 64, 128, 256, 512):
        yield from _plan(experts, generation)
    for entry in (*shipped_route(target), *shipped_standins(target), *shipped_answer()):
        yield Configuration(*entry)


def _gate_up(layer: _Layer, generation: str) -> Iterator[Configuration]:
    gated = launch.gate_constants(layer.gate)["GATED"]
    N = 2 * layer.I if layer.gate is None else layer.I
    for tokens in _loads("gate_up", layer, generation):
        chosen = launch.projection_settings("gate_up", tokens, _DTYPES[layer.dtype], generation)
        constants = launch.gate_constants(layer.gate)
        constants |= launch.product_constants(chosen, layer.H, N, layer.transposed, layer.bias)
        pointer = f"*{layer.dtype}:16"
        numbers = {"E": layer.E, "H": layer.H, "N": N, "expert_stride": layer.H * N * (2 if gated else 1)}
        yield _configuration(
            f"gate_up/{layer.name}/tokens{tokens}",
            gate_up_kernel,
            {
                "hidden": pointer,
                "plan": "*i32:16",
                "weight": pointer,
                "bias": pointer if layer.bias else "constexpr",
                "out": pointer,
                "k": "i32",
            },
            numbers,
            {**constants, "UPCAST": False} | ({} if layer.bias else {"bias": None}),
            launch.options(chosen),
        )


def _down(layer: _Layer, generation: str) -> Iterator[Configuration]:
    for tokens in _loads("down", layer, generation):
        chosen = launch.projection_settings("down", tokens, _DTYPES[layer.dtype], generation)
        constants = launch.product_constants(chosen, layer.I, layer.H, layer.transposed, layer.bias)
        pointer = f"*{layer.dtype}:16"
        yield _configuration(
            f"down/{layer.name}/tokens{tokens}",
            down_kernel,
            {
                "inner": pointer,
                "plan": "*i32:16",
                "weight": pointer,
                "bias": pointer if layer.bias else "constexpr",
                "combine": pointer,
                "out": "*fp32:16",
            },
            {"E": layer.E, "H": layer.H, "I": layer.I, "expert_stride": layer.H * layer.I},
            {**constants, "UPCAST": False} | ({} if layer.bias else {"bias": None}),
            launch.options(chosen),
        )


def _combine(top_k: int, experts: int, generation: str) -> Iterator[Configuration]:
    for tokens in _loads("combine", None, generation):
        chosen = tune.settings("combine", tokens, generation)
        yield _configuration(
            f"combine/k{top_k}/E{experts}/tokens{tokens}",
            combine_kernel,
            {"rows": "*fp32:16", "plan": "*i32:16", "out": "*bf16:16"},
            {"E": experts, "S": None, "H": 2048},
            {"TOP_K": top_k, "BLOCK_H": chosen["block_h"]},
            launch.options(chosen),
        )


def _plan(experts: int, generation: str) -> Iterator[Configuration]:
    for tokens in _loads("plan", None, generation):
        chosen = tune.settings("plan", tokens, generation)
        yield _configuration(
            f"plan/E{experts}/tokens{tokens}",
            plan_kernel,
            {"ids": "*i64:16", "weights": "*fp32:16", "plan": "*i32:16"},
            {"S": None, "E": experts},
            launch.plan_constants(chosen, experts),
            launch.options(chosen),
        )


def _loads(kernel: str, layer: _Layer | None, generation: str) -> list[int]:
    """The most tokens that each of a kernel's settings is for."""
    kernel += "_float32" if layer and layer.dtype == "fp32" else ""
    return [row["up_to"] for row in tune.table(generation)[kernel]]


def _configuration(
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    numbers: Mapping[str, int | None],
    constexprs: dict[str, Any],
    options: dict[str, int],
) -> Configuration:
    """Put a signature in the kernel's order; a number is None where the kernel does not specialise on it."""
    kinds = pointers | {n: "i32:16" if value and value % 16 == 0 else "i32" for n, value in numbers.items()}
    kinds |= dict.fromkeys(constexprs, "constexpr")
    return Configuration(name, kernel, {n: kinds[n] for n in kernel.arg_names}, constexprs, options)
