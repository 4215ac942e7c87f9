"""Lynx's experts implementation, and the switch that makes a model's experts modules run it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from lynx.errors import ConfigError
from lynx.kernels.experts import ExpertWeights, run_experts

IMPLEMENTATION = "lynx"


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
    gated = module.has_gate
    return run_experts(
        hidden,
        ids,
        weights,
        ExpertWeights(
            gate_up=module.gate_up_proj if gated else module.up_proj,
            down=module.down_proj,
            gate_up_bias=(module.gate_up_proj_bias if gated else module.up_proj_bias) if module.has_bias else None,
            down_bias=module.down_proj_bias if module.has_bias else None,
            transposed=module.is_transposed,
            activation=module._apply_gate if gated else module.act_fn,
            post_norm=module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None,
        ),
    )


class ExpertsSwitch:
    """Makes experts modules run Lynx's implementation, until :meth:`undo`.

    Each module gets a copy of its config that names the implementation. The model's own config is not touched: it may
    be shared with other models, and what its owner sets there meanwhile holds again afterwards.
    """

    def __init__(self) -> None:
        self._previous: list[tuple[nn.Module, Any]] = []

    def set(self, modules: Iterable[Any]) -> None:
        """Switch the modules over."""
        # imported here: transformers is loaded where there is a model of it, and only there
        from transformers.integrations.moe import ExpertsInterface

        ExpertsInterface.register(IMPLEMENTATION, lynx_experts_forward)
        for module in modules:
            config = copy.copy(module.config)
            config._experts_implementation_internal = IMPLEMENTATION  # the property would write to sub-configs too
            self._previous.append((module, module.config))
            module.config = config

    def undo(self) -> None:
        """Give every module its own config back."""
        while self._previous:
            module, config = self._previous.pop()
            module.config = config


def choose(asked: Literal["auto", "model", "lynx"], modules: Sequence[Any]) -> str:
    """Decide who runs the experts, ``model`` or ``lynx``.

    ``auto`` leaves the model its own implementation, whose results it keeps bit for bit, unless decode would run
    ``batched_mm``: that one gathers weights per token and slot, so nothing is gained by waking fewer experts.

    Raises:
        ConfigError: Lynx's was asked for and cannot run this model.
    """
    if asked == "model":
        return "model"
    reason = next((why for module in modules if (why := why_not(module))), "")
    if asked == "lynx":
        if reason:
            raise ConfigError(f"experts='lynx' cannot run this model: {reason}; use experts='model'.")
        return "lynx"
    return "lynx" if not reason and any(_gathers(module) for module in modules) else "model"


def why_not(experts: nn.Module | None) -> str:
    """Say why an experts module cannot be run by Lynx; empty if it can."""
    if experts is None:
        return "no experts module was found beside the router"
    if not all(hasattr(experts, name) for name in ("config", "has_gate", "has_bias", "is_transposed")):
        return f"{type(experts).__name__} does not go through transformers' experts registry"
    if getattr(experts, "_is_expert_parallel", False):
        return "its experts are spread over processes"
    for name in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"):
        weight = getattr(experts, name, None)
        if not isinstance(weight, Tensor) or weight.ndim != 3 or not weight.is_floating_point():
            return f"{type(experts).__name__}.{name} is not one stacked floating-point tensor"
        if weight.element_size() < 2:
            return f"{type(experts).__name__}.{name} is quantised ({weight.dtype})"
    return ""


def _gathers(experts: Any) -> bool:
    """Whether decode would run ``batched_mm``; ``generate`` takes it in place of ``grouped_mm`` except on a CPU."""
    used = experts.config._experts_implementation
    return used == "batched_mm" or (used == "grouped_mm" and experts.down_proj.device.type not in ("cpu", "meta"))
