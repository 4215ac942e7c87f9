"""Ask a router what it does: random hidden states go in, and what comes out is told apart by dtype and shape."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

ARGUMENT = "argument"
PROBE_ROWS = 64
_BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "expert_biases", "balancing_biases", "score_bias")


class UnknownRouter(Exception):
    """The router's output cannot be understood; the message says why."""


@dataclass(frozen=True, slots=True)
class RouterOutput:
    """Where the decision is.

    Attributes:
        logits: Place in the router's output.
        weights: Place in the router's output; in the arguments of the experts where the block decides.
        ids: Like ``weights``; None where the router gives scores ``(T, E)`` in place of weights, 0 for every expert
            that a token does not have.
        by_block: The router gives logits alone, and the block around it makes of them what its experts are given.
        probabilities: What it gives as logits are probabilities, whose logarithms are logits.
    """

    logits: int
    weights: int
    ids: int | None
    by_block: bool = False
    probabilities: bool = False

    def read_logits(self, given: Tensor) -> Tensor:
        """Return logits ``(T, E)`` float32 from what the router gives as such."""
        values = given.float()
        return values.clamp_min(torch.finfo(torch.float32).tiny).log() if self.probabilities else values


@dataclass(frozen=True, slots=True)
class Probe:
    """One answer of a router to random hidden states.

    Attributes:
        output: Places in the output tuple.
        logits: ``(T, E)`` float32.
        weights: ``(T, k)`` float32.
        ids: ``(T, k)``.
        bias: What it adds to its scores for the choice alone, as far as its name tells, or None.
        bias_name: Path of that bias in what was probed, :data:`ARGUMENT` if it is passed to forward, or None.
        per_expert: Other vectors ``(E,)`` of the router, by path.
    """

    output: RouterOutput
    logits: Tensor
    weights: Tensor
    ids: Tensor
    bias: Tensor | None
    bias_name: str | None
    per_expert: dict[str, Tensor] = field(default_factory=dict)


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
    num_experts, hidden_size = matrix_of(router)
    drawn = Drawn(hidden_size, seed)
    hidden, argument = drawn(PROBE_ROWS, hidden_size), drawn(num_experts) * 0.3
    stand_in = copied(router, drawn.state)
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
            bias_name, bias = (ARGUMENT, argument) if biased else named_bias(stand_in)
            if _are_probabilities(output[places.logits]):
                places = replace(places, probabilities=True)
            logits, weights = places.read_logits(output[places.logits]), output[places.weights].float()
            if places.ids is None:
                weights, ids = weights.topk(int((weights[0] != 0).sum()), dim=-1)
            else:
                ids = output[places.ids]
            vectors = {
                name: value for name, value in _tensors(stand_in) if value.shape == (num_experts,) and name != bias_name
            }
            return Probe(places, logits, weights, ids, bias, bias_name, vectors)
    understood = [fault for fault in faults if isinstance(fault, UnknownRouter)]
    if understood:
        raise understood[0]
    raise UnknownRouter(f"it could not be called with hidden states {tuple(hidden.shape)}: {faults[0]}") from faults[0]


class Drawn:
    """Draws random float32 tensors on the CPU, in an order that the seed decides."""

    def __init__(self, hidden_size: int, seed: int) -> None:
        self._hidden_size = hidden_size
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        """Draw a tensor."""
        return torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")

    def state(self, value: Tensor) -> Tensor:
        """Draw other values for a parameter or buffer."""
        if not value.is_floating_point():
            return torch.zeros(value.shape, dtype=value.dtype, device="cpu")
        # logits of standard deviation 2: wide enough to tell rules apart, narrow enough that no score saturates
        wide = value.shape[-1:] == (self._hidden_size,)
        return self(*value.shape) * (2.0 / self._hidden_size**0.5 if wide else 0.3)


