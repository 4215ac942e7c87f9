"""Answer for experts that were left out: a low-rank affine map for each stands in for it.

Symbols: T tokens, k slots per token, E experts, H hidden size, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StandInWeights:
    """One layer's stand-ins. That of expert `e` maps `x` to `x @ inner[e].T @ outer[e] + bias[e]`.

    Attributes:
        inner: `(E, r, H)`.
        outer: `(E, r, H)`.
        bias: `(E, H)`.
    """

    inner: Tensor
    outer: Tensor
    bias: Tensor

    @property
    def num_experts(self) -> int:
        """E."""
        return self.inner.shape[0]

    @property
    def rank(self) -> int:
        """The rank `r`."""
        return self.inner.shape[1]

    def to(self, like: Tensor) -> StandInWeights:
        """Return them with the device and dtype of a tensor."""
        return StandInWeights(self.inner.to(like), self.outer.to(like), self.bias.to(like))


def add_standins(output: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor, standins: StandInWeights) -> Tensor:
    """Add to a layer's output what the stand-ins of lost slots answer.

    Static shapes, no wait for the device. A slot with weight 0 contributes nothing, whatever its expert and whatever
    the token's hidden state.

    Args:
        output: What the experts gave, `(T, H)`.
        hidden: What the experts were given, `(T, H)`.
        ids: Expert of each slot, `(T, k)`, any integer type, in range.
        weights: Weight of each slot's stand-in, `(T, k)`; 0 for slots that are not lost.
        standins: The layer's stand-ins, on the same device.

    Returns:
        `(T, H)`, with the dtype of `output`.
    """
    dtype = standins.inner.dtype
    rows = hidden.to(dtype)
    E, r, H = standins.inner.shape
    tokens, k = ids.shape
    if tokens * k < E:  # fewer slots than stand-ins: read those of the slots
        picked, wide = ids.long(), weights.float()
        inner = torch.einsum("th,tkrh->tkr", rows, standins.inner[picked]).float()
        inner = torch.where(wide.unsqueeze(-1) != 0, inner * wide.unsqueeze(-1), 0.0)
        answer = torch.einsum("tkr,tkrh->th", inner.to(dtype), standins.outer[picked]).float()
        answer = answer + torch.einsum("tk,tkh->th", wide, standins.bias[picked].float())
    else:  # read all of them once, which weigh less than a few experts
        spread = torch.zeros(tokens, E, dtype=torch.float32, device=hidden.device)
        wide = spread.scatter_add(-1, ids.long(), weights.float())
        inner = (rows @ standins.inner.view(E * r, H).T).float().view(tokens, E, r)
        inner = torch.where(wide.unsqueeze(-1) != 0, inner * wide.unsqueeze(-1), 0.0)
        answer = (inner.to(dtype).view(tokens, E * r) @ standins.outer.view(E * r, H)).float()
        answer = answer + wide @ standins.bias.float()
    return (output.float() + answer).to(output.dtype)


def reference_standins(
    output: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor, standins: StandInWeights
) -> Tensor:
    """Nested sums in float64, to compare with; arguments as of `add_standins`, result `(T, H)` float64."""
    answer = output.double().clone()
    for t, (slots, shares) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
        for expert, share in zip(slots, shares, strict=True):
            if share != 0:
                inner, outer, bias = (part[expert].double() for part in (standins.inner, standins.outer, standins.bias))
                answer[t] += share * (hidden[t].double() @ inner.T @ outer + bias)
    return answer
