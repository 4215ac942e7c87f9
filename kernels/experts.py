"""Run a mixture-of-experts layer so that its cost follows the experts a batch uses, not the slots it has.

Symbols: T tokens, k slots per token, E experts, H hidden size, I expert size, S = T * k slots. A slot with weight 0 is
a lost slot: nothing is computed for it, and an expert that holds only lost slots is never read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["grouped_mm", "loop"]

# With fewer elements a weight comes from cache, and what oneDNN costs per call (some 50 us) outweighs what it gains.
_ONEDNN_MIN_ELEMENTS = 2**20


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The weights of one layer's experts, where the host keeps them: nothing is copied or repacked.

    Attributes:
        gate_up: Up projections `(E, 2I, H)`; `(E, I, H)` where the experts have no gate.
        down: Down projections `(E, H, I)`.
        activation: The host's own gate or activation, row by row: `(S, 2I) -> (S, I)`, or `(S, I) -> (S, I)` without a
            gate. Whether gate and up are halves or interleaved is known here and nowhere else.
        gate_up_bias: Bias of the up projection `(E, 2I)` or `(E, I)`, or None.
        down_bias: Bias of the down projection `(E, H)`, or None.
        transposed: True where weights are stored input first: `gate_up (E, H, 2I)` and `down (E, I, H)`.
        post_norm: Applied row by row to each expert's output `(S, H)` before weighting, or None.
    """

    gate_up: Tensor
    down: Tensor
    activation: Callable[[Tensor], Tensor]
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    transposed: bool = False
    post_norm: Callable[[Tensor], Tensor] | None = None


class BackendChoice(NamedTuple):
    """A backend and, in a few words, why it was chosen."""

    backend: Backend
    reason: str


def choose_backend(experts: ExpertWeights) -> BackendChoice:
    """Say which backend `run_experts` takes for these weights under "auto", and why."""
    weight = experts.down
    if torch.compiler.is_compiling():
        if weight.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
            return BackendChoice("loop", "torch.compile takes grouped_mm in bfloat16 only; the loop breaks the graph")
        if weight.device.type == "cpu":
            return BackendChoice("grouped_mm", "torch.compile takes grouped_mm whole and would break on the loop")
    if weight.device.type == "cpu":
        return BackendChoice("loop", "on a CPU row counts are read for free, and small matrix products win")
    if weight.device.type != "cuda":
        return BackendChoice("loop", f"grouped_mm is not known to work on {weight.device.type}")
    if not hasattr(F, "grouped_mm"):
        return BackendChoice("loop", f"torch {torch.__version__} has no grouped_mm (2.10 and later do)")
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < (8, 0):
        return BackendChoice("loop", f"grouped_mm needs compute capability 8.0, this device has {capability}")
    if any(size * weight.element_size() % 16 for size in weight.shape[1:]):
        return BackendChoice("loop", "grouped_mm needs H and I that are multiples of 16 bytes")
    if capability < (9, 0) or weight.dtype != torch.bfloat16:
        return BackendChoice("grouped_mm", "torch's general grouped_mm (the fast one takes bfloat16 from 9.0 on)")
    return BackendChoice("grouped_mm", "CUDA with bfloat16: static shapes, no wait for the device")


def run_experts(
    hidden: Tensor, ids: Tensor, weights: Tensor, experts: ExpertWeights, backend: Backend | Literal["auto"] = "auto"
) -> Tensor:
    """Run the experts that hold at least one slot with non-zero weight, and combine them per token.

    Slots are sorted by expert, lost ones last, and each expert runs once over its rows. The k results of a token are
    weighted and summed in float32 (float64 for float64 weights) in slot order: no atomics, so equal inputs give equal
    bits.

    Args:
        hidden: Hidden states `(T, H)`.
        ids: Expert of each slot `(T, k)`, any integer type. Slots with ids outside [0, E) contribute nothing.
        weights: Combine weight of each slot `(T, k)`. Slots with weight 0 contribute nothing, whatever their expert.
        experts: The layer's experts.
        backend: "loop" goes over the active experts on the host, which reads their row counts: a device sync
            anywhere but on a CPU. "grouped_mm" has static shapes and no sync of its own. "auto" asks `choose_backend`.

    Returns:
        The layer's output `(T, H)`, with the dtype of `hidden`.

    Raises:
        ValueError: `backend` is none of the above.
    """
    if backend == "auto":
        backend = choose_backend(experts).backend
    elif backend not in ("grouped_mm", "loop"):
        raise ValueError(f"Unknown backend={backend!r}. Known: auto, grouped_mm, loop.")
    (T, k), (E, H) = ids.shape, (experts.down.shape[0], hidden.shape[-1])
    if T == 0:
        return torch.zeros_like(hidden)

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
            if weight != 0 and 0 <= e < experts.down.shape[0]:
                inner = experts.activation(project(row, e, experts.gate_up, experts.gate_up_bias))
                outer = project(inner, e, experts.down, experts.down_bias)
                output[t] += weight * (outer if experts.post_norm is None else experts.post_norm(outer))[0]
    return output
