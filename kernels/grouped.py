"""Experts by library products over rows sorted by expert: torch's grouped product, or a loop over the active experts.

Symbols: T tokens, k slots per token, E experts, H hidden size, I expert size, S = T * k slots.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lynx.kernels.weights import ExpertWeights

# With fewer elements a weight comes from cache, and what oneDNN costs per call (some 50 us) outweighs what it gains.
_ONEDNN_MIN_ELEMENTS = 2**20


def run_grouped(
    hidden: Tensor, ids: Tensor, weights: Tensor, experts: ExpertWeights, backend: Literal["grouped_mm", "loop"]
) -> Tensor:
    """Run each expert once over its rows; arguments and result as of `run_experts`.

    Slots are sorted by expert, lost ones last. "grouped_mm" has static shapes and no sync of its own; "loop" reads the
    experts' row counts on the host.
    """
    (T, k), (E, H) = ids.shape, (experts.num_experts, hidden.shape[-1])
    flat = ids.reshape(-1).long()
    used = (weights.reshape(-1) != 0) & (flat >= 0) & (flat < E)  # (S,)
    expert, slot = torch.where(used, flat, E).sort(stable=True)  # lost slots sort behind every expert
    ends = torch.searchsorted(expert, torch.arange(E, device=expert.device), right=True, out_int32=True)  # (E,)

    spans: list[_Span] | None = None
    if backend == "loop":
        spans = _active_spans(ends.tolist())
        if not spans:
            return torch.zeros_like(hidden)
        expert, slot = expert[: spans[-1].end], slot[: spans[-1].end]

    # With grouped_mm the rows of lost slots exist but are uninitialised from the first product on. Every step works row
    # by row, so they stay apart until they are masked below; their bias is any that exists.
    def project(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        matrices = weight if experts.transposed else weight.mT  # (E, in, out)
        rows = rows.to(weight.dtype)
        out = F.grouped_mm(rows, matrices, offs=ends) if spans is None else _loop_mm(rows, matrices, spans)
        return out if bias is None else out + bias[expert.clamp(max=E - 1)]

    inner = experts.activation(project(hidden[slot // k], experts.gate_up, experts.gate_up_bias))
    outer = project(inner, experts.down, experts.down_bias)
    if experts.post_norm is not None:
        outer = experts.post_norm(outer)

    outputs = outer.new_zeros(T * k, H).index_copy_(0, slot, outer)
    if spans is None:
        outputs.masked_fill_(~used.unsqueeze(-1), 0)
    precise = torch.promote_types(outputs.dtype, torch.float32)
    weighted = outputs.view(T, k, H) * weights.to(precise).unsqueeze(-1)
    return weighted.sum(dim=1).to(hidden.dtype)


class _Span(NamedTuple):
    """The sorted slots `[start, end)` of one active expert."""

    expert: int
    start: int
    end: int


def _active_spans(ends: list[int]) -> list[_Span]:
    """List the experts that have rows, from each expert's last row."""
    return [_Span(e, start, end) for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > start]


def _loop_mm(rows: Tensor, matrices: Tensor, spans: list[_Span]) -> Tensor:
    """Multiply each span of rows `(S, in)` by its expert's matrix, out of `(E, in, out)`, to `(S, out)`."""
    return torch.cat([_mm(rows[span.start : span.end], matrices[span.expert]) for span in spans])


def _mm(rows: Tensor, matrix: Tensor) -> Tensor:
    """Multiply a few rows `(n, in)` by a matrix `(in, out)` that is too large for the cache.

    On an x86 CPU in float32, oneDNN's inner product on the matrix as it lies takes 0.5 to 0.95 of the time of BLAS for
    2 to 128 rows, and about as long for one; bfloat16 goes to oneDNN in any case. It wants the matrix stored output
    first. Swapping the operands, padding the rows to 4, 8 or 16 and splitting the matrix were slower for most row
    counts.
    """
    weight = matrix.mT
    if (
        rows.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.numel() >= _ONEDNN_MIN_ELEMENTS
        and weight.is_contiguous()
        and type(weight) is Tensor  # subclasses (quantised weights) bring their own product
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    ):
        return F.linear(rows.to_mkldnn(), weight).to_dense()
    return rows @ matrix
