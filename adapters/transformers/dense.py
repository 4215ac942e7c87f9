"""Experts that all run in every step, on inputs multiplied by scores that are 0 for most: here, only those in use."""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lynx.adapters.transformers.probe import copied
from lynx.kernels import ExpertWeights, run_experts
from lynx.kernels.gates import recognise


def runs_all(experts: Any) -> bool:
    """Whether an experts module is told nothing but hidden states, so that it has to run all of its experts."""
    if not isinstance(experts, nn.Module):
        return False
    _, *told = inspect.signature(type(experts).forward).parameters.values()
    return [each.kind for each in told] == [inspect.Parameter.POSITIONAL_OR_KEYWORD]


def why_not(experts: Any) -> str:
    """Say why such a module cannot be run by Lynx; empty if it can."""
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name, None)
        if not isinstance(weight, Tensor) or weight.ndim != 3 or not weight.is_floating_point():
            return f"{type(experts).__name__}.{name} is not one stacked floating-point tensor"
        if weight.element_size() < 2:
            return f"{type(experts).__name__}.{name} is quantised ({weight.dtype})"
    if not hasattr(experts, "act_fn") or not _does_as_expected(experts):
        return f"{type(experts).__name__} does not compute down(up * act(gate)) for every expert"
    return ""


def expert_weights(experts: Any, gate: str | None = None) -> ExpertWeights:
    """Read the module; cheap, and done anew each time, as offloaded weights come and go."""
    return ExpertWeights(experts.gate_up_proj, experts.down_proj, _Gate(experts), transposed=True, gate=gate)


class DenseExperts:
    """Stands for the forward of one experts module: runs the experts of a selection, or all where there is none.

    Attributes:
        module: The experts.
        gate: The formula of their activation, if it is one that a kernel can compute.
        previous: A forward that the module had of its own, not from its class.
    """

    def __init__(self, module: Any, previous: Any = None) -> None:
        self.module = module
        weights = expert_weights(module)
        device = "cpu" if weights.down.is_meta else weights.down.device
        self.gate = recognise(weights.activation, weights.expert_size, True, device)
        self.previous = previous
        self._given: tuple[Tensor, Tensor] | None = None

    def give(self, ids: Tensor | None, weights: Tensor | None) -> None:
        """Say which experts the next call is for, ``(T, k)``; None for all."""
        self._given = None if ids is None or weights is None else (ids, weights)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Run the experts.

        Args:
            hidden: ``(E * T, H)``: every token for every expert, multiplied by its score.

        Returns:
            ``(E * T, H)``, of which the sum over experts is the layer's output; it stands in the rows of the first.
        """
        given, self._given = self._given, None
        experts = expert_weights(self.module, self.gate)
        E = experts.num_experts
        if given is None or hidden.shape[0] != E * len(given[0]):
            return self._all(hidden)
        ids, weights = given
        tokens, k = ids.shape
        rows = torch.arange(tokens, device=ids.device).unsqueeze(-1)
        # every slot has an input of its own, so to the kernels it is a token
        slots = hidden.view(E, tokens, -1)[ids, rows].flatten(0, 1)
        used = (weights != 0).to(hidden.dtype).view(-1, 1)
        outputs = run_experts(slots, ids.reshape(-1, 1), used, experts).view(tokens, k, -1)
        summed = outputs.float().sum(1).to(hidden.dtype)
        return F.pad(summed, (0, 0, 0, (E - 1) * tokens))

    def _all(self, hidden: Tensor) -> Tensor:
        own = self.previous(hidden) if self.previous is not None else type(self.module).forward(self.module, hidden)
        assert isinstance(own, Tensor)
        return own


class DenseSwitch:
    """Puts the forward of experts modules in place, until :meth:`undo`.

    It stands in the instance; where accelerate has put one there to bring weights in, behind that.
    """

    def __init__(self) -> None:
        self._placed: list[DenseExperts] = []

    def set(self, module: Any) -> DenseExperts:
        """Switch a module over; return what stands for its forward."""
        name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
        placed = DenseExperts(module, vars(module).get(name))
        vars(module)[name] = placed
        self._placed.append(placed)
        return placed

    def undo(self) -> None:
        """Give every module its own forward back."""
        while self._placed:
            placed = self._placed.pop()
            space = vars(placed.module)
            for name in ("_old_forward", "forward"):
                if space.get(name) is placed:
                    if placed.previous is not None:
                        space[name] = placed.previous
                    elif name == "forward":
                        del space[name]
                    else:  # accelerate came after, keeps it there, and will call it
                        space[name] = types.MethodType(type(placed.module).forward, placed.module)


class _Gate:
    """The activation of one module: the second half of a row times the activated first."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        product: Tensor = up * self.module.act_fn(gate)
        return product


def _does_as_expected(experts: Any) -> bool:
    """Hold a copy of two small experts against what they are taken to compute."""
    E, T, H, inner = 2, 3, 4, 6
    generator = torch.Generator().manual_seed(0)
    shapes = {experts.gate_up_proj.shape: (E, H, 2 * inner), experts.down_proj.shape: (E, inner, H)}

    def state(value: Tensor) -> Tensor:
        return torch.randn(shapes.get(value.shape, value.shape), generator=generator, device="cpu")

    twin: Any = copied(experts, state)
    for name, size in {"hidden_size": H, "num_experts": E, "intermediate_size": inner, "expert_dim": inner}.items():
        if name in vars(twin):
            vars(twin)[name] = size
    hidden = torch.randn(E * T, H, generator=generator, device="cpu")
    try:
        with torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
            output = type(twin).forward(twin, hidden)
            expected = _Gate(twin)(hidden.view(E, T, H) @ twin.gate_up_proj) @ twin.down_proj
        return torch.allclose(output.view(E, T, H), expected, rtol=1e-4, atol=1e-5)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
