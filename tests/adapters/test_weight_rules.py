"""What is found out about each family's router, against what its source code says."""

from dataclasses import replace
from typing import Literal

import families
import pytest
import torch

import lynx
import lynx.attachment
from lynx.adapters.transformers.fingerprint import fingerprint

# the families as they are, and each switch of their routers the other way round
VARIANTS = [(name, {}) for name in families.FAMILIES] + [
    ("qwen2_moe", {"norm_topk_prob": True}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("olmoe", {"norm_topk_prob": True}),
    ("deepseek_v2", {"topk_method": "greedy", "n_group": 1, "topk_group": 1}),
    ("deepseek_v3", {"norm_topk_prob": False, "routed_scaling_factor": 16.0}),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    ("glm4_moe", {"n_group": 2, "topk_group": 1}),
]
IDS = ["-".join([name, *(f"{key}={value}" for key, value in changes.items())]) for name, changes in VARIANTS]


def _expected(name, changes):
    family = families.FAMILIES[name]
    if "norm_topk_prob" in changes:
        family = replace(family, renormalise=changes["norm_topk_prob"])
    if "routed_scaling_factor" in changes:
        family = replace(family, scale=changes["routed_scaling_factor"])
    if "n_group" in changes:
        grouped = changes["n_group"] > 1
        family = replace(family, groups=(changes["n_group"], changes["topk_group"], "top2-sum" if grouped else "max"))
        if not grouped and family.bias is None:
            family = replace(family, choice="logits")
    return family


@pytest.mark.smoke
@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=IDS)
def test_fingerprint(name, changes):
    expected = _expected(name, changes)
    model = families.build(name, **changes)
    for layer in lynx.attachment.discover(model).layers:
        found = fingerprint(layer.router)
        rule, choice = found.weights, found.choice
        assert layer.info.rule == rule
        assert (rule.score, rule.renormalise, rule.scale) == (expected.score, expected.renormalise, expected.scale)
        assert rule.repick == expected.repick
        assert choice.score == expected.choice
        assert choice.bias == expected.bias
        assert (choice.groups, choice.kept_groups, choice.group_score) == expected.groups
        assert (found.num_experts, found.top_k) == (layer.router.num_experts, layer.router.top_k)
        assert bool(layer.notes) == (not expected.repick)


@pytest.mark.smoke
def test_sparsemixer_says_so():
    for layer in lynx.attachment.discover(families.shared("phimoe")).layers:
        assert not layer.info.rule.repick
        assert "keep or lose their own experts" in layer.notes[0]


class Without(lynx.SelectionStrategy):
    """Keep all experts but one, for every token; -1 keeps all."""

    name: Literal["without"] = "without"
    protect: int = 0
    expert: int

    def select(self, routing):
        keep = torch.ones(routing.num_experts, dtype=torch.bool)
        if self.expert >= 0:
            keep[self.expert] = False
        return keep


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=IDS)
def test_rewritten_weights(name, changes):
    """Without one expert, every row is what its router would do if it were not allowed that expert."""
    model = families.build(name, **changes)
    router = families.routers(model)[0]
    own = _routed(model, router, None)
    kept = _routed(model, router, Without(expert=-1))
    for mine, its in zip(kept, own, strict=True):
        assert mine.dtype == its.dtype
        assert torch.equal(mine, its)

    logits, weights, ids = own
    # the most wanted expert, the least wanted one, and some token's best
    counts = ids.flatten().bincount(minlength=logits.shape[-1])
    best = int(ids[0, weights[0].argmax()])
    for expert in {int(counts.argmax()), int(counts.argmin()), best}:
        new_logits, new_weights, new_ids = _routed(model, router, Without(expert=expert))
        assert torch.equal(new_logits, logits)
        has_it = (ids == expert).any(-1)
        assert torch.equal(new_ids[~has_it], ids[~has_it])
        assert torch.equal(new_weights[~has_it], weights[~has_it])
        expected = _forbid(name, model.config, router, own, expert)
        torch.testing.assert_close(_dense(new_ids, new_weights, logits), expected, rtol=2e-6, atol=1e-9)
        if has_it.any() and families.FAMILIES[name].repick:
            gained = _dense(new_ids, new_weights, logits)[has_it] > 0
            assert (gained.sum(-1) == ids.shape[-1]).all()  # the lost slot is filled again


