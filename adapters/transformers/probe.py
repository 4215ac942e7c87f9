"""Ask a router what it does: random hidden states go in, and what comes out is told apart by dtype and shape."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

ARGUMENT = "argument"
_PROBE_ROWS = 64
_BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "expert_biases", "balancing_biases", "score_bias")


class UnknownRouter(Exception):
    """The router's output cannot be understood; the message says why."""


@dataclass(frozen=True, slots=True)
class RouterOutput:
    """Where a router's output tuple holds what."""

    logits: int
    weights: int
    ids: int


@dataclass(frozen=True, slots=True)
class Probe:
    """One answer of a router to random hidden states.

    Attributes:
        output: Places in the output tuple.
        logits: ``(T, E)`` float32.
        weights: ``(T, k)`` float32.
        ids: ``(T, k)``.
        bias: What it adds to its scores for the choice alone, as far as its name tells, or None.
        bias_name: Path of that bias in the router, :data:`ARGUMENT` if it is passed to forward, or None.
    """

    output: RouterOutput
    logits: Tensor
    weights: Tensor
    ids: Tensor
    bias: Tensor | None
    bias_name: str | None


def probe(router: nn.Module, seed: int = 0) -> Probe:
    """Run a router once on random float32 hidden states.

    It is a copy without hooks that runs, with random weights on the CPU: the answer depends on what the router computes
    and not on what it has learned, where its weights are or what type they have, and the router itself is not touched.

    Args:
        router: The module; not changed.
        seed: Draws the random weights and hidden states.

    Raises:
        UnknownRouter: It cannot be called, or its output has no logits, weights and ids.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    num_experts, hidden_size = _matrix(router)

    def state(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return torch.zeros(value.shape, dtype=value.dtype, device="cpu")
        # logits of standard deviation 2: wide enough to tell rules apart, narrow enough that no score saturates
        return random(*value.shape) * (2.0 / hidden_size**0.5 if value.shape[-1:] == (hidden_size,) else 0.3)

    hidden, argument = random(_PROBE_ROWS, hidden_size), random(num_experts) * 0.3
    stand_in = _copy(router, state)
    faults = []
    with torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        # some are given (B, q, H), some a bias beside it
        for wide, biased in product((False, True), (False, True)):
            arguments = [hidden.unsqueeze(0) if wide else hidden, *([argument] if biased else [])]
            try:
                output = type(stand_in).forward(stand_in, *arguments)
                places = _places(output)
            except Exception as error:
                faults.append(error)
                continue
            bias_name, bias = (ARGUMENT, argument) if biased else _named_bias(stand_in)
            logits, weights, ids = (output[place] for place in (places.logits, places.weights, places.ids))
            return Probe(places, logits.float(), weights.float(), ids, bias, bias_name)
    understood = [fault for fault in faults if isinstance(fault, UnknownRouter)]
    if understood:
        raise understood[0]
    raise UnknownRouter(f"it could not be called with hidden states {tuple(hidden.shape)}: {faults[0]}") from faults[0]


def _copy(module: nn.Module, state: Callable[[Tensor], Tensor]) -> nn.Module:
    """Copy a module without its hooks, in eval mode, with other parameters and buffers."""
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if name.endswith("_hooks") and isinstance(value, OrderedDict):
            twin.__dict__[name] = OrderedDict()
    for kind in ("_parameters", "_buffers"):
        tensors = vars(module)[kind].items()
        twin.__dict__[kind] = {name: None if value is None else state(value) for name, value in tensors}
    children = vars(module)["_modules"].items()
    twin.__dict__["_modules"] = {name: None if child is None else _copy(child, state) for name, child in children}
    twin.__dict__["training"] = False
    twin.__dict__.pop("forward", None)  # an override in the instance (accelerate's) is bound to the original
    return twin


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _matrix(router: nn.Module) -> tuple[int, int]:
    """Return ``(E, H)``, the shape of the largest matrix."""
    matrices = [value for _, value in _tensors(router) if value.ndim == 2 and value.is_floating_point()]
    if not matrices:
        raise UnknownRouter("it has no weight matrix (E, H)")
    rows, columns = max(matrices, key=lambda matrix: matrix.numel()).shape
    return rows, columns


def _named_bias(router: nn.Module) -> tuple[str | None, Tensor | None]:
    for name, value in _tensors(router):
        if name.rpartition(".")[-1] in _BIAS_NAMES:
            return name, value
    return None, None


def _places(output: Any) -> RouterOutput:
    """Tell logits ``(T, E)``, weights ``(T, k)`` and ids ``(T, k)`` apart."""
    if not isinstance(output, tuple):
        raise UnknownRouter(f"it returns {type(output).__name__} where logits, weights and ids are expected")
    shapes = [
        f"{item.dtype} {tuple(item.shape)}" if isinstance(item, Tensor) else type(item).__name__ for item in output
    ]
    matrices = {
        place: item
        for place, item in enumerate(output)
        if isinstance(item, Tensor) and item.ndim == 2 and len(item) == _PROBE_ROWS
    }
    ids = [i for i, item in matrices.items() if not item.is_floating_point() and item.dtype != torch.bool]
    if len(ids) == 1:
        slots = matrices[ids[0]].shape[-1]
        weights = [i for i, item in matrices.items() if item.is_floating_point() and item.shape[-1] == slots]
        logits = [i for i, item in matrices.items() if item.is_floating_point() and item.shape[-1] > slots]
        if len(weights) == 1 and len(logits) == 1:
            return RouterOutput(logits[0], weights[0], ids[0])
    raise UnknownRouter(f"its output ({', '.join(shapes)}) is not logits (T, E), weights (T, k) and ids (T, k)")
