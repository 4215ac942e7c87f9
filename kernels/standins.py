"""Answer for experts that were left out: a low-rank affine map for each stands in for it.

Symbols: T tokens, k slots per token, E experts, H hidden size, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lynx.kernels.backends import MAX_TOKENS, recorded, requested, try_at_first_call, why_no_kernels

MAX_TOP_K = 32
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
    the token's hidden state. On a GPU these are two launches of Lynx's kernels, up to 256 tokens; `why_not_standins`
    says where they are not. With `LYNX_KERNELS` set to anything but "auto" or "triton" it is done in torch.

    Args:
        output: What the experts gave, `(T, H)`.
        hidden: What the experts were given, `(T, H)`.
        ids: Expert of each slot, `(T, k)`, any integer type, in range.
        weights: Weight of each slot's stand-in, `(T, k)`; 0 for slots that are not lost.
        standins: The layer's stand-ins, on the same device.

    Returns:
        `(T, H)`, with the dtype of `output`.

    Raises:
        ValueError: ``LYNX_KERNELS`` names nothing that exists, or asks for Triton on a device where it does not run; or
            shapes are not as above.
    """
    rows = (ids.shape[0], standins.inner.shape[2])
    if output.shape != rows or hidden.shape != rows or weights.shape != ids.shape:
        raise ValueError(
            f"These stand-ins take output and hidden states {rows} for ids {tuple(ids.shape)} and as many weights, got "
            f"{tuple(output.shape)}, {tuple(hidden.shape)} and {tuple(weights.shape)}."
        )
    if not _fused(output, hidden, ids, weights, standins):
        return _in_torch(output, hidden, ids, weights, standins)
    # imported here: it loads triton, which only those need who run it
    from lynx.kernels.fused import launch_standins

    # A dispatcher that only passes on costs more on the host than the launch: it is called where something traces.
    traced = torch.compiler.is_compiling() or type(output) is not Tensor
    answer = launch_standins.standins_op if traced else launch_standins.run
    done: Tensor = answer(output, hidden, ids, weights, standins.inner, standins.outer, standins.bias)
    return done


def why_not_standins(standins: StandInWeights, tokens: int | None = None) -> str:
    """Say in a few words why Lynx's kernels do not answer for a layer's stand-ins here; empty if they do.

    Args:
        standins: The layer's stand-ins.
        tokens: T, or None for as few as at decode.
    """
    if reason := why_no_kernels(standins.inner.device):
        return reason
    dtypes = dict.fromkeys((standins.inner.dtype, standins.outer.dtype, standins.bias.dtype))
    if any(dtype not in _DTYPES for dtype in dtypes):
        return f"the stand-ins are {' and '.join(map(str, dtypes))}, not bfloat16, float16 or float32"
    if tokens is not None and tokens > MAX_TOKENS:
        return f"the kernels are for at most {MAX_TOKENS} tokens, not {tokens}"
    if recorded(standins.inner, standins.outer, standins.bias):
        return "gradients are recorded, and the kernels have none (use torch.no_grad)"
    return ""


def _fused(output: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor, standins: StandInWeights) -> bool:
    """Whether Lynx's kernels take a call; known without waiting for the device."""
    word, device = requested(), standins.inner.device
    if word not in ("auto", "triton") or (word == "auto" and device.type != "cuda"):
        return False
    try_at_first_call(device)
    if word == "triton" and (reason := why_no_kernels(device)):
        raise ValueError(f"LYNX_KERNELS='triton' cannot run these stand-ins: {reason}.")
    return (
        not why_not_standins(standins, ids.shape[0])
        and ids.shape[1] <= MAX_TOP_K
        and all(each.dtype in _DTYPES for each in (output, hidden, weights))
        and all(each.device == device for each in (output, hidden, ids, weights))
        and not recorded(output, hidden, weights)
    )


def _in_torch(output: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor, standins: StandInWeights) -> Tensor:
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
        inner = (rows @ standins.inner.reshape(E * r, H).T).float().view(tokens, E, r)
        inner = torch.where(wide.unsqueeze(-1) != 0, inner * wide.unsqueeze(-1), 0.0)
        answer = (inner.to(dtype).view(tokens, E * r) @ standins.outer.reshape(E * r, H)).float()
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
