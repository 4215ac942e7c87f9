"""A little inference framework that has never heard of Lynx: an engine with a fixed number of slots for sequences."""

import torch
from torch import Tensor, nn


class MoE(nn.Module):
    """Mixes the best ``k`` of ``E`` experts, weighed by a softmax over all of them."""

    def __init__(self, width: int, num_experts: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.router = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(num_experts)])
        self.on_route = None  # a seam of the framework: called with logits, ids and weights, may return other ones

    def forward(self, hidden: Tensor) -> Tensor:
        """Mix ``(T, H)``."""
        logits = self.router(hidden)
        weights, ids = logits.softmax(dim=-1).topk(self.k, dim=-1)
        if self.on_route is not None:
            ids, weights = self.on_route(logits, ids, weights)
        out = torch.zeros_like(hidden)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where((ids == e) & (weights != 0))
            out.index_add_(0, token, weights[token, slot, None] * expert(hidden[token]))
        return out


class Engine(nn.Module):
    """Decodes one token for every slot that holds a sequence, or reads a prompt into one slot."""

    def __init__(self, slots: int = 8, width: int = 32, layers: int = 2, num_experts: int = 8, k: int = 2) -> None:
        super().__init__()
        self.register_buffer("busy", torch.zeros(slots, dtype=torch.bool), persistent=False)
        self.embed = nn.Embedding(100, width)
        self.layers = nn.ModuleList([MoE(width, num_experts, k) for _ in range(layers)])
        self.reading = False

    def read(self, slot: int, prompt: Tensor) -> Tensor:
        """Read a prompt ``(L,)`` into a slot; return its hidden states ``(L, H)``."""
        self.busy[slot] = True
        self.reading = True
        try:
            return self(prompt)
        finally:
            self.reading = False

    def step(self, tokens: Tensor) -> Tensor:
        """Decode one token ``(slots,)`` each; rows of free slots mean nothing."""
        return self(tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """Run all layers."""
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden
