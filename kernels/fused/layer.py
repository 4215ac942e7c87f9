"""A layer's experts as custom ops, each opaque to torch.compile and safe in a captured graph.

The ops depend on shapes and on what a whole model shares, so one compiled graph serves all its layers.
"""

import torch
from torch import Tensor

from lynx.kernels.fused import launch
from lynx.kernels.plan import Plan, make_plan
from lynx.kernels.weights import ExpertWeights


@torch.library.custom_op("lynx::plan", mutates_args=())
def plan_op(ids: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """Make the buffer of a plan, as `launch.plan`."""
    return launch.plan(ids, weights, num_experts)


@plan_op.register_fake
def _(ids: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    return ids.new_empty(Plan.size(num_experts, ids.numel()), dtype=torch.int32)


@torch.library.custom_op("lynx::gate_up", mutates_args=())
def gate_up_op(
    hidden: Tensor,
    plan: Tensor,
    top_k: int,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    gate: str | None,
) -> Tensor:
    """Project up and apply the gate, as `launch.gate_up`."""
    return launch.gate_up(hidden, plan, top_k, weight, bias, transposed, gate)


@gate_up_op.register_fake
def _(
    hidden: Tensor,
    plan: Tensor,
    top_k: int,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    gate: str | None,
) -> Tensor:
    return hidden.new_empty(hidden.shape[0] * top_k, launch.up_columns(weight, transposed, gate), dtype=weight.dtype)


def _down(
    inner: Tensor,
    plan: Tensor,
    combine: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    dtype: torch.dtype,
) -> Tensor:
    rows = launch.down(inner, plan, combine, weight, bias, transposed)
    return launch.combine(rows, plan, weight.shape[0], combine.shape[1], dtype)


@torch.library.custom_op("lynx::down", mutates_args=())
def down_op(
    inner: Tensor,
    plan: Tensor,
    combine: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Project down, weight, and sum per token, as `launch.down` and `launch.combine`."""
    return _down(inner, plan, combine, weight, bias, transposed, dtype)


@down_op.register_fake
def _(
    inner: Tensor,
    plan: Tensor,
    combine: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    dtype: torch.dtype,
) -> Tensor:
    return inner.new_empty(combine.shape[0], weight.shape[2 if transposed else 1], dtype=dtype)


def run_fused(hidden: Tensor, ids: Tensor, weights: Tensor, experts: ExpertWeights, plan: Plan | None) -> Tensor | None:
    """Run a layer's experts with Lynx's kernels; arguments and result as of `run_experts`.

    None if gradients of the activation's own parameters are recorded, which its result tells and nothing before: they
    would have to come back through the down projection.
    """
    # A dispatcher that only passes on costs more on the host than the launch: it is called where something traces.
    traced = torch.compiler.is_compiling() or type(hidden) is not Tensor
    make, gate_up, down = (plan_op, gate_up_op, down_op) if traced else (launch.plan, launch.gate_up, _down)
    E, transposed = experts.num_experts, experts.transposed
    if plan is None:
        small = ids.numel() <= launch.PLAN_MAX_SLOTS and E <= launch.PLAN_MAX_EXPERTS
        plan = Plan(make(ids, weights, E), E, ids.numel()) if small else make_plan(ids, weights, E)
    rows = hidden.to(experts.gate_up.dtype)
    inner = gate_up(rows, plan.buffer, ids.shape[1], experts.gate_up, experts.gate_up_bias, transposed, experts.gate)
    if experts.gate is None:  # rows of lost slots hold anything; every step works row by row, and they are never read
        inner = experts.activation(inner).to(experts.down.dtype)
        if inner.requires_grad:
            return None
    return down(inner, plan.buffer, weights, experts.down, experts.down_bias, transposed, hidden.dtype)
