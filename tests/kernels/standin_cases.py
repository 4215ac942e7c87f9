"""Batches that lost slots, and stand-ins to answer for them."""

import torch
from cases import DEVICE
from torch import Tensor

from lynx.kernels import StandInWeights, reference_standins

Case = tuple[Tensor, Tensor, Tensor, Tensor, StandInWeights]


def make_case(
    T: int,
    k: int,
    E: int,
    H: int,
    r: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype] = (torch.float32,) * 4,
    lost: float = 0.4,
    seed: int = 0,
) -> Case:
    """A batch and a layer's stand-ins; dtypes of output, hidden states, weights and stand-ins."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    parts = normal(E, r, H, scale=H**-0.5), normal(E, r, H, scale=max(r, 1) ** -0.5), normal(E, H)
    standins = StandInWeights(*(part.to(DEVICE, dtypes[3]) for part in parts))
    ids = torch.rand(T, E, generator=generator).topk(k).indices
    gone = torch.rand(T, k, generator=generator) < lost
    weights = (torch.rand(T, k, generator=generator) + 0.01).masked_fill(~gone, 0)
    output, hidden = normal(T, H).to(DEVICE, dtypes[0]), normal(T, H).to(DEVICE, dtypes[1])
    return output, hidden, ids.to(DEVICE), weights.to(DEVICE, dtypes[2]), standins


def magnitude(case: Case) -> float:
    """The largest sum of magnitudes behind a number of the result: errors are in units of it."""
    output, hidden, ids, weights, standins = case
    sizes = StandInWeights(standins.inner.abs(), standins.outer.abs(), standins.bias.abs())
    summed = reference_standins(output.abs(), hidden.abs(), ids, weights.abs(), sizes)
    return summed.max().item() if summed.numel() else 1.0
