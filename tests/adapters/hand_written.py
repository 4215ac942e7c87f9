"""Five MoE models as their authors would write them: nothing here knows of Lynx."""

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, HIDDEN, EXPERTS = 64, 32, 8


class SwiGLU(nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.w1 = nn.Linear(dim, inner, bias=False)
        self.w2 = nn.Linear(inner, dim, bias=False)
        self.w3 = nn.Linear(dim, inner, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MixtralMoe(nn.Module):
    """A linear gate, the best k, a softmax over them, and a loop over a ModuleList; tokens come flat."""

    def __init__(self, dim, num_experts=EXPERTS, num_experts_per_tok=2):
        super().__init__()
        self.experts = nn.ModuleList([SwiGLU(dim, 2 * dim) for _ in range(num_experts)])
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.num_experts_per_tok = num_experts_per_tok

    def forward(self, inputs):
        squashed = inputs.view(-1, inputs.shape[-1])
        gate_logits = self.gate(squashed)
        weights, selected = torch.topk(gate_logits, self.num_experts_per_tok)
        weights = F.softmax(weights, dim=1, dtype=torch.float).type_as(inputs)
        results = torch.zeros_like(squashed)
        for i, expert in enumerate(self.experts):
            token, nth = torch.where(selected == i)
            results[token] += weights[token, nth, None] * expert(squashed[token])
        return results.view_as(inputs)


class DeepSeekGate(nn.Module):
    """Sigmoid scores; a bias and groups for the choice alone; normalised and scaled weights."""

    def __init__(self, dim, num_experts=EXPERTS, topk=3, n_groups=4, topk_groups=2, route_scale=2.5):
        super().__init__()
        self.dim, self.topk = dim, topk
        self.n_groups, self.topk_groups, self.route_scale = n_groups, topk_groups, route_scale
        self.weight = nn.Parameter(torch.randn(num_experts, dim) * dim**-0.5)
        self.bias = nn.Parameter(torch.randn(num_experts) * 0.1)

    def forward(self, x):
        scores = F.linear(x, self.weight).sigmoid()
        original_scores = scores
        scores = scores + self.bias
        scores = scores.view(x.size(0), self.n_groups, -1)
        group_scores = scores.topk(2, dim=-1)[0].sum(dim=-1)
        indices = group_scores.topk(self.topk_groups, dim=-1)[1]
        mask = scores.new_ones(x.size(0), self.n_groups, dtype=torch.bool).scatter_(1, indices, False)
        scores = scores.masked_fill_(mask.unsqueeze(-1), float("-inf")).flatten(1)
        indices = torch.topk(scores, self.topk, dim=-1)[1]
        weights = original_scores.gather(1, indices)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return (weights * self.route_scale).type_as(x), indices


class DeepSeekMoe(nn.Module):
    """The reference code's layer: a gate that decides, a loop over experts that have tokens, a shared expert."""

    def __init__(self, dim):
        super().__init__()
        self.dim, self.n_routed_experts = dim, EXPERTS
        self.gate = DeepSeekGate(dim)
        self.experts = nn.ModuleList([SwiGLU(dim, dim) for _ in range(EXPERTS)])
        self.shared_experts = SwiGLU(dim, dim)

    def forward(self, x):
        shape = x.size()
        x = x.view(-1, self.dim)
        weights, indices = self.gate(x)
        y = torch.zeros_like(x)
        counts = torch.bincount(indices.flatten(), minlength=self.n_routed_experts).tolist()
        for i in range(self.n_routed_experts):
            if counts[i] == 0:
                continue
            idx, top = torch.where(indices == i)
            y[idx] += self.experts[i](x[idx]) * weights[idx, top, None]
        return (y + self.shared_experts(x)).view(shape)


class NanoMLP(nn.Module):
    def __init__(self, n_embd, dropout=0.1):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd), nn.ReLU(), nn.Linear(4 * n_embd, n_embd), nn.Dropout(dropout)
        )

    def forward(self, x):
        return self.net(x)


class NanoRouter(nn.Module):
    """Gives a sparse softmax over all experts, and the ids."""

    def __init__(self, n_embd, num_experts, top_k):
        super().__init__()
        self.top_k = top_k
        self.linear = nn.Linear(n_embd, num_experts)

    def forward(self, x):
        logits = self.linear(x)
        top_k_logits, indices = logits.topk(self.top_k, dim=-1)
        sparse = torch.full_like(logits, float("-inf")).scatter(-1, indices, top_k_logits)
        return F.softmax(sparse, dim=-1), indices