def copied(module: nn.Module, state: Callable[[Tensor], Tensor], children: bool = True) -> nn.Module:
    """Copy a module without its hooks, in eval mode, with other parameters and buffers; its children too, or none."""
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if name.endswith("_hooks") and isinstance(value, OrderedDict):
            twin.__dict__[name] = OrderedDict()
    for kind in ("_parameters", "_buffers"):
        tensors = vars(module)[kind].items()
        twin.__dict__[kind] = {name: None if value is None else state(value) for name, value in tensors}
    inner = vars(module)["_modules"].items() if children else ()
    twin.__dict__["_modules"] = {name: None if child is None else copied(child, state) for name, child in inner}
    twin.__dict__["training"] = False
    twin.__dict__.pop("forward", None)  # an override in the instance (accelerate's) is bound to the original
    return twin


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def matrix_of(router: nn.Module) -> tuple[int, int]:
    """Return ``(E, H)``, the shape of the largest matrix."""
    matrices = [value for _, value in _tensors(router) if value.ndim == 2 and value.is_floating_point()]
    if not matrices:
        raise UnknownRouter("it has no weight matrix (E, H)")
    rows, columns = max(matrices, key=lambda matrix: matrix.numel()).shape
    return rows, columns


def named_bias(router: nn.Module) -> tuple[str | None, Tensor | None]:
    """Find what a module adds to its scores for the choice alone, by its name."""
    for name, value in _tensors(router):
        if name.rpartition(".")[-1] in _BIAS_NAMES:
            return name, value
    return None, None


def _places(output: Any) -> RouterOutput:
    """Tell logits ``(T, E)``, weights ``(T, k)`` and ids ``(T, k)`` apart, or logits and scores ``(T, E)``."""
    if not isinstance(output, tuple):
        raise UnknownRouter(f"it returns {type(output).__name__} where logits, weights and ids are expected")
    matrices = {
        place: item
        for place, item in enumerate(output)
        if isinstance(item, Tensor) and item.ndim == 2 and len(item) == PROBE_ROWS
    }
    floats = [i for i, item in matrices.items() if item.is_floating_point()]
    ids = [i for i, item in matrices.items() if i not in floats and item.dtype != torch.bool]
    if len(ids) == 1:
        slots = matrices[ids[0]].shape[-1]
        weights = [i for i in floats if matrices[i].shape[-1] == slots]
        logits = [i for i in floats if matrices[i].shape[-1] > slots]
        if len(weights) == 1 and len(logits) == 1:
            return RouterOutput(logits[0], weights[0], ids[0])
    elif not ids and len(floats) == 2 and matrices[floats[0]].shape == matrices[floats[1]].shape:
        scores = [i for i in floats if _same_width(matrices[i])]
        if len(scores) == 1:
            return RouterOutput(next(i for i in floats if i not in scores), scores[0], None)
    shapes = [
        f"{item.dtype} {tuple(item.shape)}" if isinstance(item, Tensor) else type(item).__name__ for item in output
    ]
    words = f"its output ({', '.join(shapes)}) is not logits (T, E), weights (T, k) and ids (T, k)"
    raise UnknownRouter(words + _what_else(output))


def _same_width(scores: Tensor) -> bool:
    """Whether every row has the same number of experts, and not all."""
    width = (scores != 0).sum(-1)
    return bool((width == width[0]).all()) and 0 < int(width[0]) < scores.shape[-1]


def _are_probabilities(given: Tensor) -> bool:
    return bool((given >= 0).all()) and torch.allclose(given.float().sum(-1), torch.ones(()), rtol=0.0, atol=1e-5)


def _what_else(output: tuple[Any, ...]) -> str:
    """Say what kind of router an output is known to be from."""
    if any(isinstance(item, list) for item in output):
        return ": it sorts the tokens by expert itself and says how many each has"
    first = output[0] if output and isinstance(output[0], Tensor) else torch.empty(0)
    if first.ndim == 2 and not first.is_floating_point():
        return ": it hands out a mask of experts, under a capacity, and no weight for each of a token's slots"
    if first.ndim == 3 and first.is_floating_point():
        return ": it is router and experts in one, and returns hidden states"
    return ""
