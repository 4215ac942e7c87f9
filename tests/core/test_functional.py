"""`lynx.select`: ids and weights for one's own forward, as the core decides them, whole under `torch.compile`."""

import threading

import pytest
import torch
from support import assert_same
from torch._dynamo.testing import CompileCounter

import lynx
from lynx import rows
from lynx.routing import Phase, Role, Routing, WeightRule
from lynx.rows import Step, current_step, read_rows
from lynx.selection import LayerSelection
from lynx.strategy import LayerInfo

E, K = 8, 3
RULES = [
    WeightRule(),
    WeightRule("softmax", renormalise=False),
    WeightRule("sigmoid", scale=2.5),
    WeightRule("sqrt_softplus"),
    WeightRule("softmax_over_chosen"),
]


def selection(strategy="batch-union", rule=None, **options):
    options = {"top": 1} if strategy == "batch-union" and not options else options
    return lynx.Selection(strategy, num_experts=E, top_k=K, rule=rule, **options)


def logits(*shape, seed=0):
    return torch.randn(*shape, E, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.score}-{rule.scale}-{rule.renormalise}")
def test_exact_is_the_routers_own_decision(rule):
    given = logits(6, 1)
    ids, weights = lynx.select(given, selection("exact", rule))
    scores = {
        "sigmoid": torch.sigmoid(given),
        "sqrt_softplus": torch.nn.functional.softplus(given).sqrt(),
    }.get(rule.score, given.softmax(-1))
    top, own = scores.topk(K, dim=-1)
    if rule.renormalise:
        top = top / top.sum(-1, keepdim=True)
    assert torch.equal(ids, own)
    torch.testing.assert_close(weights, top * rule.scale)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.score}-{rule.scale}-{rule.renormalise}")
def test_it_decides_as_the_core_does(rule):
    given = logits(6, 1)
    ids, weights = lynx.select(given, selection(rule=rule))
    flat = given.reshape(6, E)
    own_ids, own_weights = lynx.select(given, selection("exact", rule))
    routing = Routing.of(flat, own_ids.reshape(6, K), own_weights.reshape(6, K), rule)
    layer = LayerSelection(LayerInfo("layer", 0, E, K, rule), lynx.make_strategy("batch-union", top=1))
    expected = layer(routing)
    assert_same(ids.reshape(6, K), expected.ids)
    assert_same(weights.reshape(6, K), expected.weights)
    assert ids.unique().numel() < own_ids.unique().numel()


def test_bias_moves_the_choice_and_not_the_weights():
    given, bias = logits(6, 1), torch.zeros(E)
    bias[5] = 10.0
    rule = WeightRule("sigmoid", renormalise=False)
    ids, weights = lynx.select(given, selection("exact", rule), bias=bias)
    assert bool((ids[..., 0] == 5).all())
    torch.testing.assert_close(weights, torch.sigmoid(given).gather(-1, ids))


def test_a_choice_of_ones_own_may_forbid():
    given = logits(6, 1)
    choice = given.clone()
    choice[..., :4] = -torch.inf
    for strategy in ("exact", "batch-union"):
        ids, _ = lynx.select(given, selection(strategy), choice=choice)
        assert int(ids.min()) >= 4


def test_phase_comes_from_the_argument_then_the_step_then_the_shape():
    chosen = selection("static-top", top=1)
    exact = lynx.select(logits(6, 4), selection("exact"))
    flat = logits(24)
    assert torch.equal(lynx.select(logits(6, 4), chosen)[0], exact[0])  # prefill by its shape
    assert not torch.equal(lynx.select(logits(6, 4), chosen, phase="decode")[0], exact[0])
    with lynx.step("decode"):
        pruned = lynx.select(flat, chosen)[0]
        assert torch.equal(lynx.select(flat, chosen, phase="prefill")[0].reshape(6, 4, K), exact[0])
    assert torch.equal(lynx.select(flat, chosen, phase="decode")[0], pruned)
    with pytest.raises(lynx.ConfigError, match=r"nothing tells whether logits \(24, 8\) are prefill or decode"):
        lynx.select(flat, chosen)


def test_rows_that_are_not_tokens_or_must_not_change():
    given = logits(6, 1)
    own = lynx.select(given, selection("exact"))[0]
    valid = torch.tensor([True, True, True, False, False, False])
    ids, _ = lynx.select(given, selection(), valid=valid, exact=valid.flip(0))
    assert torch.equal(ids[3:], own[3:])
    alone, _ = lynx.select(given[:3], selection())
    assert torch.equal(lynx.select(given, selection(), valid=valid)[0][:3], alone)