def _routed(model, router, strategy):
    """Logits, weights and ids of one router, told apart here, in a prefill on which a strategy acts."""
    batch = families.prompts(rows=8, columns=8)
    outputs = []
    handle = None
    if strategy is not None:
        handle = lynx.attach(model, {"name": "phase-aware", "prefill": strategy}, min_tokens=1)
    # registered after Lynx's hook, so that it sees what the experts see
    spy = router.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        model(input_ids=batch["input_ids"].clamp_min(3))
    spy.remove()
    if handle is not None:
        handle.detach()
    (ids,) = (item for item in outputs[0] if not item.is_floating_point())
    weights, logits = sorted((item for item in outputs[0] if item.is_floating_point()), key=lambda item: item.shape[1])
    return logits, weights, ids


def _dense(ids, weights, logits):
    """``(T, E)`` float64 weights."""
    return torch.zeros(logits.shape, dtype=torch.float64).scatter_add(-1, ids, weights.double())


def _forbid(name, config, router, own, expert):
    """Do in float64 what the router's source does, with one expert forbidden; ``(T, E)`` weights."""
    logits = own[0].double()
    k, options = router.top_k, {"expert": expert, "k": router.top_k}
    if name in ("mixtral", "minimax"):
        return _top(logits.softmax(-1), logits.softmax(-1), True, 1.0, **options)
    if name in ("qwen2_moe", "qwen3_moe", "olmoe"):
        return _top(logits.softmax(-1), logits.softmax(-1), config.norm_topk_prob, 1.0, **options)
    if name == "jamba":
        return _top(logits.softmax(-1), logits.softmax(-1), False, 1.0, **options)
    if name in ("gpt_oss", "granitemoe"):
        chosen = _without(logits, expert).topk(k, dim=-1)
        return torch.zeros_like(logits).scatter(-1, chosen.indices, chosen.values.softmax(-1))
    if name == "deepseek_v2":
        scores = logits.softmax(-1)
        choice = scores
        if config.topk_method == "group_limited_greedy":
            strength = scores.unflatten(-1, (config.n_group, -1)).amax(-1)
            choice = _in_groups(scores, strength, config.topk_group)
        return _top(choice, scores, False, config.routed_scaling_factor, **options)
    if name in ("deepseek_v3", "glm4_moe"):
        scores = logits.sigmoid()
        choice = scores + router.e_score_correction_bias.double()
        strength = choice.unflatten(-1, (config.n_group, -1)).topk(2, dim=-1).values.sum(-1)
        choice = _in_groups(choice, strength, config.topk_group)
        return _top(choice, scores, config.norm_topk_prob, config.routed_scaling_factor, **options)
    assert name == "phimoe"  # weights of other experts cannot be known: own slots are kept or lost
    dense = _dense(own[2], own[1], logits)
    dense[:, expert] = 0.0
    return dense


def _top(choice, scores, renormalise, scale, expert, k):
    chosen = _without(choice, expert).topk(k, dim=-1).indices
    weights = scores.gather(-1, chosen)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return torch.zeros_like(scores).scatter(-1, chosen, weights * scale)


def _without(choice, expert):
    choice = choice.clone()
    choice[:, expert] = -torch.inf
    return choice


def _in_groups(choice, strength, count):
    chosen = strength.topk(count, dim=-1).indices
    allowed = torch.zeros_like(strength, dtype=torch.bool).scatter(-1, chosen, True)
    grouped = choice.unflatten(-1, (strength.shape[-1], -1))
    return grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(-2)


class LearnedFactor(torch.nn.Module):
    """A router whose weights carry a factor that it has learned, or one that somebody wrote down."""

    def __init__(self, factor):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8, 16))
        self.factor = factor

    def forward(self, hidden):
        logits = hidden @ self.weight.T
        weights, ids = logits.softmax(-1).topk(3)
        return logits, weights / weights.sum(-1, keepdim=True) * self.factor, ids


def test_a_learned_factor_is_not_taken_for_a_constant():
    known = fingerprint(LearnedFactor(2.5)).weights
    assert (known.scale, known.repick) == (2.5, True)
    learned = fingerprint(LearnedFactor(torch.nn.Parameter(torch.tensor(2.5))))
    assert not learned.weights.repick
    assert learned.notes
