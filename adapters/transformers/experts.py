"""Lynx's experts implementation, and the switch that makes a model's experts modules run it."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lynx.adapters.transformers import dense
from lynx.errors import ConfigError, LynxWarning
from lynx.kernels import ExpertWeights, Plan, choose_backend, run_experts
from lynx.kernels.backends import try_kernels
from lynx.kernels.gates import recognise
from lynx.log import logger

IMPLEMENTATION = "lynx"


@dataclass(slots=True)
class Seat:
    """What Lynx's implementation knows of one layer's experts beside their module.

    Attributes:
        gate: The formula that the module's activation is, if it is one that a kernel can compute.
        given: The ids that the layer's router gave out last and their plan, until the experts have run them. They are
            one thing, so that threads which share a layer never find the plan of other ids.
    """

    gate: str | None = None
    given: tuple[Tensor, Plan] | None = None

    def give(self, ids: Tensor, plan: Plan | None) -> None:
        """Keep the plan for the experts, which will be called with these very ids."""
        self.given = None if plan is None else (ids, plan)

    def take(self, ids: Tensor, num_experts: int) -> Plan | None:
        """Return the plan if it is for these ids and for as many experts, and forget it.

        A router may know more experts than the module has, such as ones that compute nothing.
        """
        given, self.given = self.given, None
        return given[1] if given is not None and given[0] is ids and given[1].num_experts == num_experts else None


def lynx_experts_forward(module: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Run only the experts that have a slot with non-zero weight.

    Args:
        module: The host's experts module, with its stacked weights and layout flags.
        hidden: ``(T, H)``.
        ids: ``(T, k)``.
        weights: ``(T, k)``.

    Returns:
        ``(T, H)``.
    """
    seat: Seat = module._lynx_seat
    experts = expert_weights(module, seat.gate)
    return run_experts(hidden, ids, weights, experts, plan=seat.take(ids, experts.num_experts))


def expert_weights(module: Any, gate: str | None = None) -> ExpertWeights:
    """Read the host's experts module; cheap, and done anew each time, as offloaded weights come and go."""
    gated = module.has_gate
    return ExpertWeights(
        gate_up=module.gate_up_proj if gated else module.up_proj,
        down=module.down_proj,
        gate_up_bias=(module.gate_up_proj_bias if gated else module.up_proj_bias) if module.has_bias else None,
        down_bias=module.down_proj_bias if module.has_bias else None,
        transposed=module.is_transposed,
        activation=module._apply_gate if gated else module.act_fn,
        post_norm=module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None,
        gate=gate,
    )


class ExpertsSwitch:
    """Makes experts modules run Lynx's implementation, until :meth:`undo`.

    Each module gets a copy of its config that names the implementation, and a seat. The model's own config is not
    touched: it may be shared with other models, and what its owner sets there meanwhile holds again afterwards.
    """

    def __init__(self) -> None:
        self._previous: list[tuple[nn.Module, Any]] = []
        self._dense = dense.DenseSwitch()

    def set(self, modules: Iterable[Any]) -> list[Seat | dense.DenseExperts]:
        """Switch the modules over; return their seats, or what stands for those that run all experts."""
        # imported here: transformers is loaded where there is a model of it, and only there
        from transformers.integrations.moe import ExpertsInterface

        ExpertsInterface.register(IMPLEMENTATION, lynx_experts_forward)
        fp8 = sys.modules.get("transformers.integrations.finegrained_fp8")
        if fp8 is not None:  # its experts have a registry of their own, and may hold weights that are not quantised
            fp8.FP8ExpertsInterface.register(IMPLEMENTATION, lynx_experts_forward)
        seats: list[Seat | dense.DenseExperts] = []
        for module in modules:
            if dense.runs_all(module):
                seats.append(self._dense.set(module))
                continue
            config = copy.copy(module.config)
            config._experts_implementation_internal = IMPLEMENTATION  # the property would write to sub-configs too
            seat = Seat(_gate_of(module))
            self._previous.append((module, module.config))
            module.config, module._lynx_seat = config, seat
            seats.append(seat)
        return seats

    def undo(self) -> None:
        """Give every module its own config back, and take its seat."""
        self._dense.undo()
        while self._previous:
            module, config = self._previous.pop()
            module.config = config
            vars(module).pop("_lynx_seat", None)


