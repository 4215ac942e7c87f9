"""Experts, batches, launches and the comparison with float64 that the tests of kernels share."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lynx.kernels import ExpertWeights, reference_experts
from lynx.kernels.fused import launch_route
from lynx.kernels.gates import GATES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the magnitudes that are summed. On CPUs bfloat16 is rounded towards zero by Triton's interpreter.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}
NO_INDEX = -(2**31) + 7


def poisoned_empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer in which every element that is read before it is written shows."""
    if dtype.is_floating_point:
        return torch.full(shape, torch.nan, dtype=dtype, device=device)
    return torch.full(shape, NO_INDEX if dtype.itemsize >= 4 else torch.iinfo(dtype).max, dtype=dtype, device=device)


class launched_with:
    """Launch with other tile sizes and warps than the shape's own."""

    def __init__(self, options):
        self.options = options

    def __enter__(self):
        self.before = launch_route.shape_options
        launch_route.shape_options = lambda *shape: self.before(*shape) | self.options

    def __exit__(self, *error):
        launch_route.shape_options = self.before


def halves_gate(up: Tensor) -> Tensor:
    gate, up = up.chunk(2, dim=-1)
    return F.silu(gate) * up


def interleaved_gate(up: Tensor) -> Tensor:
    gate, up = up[..., ::2].clamp(max=7.0), up[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def squared_relu(up: Tensor) -> Tensor:
    return F.relu(up).square()


def rms_norm(rows: Tensor) -> Tensor:
    return F.rms_norm(rows, rows.shape[-1:], eps=1e-6)


def make_experts(
    layout: str,
    E: int,
    H: int,
    I: int,  # noqa: E741
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)

    if layout == "transposed":
        return ExpertWeights(
            normal(E, H, 2 * I, scale=H**-0.5),
            normal(E, I, H, scale=I**-0.5),
            interleaved_gate,
            gate_up_bias=normal(E, 2 * I, scale=0.1),
            down_bias=normal(E, H, scale=0.1),
            transposed=True,
        )
    width, activation = (I, squared_relu) if layout == "no gate" else (2 * I, halves_gate)
    weights = ExpertWeights(normal(E, width, H, scale=H**-0.5), normal(E, H, I, scale=I**-0.5), activation)
    return replace(weights, post_norm=rms_norm) if layout == "normed" else weights


def make_batch(
    T: int, k: int, E: int, H: int, dtype: torch.dtype = torch.float32, lost: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, ids and weights; a share of the slots is lost: weight 0, and an expert repeated from the row."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, H, generator=generator).to(dtype)
    weights, ids = torch.randn(T, E, generator=generator).softmax(-1).topk(k)
    gone = torch.rand(T, k, generator=generator) < lost
    ids, weights = torch.where(gone, ids[:, :1], ids), weights.masked_fill(gone, 0).to(dtype)
    return hidden.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE)


def assert_close_to_reference(
    output: Tensor,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: ExpertWeights,
    tolerance: float | None = None,
) -> None:
    """Compare in units of the summed magnitudes, as the slots of a token may cancel."""
    rows = hidden.repeat_interleave(ids.shape[1], 0)
    slots = reference_experts(rows, ids.reshape(-1, 1), weights.reshape(-1, 1), experts)
    slots = slots.view(*ids.shape, hidden.shape[1])
    scale = slots.abs().sum(1).max().item() if slots.numel() else 0.0
    assert output.dtype == hidden.dtype
    assert output.shape == hidden.shape
    error = (output.double() - slots.sum(1)).abs().max().item() if output.numel() else 0.0
    assert error <= (tolerance or TOLERANCE[experts.down.dtype]) * scale


def make_fusable(
    gate: str | None,
    transposed: bool,
    bias: bool,
    E: int,
    H: int,
    I: int,  # noqa: E741
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> ExpertWeights:
    """Experts of any layout, whose activation is a formula of `GATES`; None: one that has no name."""
    generator = torch.Generator().manual_seed(seed)
    gated = gate is None or GATES[gate].gated
    columns = 2 * I if gated else I

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)

    up, down = (E, columns, H), (E, H, I)
    if transposed:
        up, down = (E, H, columns), (E, I, H)
    return ExpertWeights(
        normal(*up, scale=H**-0.5),
        normal(*down, scale=I**-0.5),
        GATES[gate] if gate else interleaved_gate,
        gate_up_bias=normal(E, columns, scale=0.3) if bias else None,
        down_bias=normal(E, H, scale=0.3) if bias else None,
        transposed=transposed,
        gate=gate,
    )


PATTERNS = ("skewed", "equal", "one hot", "repeated", "padded", "foreign", "all lost")


def make_pattern(pattern: str, T: int, k: int, E: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and weights `(T, k)` of a kind of routing that needs its own care."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(T, E, generator=generator) * 2
    if pattern == "one hot":
        scores[:, E // 2] = 50.0
    weights, ids = scores.softmax(-1).topk(min(k, E))
    columns = torch.arange(k) % min(k, E)  # more slots than experts repeat them
    ids, weights = ids[:, columns], weights[:, columns]
    if pattern == "equal":
        weights = torch.full_like(weights, 1 / k)
    if pattern == "repeated":
        ids = torch.randint(E, (T, k), generator=generator)
    if pattern == "padded":
        ids = torch.where(torch.rand(T, 1, generator=generator) < 0.5, -1, ids)
    if pattern == "foreign":
        stray = torch.tensor([-(2**31), -1, E, E + 1, 2**31 - 1])[torch.randint(5, (T, k), generator=generator)]
        ids = torch.where(torch.rand(T, k, generator=generator) < 0.3, stray, ids)
    lost = torch.rand(T, k, generator=generator) < (1.0 if pattern == "all lost" else 0.3)
    return ids.to(DEVICE), weights.masked_fill(lost, 0).to(DEVICE)
