"""Muon for the matrices inside the layers, AdamW for everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeForCausalLM

# Quintic iteration that pushes singular values towards one; it does not need to converge.
QUINTIC = (3.4445, -4.7750, 2.0315)
QUINTIC_STEPS = 5


@torch.no_grad()
def orthogonalize(matrices: Tensor) -> Tensor:
    """Replaces each matrix [n, rows, columns] by roughly its nearest orthogonal one, in bfloat16."""
    a, b, c = QUINTIC
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).contiguous()
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    for _ in range(QUINTIC_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update of every matrix is orthogonalized.

    Parameters of three dimensions are stacks of matrices (one per expert); `gate_up_proj` holds two per expert.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float = 0.95, decay: float = 0.1) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "decay": decay, "halves": 1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Applies one update."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                velocity = state["momentum"]
                velocity.lerp_(param.grad, 1 - group["momentum"])
                update = torch.lerp(param.grad, velocity, group["momentum"])
                stacked = update.reshape(-1, param.shape[-2] // group["halves"], param.shape[-1])
                scale = max(1.0, stacked.shape[-2] / stacked.shape[-1]) ** 0.5
                direction = orthogonalize(stacked).to(param.dtype).reshape(param.shape)
                param.mul_(1 - group["lr"] * group["decay"])
                param.add_(direction, alpha=-group["lr"] * scale)


def build_optimizers(model: Qwen3MoeForCausalLM, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Splits the parameters between the two optimizers and remembers each group's peak learning rate."""
    pairs, matrices, rest = [], [], []
    for name, param in model.named_parameters():
        if name.endswith("gate_up_proj"):
            pairs.append(param)
        elif ".layers." in name and param.dim() >= 2 and not name.endswith("mlp.gate.weight"):
            matrices.append(param)
        else:
            rest.append(param)
    muon = Muon([{"params": matrices}, {"params": pairs, "halves": 2}], lr=muon_lr)
    adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    return [muon, adam]
