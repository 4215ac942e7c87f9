"""What every way of running experts must compute."""

import torch
from torch import Tensor

from lynx.kernels.weights import ExpertWeights


def reference_experts(hidden: Tensor, ids: Tensor, weights: Tensor, experts: ExpertWeights) -> Tensor:
    """Compute what `run_experts` must, as nested sums in float64: the oracle for tests, `(T, H)` in float64."""

    def project(row: Tensor, e: int, weight: Tensor, bias: Tensor | None) -> Tensor:
        matrix = weight[e].double()
        out = row @ (matrix if experts.transposed else matrix.T)
        return out if bias is None else out + bias[e].double()

    output = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    for t in range(ids.shape[0]):
        row = hidden[t : t + 1].double()
        for e, weight in zip(ids[t].tolist(), weights[t].double(), strict=True):
            if weight != 0 and 0 <= e < experts.num_experts:
                inner = experts.activation(project(row, e, experts.gate_up, experts.gate_up_bias))
                outer = project(inner, e, experts.down, experts.down_bias)
                output[t] += weight * (outer if experts.post_norm is None else experts.post_norm(outer))[0]
    return output
