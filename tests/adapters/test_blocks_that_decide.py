"""Routers that give logits alone (DBRX), experts without weights (LongCat, Zaya), factors of experts (Gemma 4)."""

import copy
import io
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
import zoo
import zoo_checks
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import lynx
import lynx.attachment
from lynx.adapters.transformers.fingerprint import fingerprint
from lynx.adapters.transformers.step import Step
from lynx.cli.inspect import inspect_model
from lynx.routing import Phase, Role

PRUNING = {"name": "batch-union", "top": 1}


def _decided(model, strategy=PRUNING, **options):
    """What experts modules are given in decode, in running order: ids and weights."""
    calls = []

    def keep(module, args, kwargs):
        _, ids, weights = [*args, *kwargs.values()]
        calls.append((ids.clone(), weights.clone()))

    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    with lynx.attach(model, strategy, **options) as handle:
        handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in experts]
        logits = zoo_checks.generated(model)
        for each in handles:
            each.remove()
    return calls[len(experts) :], logits, handle.report().total["decode"]


def _traces(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [(name, sorted(vars(m)), [list(getattr(m, kind)) for kind in kinds]) for name, m in model.named_modules()]


@pytest.fixture(scope="module")
def dbrx():
    return zoo.build("dbrx")


def test_a_block_is_asked(dbrx):
    """The block's rule, read in its source: a softmax, divided by the sum of the chosen."""
    found = [layer.fingerprint for layer in lynx.attachment.discover(dbrx).layers]
    assert len(found) == 4
    for each in found:
        assert each.output.by_block
        assert (each.weights.score, each.weights.renormalise, each.weights.scale) == ("softmax", True, 1.0)
        assert (each.num_experts, each.top_k, each.notes) == (8, 3, ())
    plain = zoo.build("dbrx")
    block = plain.transformer.blocks[0].ffn
    block.moe_normalize_expert_weights = None
    other = fingerprint(block.router, block, block.experts)
    assert (other.weights.score, other.weights.renormalise) == ("softmax", False)


def test_weights_follow_the_blocks_rule(dbrx):
    before = zoo_checks.generated(dbrx)
    traces = _traces(dbrx)
    logits = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: logits.append(output))
        for name, module in dbrx.named_modules()
        if name.endswith(".router")
    ]
    calls, pruned, total = _decided(dbrx)
    for each in hooks:
        each.remove()
    logits = logits[len(hooks) :]
    assert len(calls) == len(logits) == 4 * zoo_checks.STEPS
    for (ids, weights), given in zip(calls, logits, strict=True):
        assert len(ids.unique()) <= zoo_checks.ROWS
        chosen = given.softmax(-1).gather(-1, ids).masked_fill(weights == 0, 0.0)
        torch.testing.assert_close(weights, chosen / chosen.sum(-1, keepdim=True))
    assert total.active_after < total.active_before
    assert torch.equal(pruned[0], before[0])
    assert _traces(dbrx) == traces
    assert all(torch.equal(*pair) for pair in zip(zoo_checks.generated(dbrx), before, strict=True))


def test_copies_of_a_model_whose_blocks_decide(dbrx):
    with lynx.attach(dbrx, PRUNING):
        pruned = zoo_checks.generated(dbrx)
        for twin in (copy.deepcopy(dbrx), pickle.load(io.BytesIO(pickle.dumps(dbrx)))):
            assert all(torch.equal(*pair) for pair in zip(zoo_checks.generated(twin), pruned, strict=True))


def test_a_model_whose_blocks_decide_is_attached_once(dbrx):
    with lynx.attach(dbrx.transformer, "exact"):
        with pytest.raises(lynx.AttachError, match="attached through another module"):
            lynx.attach(dbrx, "exact")
        with lynx.attach(dbrx.transformer, PRUNING) as second:
            assert second.attached
    lynx.attach(dbrx, "exact").detach()


@pytest.mark.parametrize("past", ["router", "both"])
def test_a_kernel_past_the_router(dbrx, past):
    """Its experts may be given ids, but nothing is known of the logits behind them."""
    block = dbrx.transformer.blocks[0].ffn

    def fused(hidden):
        weights, ids = block.route_tokens_to_experts(type(block.router).forward(block.router, hidden))
        return block.experts(hidden, ids, weights) if past == "router" else block.experts.forward(hidden, ids, weights)

    block.forward = fused
    try:
        with lynx.attach(dbrx, PRUNING), pytest.raises(lynx.AttachError, match=r"1 of 4 routers .*blocks\.0\.ffn"):
            zoo_checks.generated(dbrx)
    finally:
        del block.forward


