"""Run a mixture-of-experts layer so that its cost follows the experts a batch uses, not the slots it has.

Symbols: T tokens, k slots per token, E experts, H hidden size, I expert size, S = T * k slots. A slot with weight 0 is
a lost slot: nothing is computed for it, and an expert that holds only lost slots is never read.
"""

from typing import Literal

import torch
from torch import Tensor

from lynx.kernels.backends import Backend, checked, choose_backend, choose_product, forced, recorded
from lynx.kernels.gates import find_gate
from lynx.kernels.grouped import run_grouped
from lynx.kernels.plan import Plan
from lynx.kernels.reference import reference_experts
from lynx.kernels.weights import ExpertWeights


def run_experts(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: ExpertWeights,
    backend: Backend | Literal["auto"] = "auto",
    plan: Plan | None = None,
) -> Tensor:
    """Run the experts that hold at least one slot with non-zero weight, and combine them per token.

    Each expert runs once over its rows. The k results of a token are weighted and summed in float32 (float64 for
    float64 weights) in slot order: no atomics, so equal inputs give equal bits.

    Args:
        hidden: Hidden states `(T, H)`.
        ids: Expert of each slot `(T, k)`, any integer type. Slots with ids outside [0, E) contribute nothing.
        weights: Combine weight of each slot `(T, k)`. Slots with weight 0 contribute nothing, whatever their expert.
        experts: The layer's experts.
        backend: "triton" runs Lynx's kernels; above 256 tokens it leaves the batch to torch's products. "grouped_mm"
            has static shapes and no sync of its own. "loop" goes over the active experts on the host, which reads
            their row counts: a device sync anywhere but on a CPU. "reference" is nested sums in float64, to compare
            with. "auto" asks the environment variable `LYNX_KERNELS`, and where that is not set, `choose_backend`.
        plan: The plan of these ids and weights, where it was made already; only "triton" has use for it.

    Returns:
        The layer's output `(T, H)`, with the dtype of `hidden`.

    Raises:
        ValueError: `backend` is none of the above, or cannot run these experts here; `experts.gate` names no formula;
            or the plan is for another number of experts or slots.
    """
    (tokens, k), E = ids.shape, experts.num_experts
    if experts.gate is not None:
        find_gate(experts.gate)
    if plan is not None and (plan.num_experts != E or plan.num_slots != tokens * k):
        raise ValueError(
            f"The plan is for {plan.num_experts} experts and {plan.num_slots} slots, these are {E} experts and "
            f"{tokens * k} slots. Give the plan of these ids and weights (make_plan), or none."
        )
    word = checked(backend)
    chosen = (choose_backend(experts, tokens) if word == "auto" else forced(word, experts, tokens)).backend
    if ids.numel() == 0 or E == 0:
        return torch.zeros_like(hidden)
    if chosen == "triton":
        # imported here: it loads triton, which only those need who run it
        from lynx.kernels.fused.layer import run_fused

        output = None if recorded(hidden, weights) else run_fused(hidden, ids, weights, experts, plan)
        if output is not None:
            return output
        chosen = choose_product(experts).backend  # these have gradients
        assert chosen != "triton"
    if chosen == "reference":
        return reference_experts(hidden, ids, weights, experts).to(hidden.dtype)
    return run_grouped(hidden, ids, weights, experts, chosen)