class NanoMoE(nn.Module):
    """Dense weights, a mask for each expert, (B, T, C) throughout."""

    def __init__(self, n_embd, num_experts=EXPERTS, top_k=2):
        super().__init__()
        self.router = NanoRouter(n_embd, num_experts, top_k)
        self.experts = nn.ModuleList([NanoMLP(n_embd) for _ in range(num_experts)])

    def forward(self, x):
        gating_output, indices = self.router(x)
        final_output = torch.zeros_like(x)
        flat_x = x.view(-1, x.size(-1))
        flat_gating = gating_output.view(-1, gating_output.size(-1))
        for i, expert in enumerate(self.experts):
            mask = (indices == i).any(dim=-1)
            flat_mask = mask.view(-1)
            if flat_mask.any():
                output = expert(flat_x[flat_mask])
                final_output[mask] += output * flat_gating[flat_mask, i].unsqueeze(1)
        return final_output


class StackedMoE(nn.Module):
    """Two stacked tensors, gate and up in one, and einsum over all experts; softmax first, weights as they are."""

    def __init__(self, dim, num_experts=EXPERTS, top_k=2, inner=48):
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.w_in = nn.Parameter(torch.randn(num_experts, dim, 2 * inner) * dim**-0.5)
        self.w_out = nn.Parameter(torch.randn(num_experts, inner, dim) * inner**-0.5)

    def forward(self, x):
        probs = self.router(x).softmax(-1)
        top, ids = probs.topk(self.top_k, dim=-1)
        combine = torch.zeros_like(probs).scatter(-1, ids, top)
        gate, up = torch.einsum("btd,edi->btei", x, self.w_in).chunk(2, dim=-1)
        outputs = torch.einsum("btei,eid->bted", F.silu(gate) * up, self.w_out)
        return torch.einsum("bted,bte->btd", outputs, combine)


class BiasedMoE(nn.Module):
    """Sigmoid scores with a bias for balance, a gated shared expert, and the router's logits beside the output."""

    def __init__(self, dim, num_experts=EXPERTS, k=2):
        super().__init__()
        self.k = k
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.register_buffer("expert_bias", torch.randn(num_experts) * 0.1)
        self.experts = nn.ModuleList([SwiGLU(dim, dim) for _ in range(num_experts)])
        self.shared_expert = SwiGLU(dim, dim)
        self.shared_expert_gate = nn.Linear(dim, 1, bias=False)

    def forward(self, hidden_states):
        batch, length, dim = hidden_states.shape
        flat = hidden_states.view(-1, dim)
        router_logits = self.gate(flat)
        scores = torch.sigmoid(router_logits.float())
        _, chosen = torch.topk(scores + self.expert_bias, self.k, dim=-1)
        weights = scores.gather(1, chosen).to(flat.dtype)
        out = torch.zeros_like(flat)
        one_hot = F.one_hot(chosen, num_classes=len(self.experts)).permute(2, 1, 0)
        for e in range(len(self.experts)):
            slot, token = torch.where(one_hot[e])
            if token.numel():
                out.index_add_(0, token, self.experts[e](flat[token]) * weights[token, slot, None])
        out = out + torch.sigmoid(self.shared_expert_gate(flat)) * self.shared_expert(flat)
        return out.view(batch, length, dim), router_logits


class Loop(nn.Module):
    """A base for variants: experts, a linear router, and a loop over what `decide` gives."""

    def __init__(self, dim=HIDDEN, k=2):
        super().__init__()
        self.k = k
        self.router = nn.Linear(dim, EXPERTS, bias=True)
        self.experts = nn.ModuleList([SwiGLU(dim, dim) for _ in range(EXPERTS)])

    def decide(self, logits):
        top, ids = logits.softmax(-1).topk(self.k, dim=-1)
        return top / top.sum(-1, keepdim=True), ids

    def mixed(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, ids = self.decide(self.router(flat))
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out[token] += weights[token, slot, None] * expert(flat[token])
        return out.view_as(x)

    def forward(self, x):
        return self.mixed(x)


class Layer(nn.Module):
    def __init__(self, moe, dim):
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.mix = nn.Linear(dim, dim, bias=False)
        self.moe = moe

    def forward(self, x):
        out = self.moe(self.norm(x + self.mix(x)))
        return x + (out[0] if isinstance(out, tuple) else out)


class Model(nn.Module):
    """Token ids in, logits out; attention is beside the point."""

    def __init__(self, block, layers=2):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList([Layer(block(HIDDEN), HIDDEN) for _ in range(layers)])
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


BLOCKS = {
    "mixtral": MixtralMoe,
    "deepseek": DeepSeekMoe,
    "nano": NanoMoE,
    "stacked": StackedMoE,
    "biased": BiasedMoE,
}


def build(name, seed=0, layers=2):
    """A model whose routers prefer experts clearly, as trained ones do."""
    torch.manual_seed(seed)
    model = Model(BLOCKS[name], layers).eval()
    for layer in model.layers:
        gate = getattr(layer.moe, "gate", None) or layer.moe.router
        for parameter in gate.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=2.0 * HIDDEN**-0.5)
    return model