class StaticExperts(nn.Module):
    """Experts that a compiler can follow."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 16, 16))

    def forward(self, hidden, weights, ids):
        return (torch.einsum("th,tkhi->tki", hidden, self.weight[ids]) * weights.unsqueeze(-1)).sum(1)


class DecidingBlock(nn.Module):
    """A block that chooses with a bias of its own."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(16, 6, bias=False)
        self.experts = StaticExperts()
        self.expert_bias = nn.Parameter(torch.randn(6) * 0.3)

    def forward(self, hidden):
        scores = self.router(hidden).view(-1, 6).sigmoid()
        ids = (scores + self.expert_bias).topk(3, dim=-1).indices
        weights = scores.gather(-1, ids)
        weights = weights / weights.sum(-1, keepdim=True) * 2.5
        return self.experts(hidden.view(-1, 16), weights=weights, ids=ids).view_as(hidden)


class DecidingModel(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self):
        super().__init__(PreTrainedConfig())
        self.embed = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList([DecidingBlock(), DecidingBlock()])

    def forward(self, input_ids, past_key_values=None):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return hidden


def _assert_chosen_with_bias(block, hidden):
    """Every row gets its best among those that are the best of some row, by score plus bias."""
    given = []
    hook = block.experts.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    role, phase = (torch.full((6,), int(value), dtype=torch.int8) for value in (Role.OPEN, Phase.DECODE))
    context = next(iter(block.router._forward_hooks.values())).hook.context
    context.step = Step(role, phase, 0, False)
    block(hidden)
    context.step = None
    hook.remove()
    ((ids, weights),) = ((each["ids"], each["weights"]) for each in given)
    scores = block.router(hidden).view(-1, 6).sigmoid()
    choice = scores + block.expert_bias
    assert (choice.argmax(-1) != scores.argmax(-1)).any()
    active = torch.zeros(6, dtype=torch.bool).index_fill(0, choice.argmax(-1), True)
    best = choice.masked_fill(~active, -torch.inf).topk(min(3, int(active.sum())), dim=-1).indices
    for row, kept, chosen in zip(ids, weights != 0, best, strict=True):
        assert set(row[kept].tolist()) == set(chosen.tolist())


def test_compiled_whole():
    """What one hook keeps, others use: in one graph, with a bias of the block's and arguments by name."""
    torch.manual_seed(0)
    model = DecidingModel().eval()
    (first, _) = (layer.fingerprint for layer in lynx.attachment.discover(model).layers)
    assert (first.weights.score, first.weights.renormalise, first.weights.scale) == ("sigmoid", True, 2.5)
    assert (first.choice.score, first.choice.bias) == ("sigmoid", "expert_bias")
    filled = SimpleNamespace(get_seq_length=lambda: 5)
    ids = torch.arange(6).unsqueeze(1)
    with torch.no_grad():
        before = model(ids, filled)
        with lynx.attach(model, "exact"):
            assert torch.equal(model(ids, filled), before)
        with lynx.attach(model, PRUNING):
            expected = model(ids, filled)
            _assert_chosen_with_bias(model.blocks[0], model.embed(ids))
        with lynx.attach(model, PRUNING) as handle:
            found = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, filled)
    assert not torch.equal(expected, before)
    torch.testing.assert_close(found, expected)
    decode = handle.report().total["decode"]
    assert decode.active_after < decode.active_before
    torch.compiler.reset()