def test_compiled_whole_without_recompiling():
    chosen, counter = selection().to("cpu"), CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def layer(given, bias):
        ids, weights = lynx.select(given, chosen, bias=bias)
        return ids, weights

    for seed in range(3):
        found = layer(logits(6, 1, seed=seed), torch.zeros(E))
        expected = lynx.select(logits(6, 1, seed=seed), chosen, bias=torch.zeros(E))
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])
    assert counter.frame_count == 1
    with lynx.step("prefill"):
        found = layer(logits(6, 1), torch.zeros(E))
    assert torch.equal(found[0], lynx.select(logits(6, 1), selection("exact"))[0])
    assert counter.frame_count == 2
    for seed in range(3):
        with lynx.step("decode", valid=torch.arange(6) != seed):
            found = layer(logits(6, 1, seed=seed), torch.zeros(E))
            assert torch.equal(found[0], lynx.select(logits(6, 1, seed=seed), chosen)[0])
    assert counter.frame_count == 3
    assert torch.equal(layer(logits(6, 1), torch.zeros(E))[0], lynx.select(logits(6, 1), chosen)[0])


def test_a_short_type_stays_short():
    _, weights = lynx.select(logits(6, 1).bfloat16(), selection().to("cpu"))
    assert weights.dtype == torch.bfloat16


def test_it_reports():
    chosen = selection()
    lynx.select(logits(6, 1), chosen)
    lynx.select(logits(2, 3), chosen)
    report = chosen.report()
    assert report.strategy["name"] == "batch-union"
    assert (report.total["decode"].open_rows, report.total["prefill"].exact_rows) == (6, 6)
    chosen.reset()
    assert chosen.report().total["decode"].steps == 0


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda: selection("batch-union", top=9), "top=9"),
        (lambda: selection("batch-onion"), "Did you mean 'batch-union'"),
        (lambda: lynx.Selection("exact", num_experts=4, top_k=5), "top_k is between 1 and num_experts=4; got 5"),
        (lambda: lynx.select(torch.zeros(3, 1, 5), selection()), "of 5 experts, the selection of 8"),
        (lambda: lynx.select(logits(6, 1), selection(), valid=torch.ones(5)), "`valid` has 5 values, but the layer"),
        (lambda: lynx.step("decoding").__enter__(), "phase is 'prefill', 'decode', a tensor"),
    ],
)
def test_what_is_wrong_is_said(wrong, reason):
    with pytest.raises(lynx.ConfigError) as told:
        wrong()
    assert reason in str(told.value)


def test_steps_nest_and_end():
    assert current_step() is None
    with lynx.step("decode"):
        with lynx.step("prefill"):
            assert current_step().phase == "prefill"
        with pytest.raises(ValueError, match="on purpose"), lynx.step("prefill"):
            raise ValueError("on purpose")
        assert current_step().phase == "decode"
    assert current_step() is None


def test_compiled_code_sees_no_step_where_threads_differ():
    """It reads one place for the whole process, as Dynamo guards no other; so it must not read another thread's."""
    entered, leave = threading.Event(), threading.Event()

    def hold(phase):
        with lynx.step(phase):
            entered.set()
            leave.wait(10)

    for phase, seen in (("prefill", None), ("decode", "decode")):
        thread = threading.Thread(target=hold, args=(phase,))
        thread.start()
        entered.wait(10)
        with lynx.step("decode"):
            assert getattr(rows._compiled.step, "phase", None) == seen
            assert current_step().phase == "decode"
        leave.set()
        thread.join()
        entered.clear()
        leave.clear()
        assert rows._compiled.step is None


def test_rows_of_sequences_and_of_tokens():
    said = Step(torch.tensor([0, 1]), valid=torch.tensor([[True, True, False], [True, True, True]]))
    found = read_rows((2, 3), torch.device("cpu"), 1, said)
    assert found.phase.tolist() == [Phase.PREFILL] * 3 + [Phase.DECODE] * 3
    assert found.role.tolist() == [Role.OPEN, Role.OPEN, Role.PADDING, Role.OPEN, Role.OPEN, Role.OPEN]
    assert not found.all_prefill
    assert read_rows((6,), torch.device("cpu")) is None
    assert read_rows((2, 3), torch.device("cpu")).all_prefill
    assert not read_rows((2, 3), torch.device("cpu"), 3).all_prefill
