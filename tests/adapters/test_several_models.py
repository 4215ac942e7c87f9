"""Models beside each other: each has its own strategy, counters and steps, in threads as well."""

import threading

import families
import pytest
import torch

import lynx

STRATEGIES = [("batch-union", {"top": 1}), ("top-budget", {"budget": 3})]


def _decode(model, seed=1):
    return families.stepwise(model, families.prompts(seed=seed), families.new_tokens(columns=6, seed=seed))


def _counts(handle):
    return [(layer.name, layer.phases["decode"]) for layer in handle.report().layers]


@pytest.mark.parametrize("names", [("mixtral", "mixtral"), ("qwen3_moe", "deepseek_v3")], ids=["alike", "different"])
@pytest.mark.parametrize("experts", ["model", "lynx"])
def test_two_strategies_at_once(names, experts):
    """Steps of the two in turns give what each gives on its own, and detaching one leaves the other."""
    models = [families.build(name) for name in names]
    plain = [_decode(model) for model in models]
    alone, counted = [], []
    for model, (name, options) in zip(models, STRATEGIES, strict=True):
        with lynx.attach(model, name, experts=experts, **options) as handle:
            alone.append(_decode(model))
        counted.append(_counts(handle))
    handles = [
        lynx.attach(model, name, experts=experts, **options)
        for model, (name, options) in zip(models, STRATEGIES, strict=True)
    ]
    for each in (0, 1):
        assert torch.equal(_decode(models[each]).decode, alone[each].decode)
        assert _counts(handles[each]) == counted[each]
    handles[0].detach()
    assert torch.equal(_decode(models[0]).decode, plain[0].decode)
    handles[1].reset()
    assert torch.equal(_decode(models[1]).decode, alone[1].decode)
    assert _counts(handles[1]) == counted[1]
    handles[1].detach()
    assert torch.equal(_decode(models[1]).decode, plain[1].decode)


@pytest.mark.parametrize("experts", ["model", "lynx"])
def test_two_threads(experts):
    """Each thread attaches, generates and detaches, over and over; results are those of one thread."""
    names = ("qwen3_moe", "gpt_oss")
    models = [families.build(name) for name in names]
    rounds, start = 4, threading.Barrier(2)

    def work(each):
        name, options = STRATEGIES[each]
        found = []
        for seed in range(rounds):
            with lynx.attach(models[each], name, experts=experts, **options) as handle:
                found.append((_decode(models[each], seed).decode, _counts(handle)))
            found.append((_decode(models[each], seed).decode, None))
        return found

    alone = [work(each) for each in (0, 1)]
    together = [None, None]

    def run(each):
        start.wait()
        together[each] = work(each)

    threads = [threading.Thread(target=run, args=(each,)) for each in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in (0, 1):
        assert together[each] is not None
        for (logits, counts), (own_logits, own_counts) in zip(together[each], alone[each], strict=True):
            assert torch.equal(logits, own_logits)
            assert counts == own_counts
