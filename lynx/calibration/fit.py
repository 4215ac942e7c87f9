"""From moments to stand-ins: ridge regression, then the best approximation of a given rank, in closed form.

Of a linear map ``W`` fitted by least squares, the rank-r map with the smallest error on the same inputs is ``W``
projected on the leading r directions of its own outputs (reduced-rank regression: Izenman, 1975).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lynx.calibration.moments import Moments

RIDGE = 1e-2
"""Added to the inputs' covariance, in units of its mean variance."""
LEAST = 32
"""Fewest slots of equal weight from which a stand-in is fitted."""
_NEAR = 1.02
_MORE = 8
_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class LayerFit:
    """The stand-ins of one layer as they were fitted; attributes as of :class:`lynx.standins_file.StandInLayer`."""

    inner: Tensor
    outer: Tensor
    mean_in: Tensor
    mean_out: Tensor
    known: Tensor

    @property
    def rank(self) -> int:
        """The rank ``r``."""
        return self.inner.shape[1]

    def cut(self, rank: int) -> LayerFit:
        """Return the best stand-ins of a lower rank."""
        return LayerFit(self.inner[:, :rank], self.outer[:, :rank], self.mean_in, self.mean_out, self.known)


def fit(moments: Moments, rank: int, least: float = LEAST) -> LayerFit:
    """Fit the stand-ins of a layer.

    Args:
        moments: Of its experts.
        rank: ``r``, at most ``H``.
        least: Experts that saw less than as many slots of equal weight get none. The rank of the others is at most half
            of what they saw; rows beyond it are 0.
    """
    E, H = moments.inputs.shape
    known = (moments.effective >= least) & (moments.weight > 0)
    parts = [torch.zeros(E, *shape, dtype=torch.float64) for shape in ((rank, H), (rank, H), (H,), (H,))]
    inner, outer, mean_in, mean_out = parts
    for expert in known.nonzero().flatten().tolist():
        total = moments.weight[expert].double()
        x, y = moments.inputs[expert].double() / total, moments.outputs[expert].double() / total
        covariance = moments.input_input[expert].double() / total - torch.outer(x, x)
        cross = moments.input_output[expert].double() / total - torch.outer(x, y)
        spread = covariance.diagonal().mean()
        own = min(rank, int(moments.effective[expert] // 2))
        if own and bool(spread > 0):  # else the mean is all that is known
            regular = covariance + RIDGE * spread * torch.eye(H, dtype=x.dtype, device=x.device)
            solved = torch.linalg.solve(regular, cross)
            leading = _leading(solved.T @ covariance @ solved, own)
            inner[expert, :own], outer[expert, :own] = (solved @ leading).T.cpu(), leading.T.cpu()
        mean_in[expert], mean_out[expert] = (x + moments.origin.double()).cpu(), y.cpu()
    return LayerFit(inner, outer, mean_in, mean_out, known.cpu())


def missed(moments: Moments, fitted: LayerFit) -> Tensor:
    """Return how much of the experts' outputs stand-ins miss, for every rank up to their own.

    Args:
        moments: Of text that they were not fitted to; with the origin of what they were fitted to, or another.
        fitted: The stand-ins.

    Returns:
        ``(r + 1, E)`` sums of squared residuals, each slot by its weight; of experts without a stand-in, all of their
        outputs' squares.
    """
    sums = torch.zeros(fitted.rank + 1, len(fitted.known), dtype=torch.float64)
    for expert, known in enumerate(fitted.known.tolist()):
        squares = moments.output_output[expert].double().cpu()
        sums[:, expert] = squares
        if not known:
            continue
        n, A, B = moments.weight[expert].double().cpu(), fitted.inner[expert], fitted.outer[expert]
        x, y = moments.inputs[expert].double().cpu(), moments.outputs[expert].double().cpu()
        inner_inner = A @ moments.input_input[expert].double().cpu() @ A.T
        inner_output = A @ moments.input_output[expert].double().cpu() @ B.T
        outer_outer, seen = B @ B.T, x @ A.T
        from_origin = A @ (fitted.mean_in[expert] - moments.origin.double().cpu())
        for r in range(fitted.rank + 1):
            # inputs are taken from the origin, so the constant is what the map makes of the origin
            b = fitted.mean_out[expert] - from_origin[:r] @ B[:r]
            answered = (inner_inner[:r, :r] * outer_outer[:r, :r]).sum() + 2 * seen[:r] @ (B[:r] @ b) + n * (b @ b)
            sums[r, expert] -= 2 * (inner_output[:r, :r].trace() + b @ y) - answered
    return sums.clamp_min(0.0)


def unexplained(held_out: Moments, fitted: LayerFit) -> list[float]:
    """Share of the experts' squared outputs that stand-ins miss on held-out text, by rank from 0 to their own."""
    total = held_out.output_output.double().sum().cpu().clamp_min(torch.finfo(torch.float64).tiny)
    shares: list[float] = (missed(held_out, fitted).sum(-1) / total).tolist()
    return shares


def smallest_rank(shares: Sequence[float], ranks: Sequence[int]) -> int:
    """Choose the smallest of several ranks that comes within 2 % of the best one's error."""
    best = min(shares[rank] for rank in ranks)
    return min(rank for rank in ranks if shares[rank] <= _NEAR * best)


def _leading(symmetric: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors ``(H, r)`` of a matrix of squares, in descending order, by subspace iteration."""
    H = len(symmetric)
    wide = min(H, rank + _MORE)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(H, wide, generator=generator, dtype=symmetric.dtype).to(symmetric.device)
    for _ in range(_ROUNDS):
        basis, _ = torch.linalg.qr(symmetric @ basis)
    vectors = torch.linalg.eigh(basis.T @ symmetric @ basis).eigenvectors
    leading: Tensor = (basis @ vectors).flip(-1)[:, :rank]
    return leading