def choose(asked: Literal["auto", "model", "lynx"], modules: Sequence[Any]) -> str:
    """Decide who runs the experts, ``model`` or ``lynx``.

    ``auto`` leaves the model its own implementation, whose results it keeps bit for bit, unless decode would run
    ``batched_mm``, which gathers weights per token and slot, or all experts for all tokens: nothing is gained there by
    waking fewer experts.

    Raises:
        ConfigError: Lynx's was asked for and cannot run this model, or ``LYNX_KERNELS`` asks for what cannot.
    """
    if asked == "model":
        return "model"
    reason = next((why for module in modules if (why := why_not(module))), "")
    if asked == "lynx" and reason:
        raise ConfigError(f"experts='lynx' cannot run this model: {reason}; use experts='model'.")
    if asked == "auto" and (reason or not any(_gathers(module) for module in modules)):
        return "model"
    for module in modules:
        _check_backend(module)
    return "lynx"


def backends_of(modules: Sequence[Any]) -> str:
    """Name what Lynx's implementation runs on at decode, as far as weights are there and not offloaded."""
    present = [weights for module in modules if not (weights := weights_of(module)).down.is_meta]
    with torch.no_grad():  # as at decode
        return ", ".join(sorted({choose_backend(weights).backend for weights in present}))


def weights_of(module: Any) -> ExpertWeights:
    """Read an experts module of either kind: told which experts to run, or running them all."""
    return dense.expert_weights(module) if dense.runs_all(module) else expert_weights(module)


def why_not(experts: nn.Module | None) -> str:
    """Say why an experts module cannot be run by Lynx; empty if it can."""
    if experts is None:
        return "no experts module was found beside the router"
    if spread(experts):
        return "its experts are spread over processes"
    if dense.runs_all(experts):
        return dense.why_not(experts)
    if not all(hasattr(experts, name) for name in ("config", "has_gate", "has_bias", "is_transposed")):
        return f"{type(experts).__name__} does not go through transformers' experts registry"
    for name in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"):
        weight = getattr(experts, name, None)
        if not isinstance(weight, Tensor) or weight.ndim != 3 or not weight.is_floating_point():
            return f"{type(experts).__name__}.{name} is not one stacked floating-point tensor"
        if weight.element_size() < 2:
            return f"{type(experts).__name__}.{name} is quantised ({weight.dtype})"
    return ""


def spread(experts: nn.Module) -> bool:
    """Whether processes share the experts, or each expert; how that is marked depends on the version."""
    marked = getattr(experts, "_is_expert_parallel", False) or getattr(experts, "_hf_tp_plan", None) is not None
    return marked or any(hasattr(parameter, "placements") for parameter in experts.parameters())


def _gathers(experts: Any) -> bool:
    """Whether decode would run ``batched_mm``; ``generate`` takes it in place of ``grouped_mm`` except on a CPU."""
    if dense.runs_all(experts):
        return True
    used = experts.config._experts_implementation
    return used == "batched_mm" or (used == "grouped_mm" and experts.down_proj.device.type not in ("cpu", "meta"))


def _gate_of(module: Any) -> str | None:
    """Find the formula of a module's own activation, by trying it."""
    weights = expert_weights(module)
    device = "cpu" if weights.down.is_meta else weights.down.device
    return recognise(weights.activation, weights.expert_size, module.has_gate, device)


def _check_backend(module: Any) -> None:
    """Raise where ``LYNX_KERNELS`` asks for what cannot run these experts; warn where the kernels fail to launch.

    Offloaded weights say nothing: they come to the device that runs them with their forward.
    """
    weights, failure = weights_of(module), ""
    if weights.down.is_meta:
        return
    try:
        with torch.no_grad():  # as at decode
            if choose_backend(weights).backend == "triton":
                failure = try_kernels(weights.down.device)
            if failure:
                choose_backend(weights)  # it knows now, and refuses if the kernels were asked for by name
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if failure:  # said once for a device, on which the kernels are not chosen any more
        logger.error("lynx.kernel_failed", device=weights.down.device, error=failure)
        warnings.warn(f"Lynx's kernels cannot run: {failure}; the experts run in torch", LynxWarning, stacklevel=2)