@pytest.mark.parametrize("family", ["longcat_flash", "zaya"])
def test_slots_of_experts_without_weights_stay(family):
    """They cost nothing and mean something (the token as it is, or nothing), so they are nobody's to move."""
    model = zoo.build(family)
    if any("logits (T, E)" in layer.refused for layer in lynx.attachment.discover(model).layers):
        pytest.skip("in this transformers its router gives no logits")
    seen = []

    def compare(router, args, kwargs, output):
        """Keep what the router says itself, and what it says under Lynx."""
        own = type(router).forward(router, *args, **kwargs)
        seen.append((own[1], own[2], output[1], output[2]))

    routers = [layer.router for layer in lynx.attachment.discover(model).layers]
    with lynx.attach(model, PRUNING if family == "longcat_flash" else zoo_checks.ONE_EACH) as handle:
        hooks = [router.register_forward_hook(compare, with_kwargs=True) for router in routers]
        zoo_checks.generated(model)
        for hook in hooks:
            hook.remove()
    zero, moved = 0, 0
    for weights, ids, new_weights, new_ids in seen[len(routers) :]:
        none = (weights == 0) | (ids >= 8)
        assert torch.equal(new_ids[none], ids[none])
        assert torch.equal(new_weights[none], weights[none])
        assert (new_ids[~none] < 8).all()
        zero += int(none.sum())
        moved += int((new_ids != ids).sum())
    assert zero > 0
    assert moved > 0
    total = handle.report().total["decode"]
    assert total.active_after < total.active_before < 8  # they are not counted


class SkippingRouter(nn.Module):
    """Its last expert is none: a slot there is given out as expert 0 at weight 0, so that ids alone do not tell."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 16))

    def forward(self, hidden):
        logits = hidden @ self.weight.T
        weights, ids = logits.softmax(-1).topk(2, dim=-1)
        return logits, weights.masked_fill(ids == 5, 0.0), ids.masked_fill(ids == 5, 0)


def test_rules_are_found_beside_an_expert_that_is_none():
    found = fingerprint(SkippingRouter(), real=5)
    assert (found.weights.score, found.weights.renormalise, found.weights.repick) == ("softmax", False, True)
    assert (found.num_experts, found.zero_experts) == (6, 1)
    assert not fingerprint(SkippingRouter()).weights.repick


def test_experts_of_other_processes_are_not_taken_for_none():
    """Expert parallelism leaves a module fewer experts than its router knows."""
    model = zoo.build("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj[:4].detach())
    assert lynx.attachment.discover(model).layers[0].fingerprint.zero_experts == 4
    experts._is_expert_parallel = True
    assert lynx.attachment.discover(model).layers[0].fingerprint.zero_experts == 0


def test_a_factor_for_each_expert():
    """Gemma 4 gives out probabilities as logits, and multiplies each weight by a factor that its expert has learned."""
    model = zoo.build("gemma4")
    layer = lynx.attachment.discover(model).layers[0]
    found = layer.fingerprint
    assert (found.expert_scale, found.output.probabilities) == ("per_expert_scale", True)
    assert (found.weights.score, found.weights.renormalise, found.weights.repick) == ("softmax", True, True)
    probabilities = []
    routers = [module for name, module in model.named_modules() if name.endswith(".router")]
    hooks = [router.register_forward_hook(lambda m, a, out: probabilities.append((m, out[0]))) for router in routers]
    calls, _, total = _decided(model)
    for each in hooks:
        each.remove()
    changed = 0
    for (ids, weights), (router, given) in zip(calls, probabilities[len(routers) :], strict=True):
        chosen = given.gather(-1, ids).masked_fill(weights == 0, 0.0)
        expected = chosen / chosen.sum(-1, keepdim=True) * router.per_expert_scale[ids]
        torch.testing.assert_close(weights, expected)
        changed += int((ids.sort(-1).values != given.topk(3, dim=-1).indices.sort(-1).values).any(-1).sum())
    assert changed > 0
    assert total.active_after < total.active_before


def test_layers_that_choose_by_token_id_are_left_exact(tmp_path, capsys):
    model = zoo.build("deepseek_v4")
    found = lynx.attachment.discover(model)
    assert [layer.info.name for layer in found.layers] == [f"model.layers.{n}.mlp.gate" for n in (1, 2, 3)]
    note = "left exact: layers whose DeepseekV4HashRouter chooses by token id (1)"
    assert found.notes == (note,)
    model.config.save_pretrained(tmp_path)
    inspect_model(str(tmp_path), as_json=False)
    assert note in capsys.readouterr().out
    inspect_model(str(tmp_path), as_json=True)
    assert json.loads(capsys.readouterr().out)["notes"] == [note]
    own, _, _ = _decided(model, "exact")
    pruned, _, _ = _decided(model)
    for step in range(zoo_checks.STEPS):
        first, second = own[4 * step][0], pruned[4 * step][0]
        assert torch.equal(first, second)
        assert not torch.equal(own[4 * step + 1][0], pruned[4 * step + 1][0])
