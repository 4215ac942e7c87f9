"""Architecture of the reference model, and the fast CPU path its training uses for the experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PAD = 256
EOS = 257
VOCAB = 258
CONTEXT = 512
ROW_BLOCK = 128
QUERY_BLOCK = 128


def reference_config(
    hidden: int = 192, layers: int = 4, width: int = 72, heads: int = 6, experts: int = 32, top_k: int = 4
) -> Qwen3MoeConfig:
    """Returns the configuration of the byte-level model (ids 0-255 are bytes, then pad and eos)."""
    return Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=width * top_k,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=32,  # type: ignore[call-arg]
        max_position_embeddings=2 * CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        moe_intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        router_aux_loss_coef=0.02,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )


def build_model(config: Qwen3MoeConfig, seed: int) -> Qwen3MoeForCausalLM:
    """Builds a freshly initialised float32 model that uses the experts and attention implementations below."""
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(std=0.02)
            # Residual branches start small, so that early updates are not dominated by depth.
            layer.mlp.experts.down_proj.mul_((2 * config.num_hidden_layers) ** -0.5)
            layer.self_attn.o_proj.weight.mul_((2 * config.num_hidden_layers) ** -0.5)
    model.set_experts_implementation("sorted_experts")
    model.set_attn_implementation("blocked_causal")
    return model


def _padded_layout(index: Tensor, experts: int) -> tuple[Tensor, Tensor, list[tuple[int, int]], int]:
    """Places every (token, choice) pair in a buffer where each expert owns a multiple of ROW_BLOCK rows.

    The products are generated code, cached by shape: rounding the row counts keeps the number of shapes small.

    Returns:
        The buffer row of each pair [tokens * k], rows per expert, the (start, end) of each expert, the buffer size.
    """
    flat = index.flatten()
    counts = torch.bincount(flat, minlength=experts)
    padded = (counts + ROW_BLOCK - 1) // ROW_BLOCK * ROW_BLOCK
    starts = padded.cumsum(0) - padded
    order = flat.argsort(stable=True)
    rank = torch.arange(flat.numel()) - (counts.cumsum(0) - counts)[flat[order]]
    slot = torch.empty_like(flat)
    slot[order] = starts[flat[order]] + rank
    ends = padded.cumsum(0).tolist()
    return slot, counts, list(zip(starts.tolist(), ends, strict=True)), ends[-1]


class SortedExperts(torch.autograd.Function):
    """Runs every expert once on the rows routed to it; one expert's rows and weights stay in the L2 cache."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """Computes the weighted sum of the chosen experts' outputs."""
        k, width = index.shape[1], down.shape[2]
        slot, _, bounds, size = _padded_layout(index, gate_up.shape[0])
        source = torch.zeros(size, dtype=torch.int64)
        source[slot] = torch.arange(slot.numel()) // k
        rows = x[source]
        hidden, out = rows.new_empty(size, 2 * width), torch.empty_like(rows)
        for e, (start, end) in enumerate(bounds):
            if end > start:
                torch.mm(rows[start:end], gate_up[e].t(), out=hidden[start:end])
                gate, up = hidden[start:end].chunk(2, dim=-1)
                torch.mm(F.silu(gate) * up, down[e].t(), out=out[start:end])
        ctx.bounds = bounds
        ctx.save_for_backward(rows, hidden, out, source, slot, weights, gate_up, down)
        return torch.bmm(weights.to(x.dtype).unsqueeze(1), out[slot].view(x.shape[0], k, -1)).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients with respect to the inputs, the routing weights and both expert matrices."""
        rows, hidden, out, source, slot, weights, gate_up, down = ctx.saved_tensors
        grad_rows = grad[source]
        row_weights = weights.new_zeros(rows.shape[0])
        row_weights[slot] = weights.flatten()  # padding rows keep weight zero, hence zero gradient
        grad_weights = torch.bmm(grad_rows.unsqueeze(1), out.unsqueeze(2)).flatten()[slot].view_as(weights)
        grad_rows.mul_(row_weights.to(grad.dtype).unsqueeze(1))
        grad_x = torch.empty_like(rows)
        grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        for e, (start, end) in enumerate(ctx.bounds):
            if end == start:
                continue
            gate, up = hidden[start:end].chunk(2, dim=-1)
            sig = torch.sigmoid(gate)
            act = gate * sig
            torch.mm(grad_rows[start:end].t(), act * up, out=grad_down[e])
            da = grad_rows[start:end] @ down[e]
            dh = torch.cat([da * up * (sig + act * (1 - sig)), da * act], dim=-1)
            torch.mm(dh.t(), rows[start:end], out=grad_gate_up[e])
            torch.mm(dh, gate_up[e], out=grad_x[start:end])
        grad_x = grad_x[slot].view(grad.shape[0], -1, grad.shape[1]).sum(1)
        return grad_x, None, grad_weights.to(weights.dtype), grad_gate_up, grad_down


def sorted_experts(self: torch.nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts implementation registered with transformers; bfloat16 products under autocast."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_states.dtype
    gate_up, down = self.gate_up_proj.to(dtype), self.down_proj.to(dtype)
    with torch.autocast("cpu", enabled=False):
        return SortedExperts.apply(hidden_states.to(dtype), top_k_index, top_k_weights, gate_up, down)


def blocked_causal_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention for unpadded training windows, by blocks of queries, skipping the keys after each block."""
    groups = query.shape[1] // key.shape[1]
    dtype = value.dtype
    query = (query * scaling).to(dtype)
    key, value = key.to(dtype).repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    length = query.shape[2]
    block = min(QUERY_BLOCK, length)
    future = torch.full((block, block), float("-inf"), dtype=dtype).triu(1)
    outputs = []
    with torch.autocast("cpu", enabled=False):
        for start in range(0, length, block):
            end = start + block
            scores = query[:, :, start:end] @ key[:, :, :end].transpose(-1, -2)
            mask = F.pad(future, (start, 0))
            outputs.append((scores + mask).softmax(-1) @ value[:, :, :end])
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


ALL_EXPERTS_FUNCTIONS.register("sorted_experts", sorted_experts)
ALL_ATTENTION_FUNCTIONS.register("blocked_causal", blocked_causal_attention)
