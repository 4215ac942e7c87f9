"""Ways to generate: what is selected in each, and what is left as the model routed it."""

from contextlib import contextmanager

import families
import pytest
import torch
from transformers import DynamicCache

import lynx
from lynx.demo.cache import as_argument

PRUNING = {"name": "batch-union", "top": 1}
SOME = ["mixtral", "gpt_oss", "deepseek_v3"]


def _tokens(model, batch, **options):
    settings = {"max_new_tokens": 8, "output_logits": False, "return_dict_in_generate": False, **options}
    return families.generate(model, batch, **settings)


class OwnDecisions:
    """Forward hook of a router, before Lynx's: keeps what the router itself decided."""

    def __init__(self):
        self.calls = []

    def __call__(self, module, args, output):
        k = module.top_k
        places = [place for place in output if place.ndim == 2 and place.shape[-1] == k]
        self.calls.append(next(place for place in places if not place.is_floating_point()).clone())


@contextmanager
def watched(model):
    """Pairs of what the routers decided and what reached the experts, call by call; enter it before attaching."""
    own = OwnDecisions()
    handles = [router.register_forward_hook(own) for router in families.routers(model)]
    with families.counted(model) as counter:
        yield lambda: list(zip(own.calls, counter.calls, strict=True))
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"do_sample": True}, {"num_beams": 2, "do_sample": True}, {"cache_implementation": "static"}],
    ids=["beams", "sampled", "sampled-beams", "static-cache"],
)
def test_fewer_experts_in_decode(model, options):
    """The prompt is as it was, all steps wake fewer experts, and a seed gives the same tokens again."""
    batch, runs = families.prompts(), []

    def run():
        torch.manual_seed(5)
        with families.counted(model) as counter:
            tokens = _tokens(model, batch, suppress_tokens=[families.PAD, families.EOS], **options)
        runs.append(tokens)
        return counter

    plain = run()
    with lynx.attach(model, "exact"):
        run()
    with lynx.attach(model, PRUNING) as handle:
        pruned = run()
        run()
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[2], runs[3])
    layers, rows = handle.layers, 4 * options.get("num_beams", 1)
    assert pruned.active[:layers] == plain.active[:layers]
    assert len(pruned.active) == len(plain.active) == 8 * layers
    assert {len(ids) for ids, _ in pruned.calls[layers:]} == {rows}
    assert sum(pruned.active[layers:]) < sum(plain.active[layers:])
    decode = handle.report().total["decode"]
    assert 2 * sum(pruned.active[layers:]) == pytest.approx(decode.active_after * decode.steps * layers)


def _assistant(family):
    """A model that drafts three tokens at a time, however sure it is."""
    model = families.build(family, num_hidden_layers=2)
    model.generation_config.update(assistant_confidence_threshold=0.0, num_assistant_tokens=3)
    return model


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("way", ["prompt-lookup", "assistant"])
def test_verification_stays_exact_unless_asked(model, family, way):
    """Rows of a step that checks several tokens of a sequence are left alone; `max_decode_q` lets them be selected."""
    options = {"prompt_lookup_num_tokens": 3} if way == "prompt-lookup" else {"assistant_model": _assistant(family)}
    pattern = torch.randint(3, families.VOCABULARY, (1, 3), generator=torch.Generator().manual_seed(4))
    batch = {"input_ids": pattern.repeat(1, 4), "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    options |= {"min_new_tokens": 8, "max_new_tokens": 8}
    plain = _tokens(model, batch, **options)
    with lynx.attach(model, "exact"):
        assert torch.equal(_tokens(model, batch, **options), plain)

    def run(**asked):
        with watched(model) as calls, lynx.attach(model, PRUNING, min_tokens=1, **asked) as handle:
            _tokens(model, batch, **options)
            found = calls()[handle.layers :]
        return [(own, ids, weights) for own, (ids, weights) in found if len(own) > 1], handle.report().total

    left, total = run()
    assert left
    assert all(torch.equal(own, ids) and (weights != 0).all() for own, ids, weights in left)
    assert total["prefill"].rows_changed == 0
    asked, total = run(max_decode_q=4)
    assert asked
    assert not all(torch.equal(own, ids) and (weights != 0).all() for own, ids, weights in asked)
    active = [len(ids[weights != 0].unique()) for _, ids, weights in asked]
    assert sum(active) < sum(len(own.unique()) for own, *_ in asked)
    assert total["decode"].open_rows > total["decode"].steps


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_an_attached_assistant_drafts_under_its_own_strategy(model, family):
    """What it drafts is checked by the model, whose tokens stay those of greedy decoding."""
    assistant = _assistant(family)
    batch = {name: value[3:] for name, value in families.prompts().items()}
    plain = _tokens(model, batch)
    with lynx.attach(assistant, PRUNING, min_tokens=1) as drafts:
        assert torch.equal(_tokens(model, batch, assistant_model=assistant), plain)
        with lynx.attach(model, PRUNING) as handle:  # a batch of one: nothing to share
            assert torch.equal(_tokens(model, batch, assistant_model=assistant), plain)
    assert drafts.report().total["decode"].rows_changed > 0
    assert handle.report().total["prefill"].steps > 0
    assert handle.report().total["decode"].rows_changed == 0


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_chunked_prefill(model, cache):
    """Chunks on a filled cache are prompts as long as they are longer than a decode step."""
    batch = families.prompts(columns=8)
    options = {"prefill_chunk_size": 3, "min_new_tokens": 8}  # 3, 3 and 2 columns
    if cache == "static":
        options["cache_implementation"] = "static"
    with families.counted(model) as counter:
        plain = _tokens(model, batch, **options)
    with lynx.attach(model, "exact"):
        assert torch.equal(_tokens(model, batch, **options), plain)
    with lynx.attach(model, PRUNING) as handle, families.counted(model) as pruned:
        assert torch.equal(_tokens(model, batch, **options)[:, :9], plain[:, :9])  # the first token is the prompt's
    prompt = 3 * handle.layers
    for (ids, weights), (own_ids, own_weights) in zip(pruned.calls[:prompt], counter.calls[:prompt], strict=True):
        assert torch.equal(ids, own_ids)
        assert torch.equal(weights, own_weights)
    assert sum(pruned.active[prompt:]) < sum(counter.active[prompt:])
    total = handle.report().total
    assert (total["prefill"].steps, total["prefill"].exact_rows) == (3, int(batch["attention_mask"].sum()))
    assert total["decode"].steps == 7


@pytest.mark.parametrize("family", ["mixtral"])
def test_a_chunk_as_short_as_a_step_counts_as_one(model):
    """Nothing in the forward tells it from decode: it can be run under `paused`, or the chunks cut otherwise."""
    batch = families.prompts(columns=8)
    with lynx.attach(model, PRUNING) as handle:
        _tokens(model, batch, prefill_chunk_size=7, min_new_tokens=8)
    assert handle.report().total["decode"].steps == 7 + 1
    with lynx.attach(model, PRUNING, max_decode_q=2) as handle:
        _tokens(model, batch, prefill_chunk_size=3, min_new_tokens=8)
    assert handle.report().total["decode"].steps == 7 + 1

    def by_hand(handle=None):
        cached = as_argument(DynamicCache(config=model.config), model)
        with torch.no_grad():
            for start, end in ((0, 3), (3, 7)):
                chunk = batch["input_ids"][:, start:end]
                model(input_ids=chunk, attention_mask=batch["attention_mask"][:, :end], **cached)
            last = {"input_ids": batch["input_ids"][:, 7:], "attention_mask": batch["attention_mask"], **cached}
            if handle is None:
                return model(**last).logits
            with handle.paused():
                return model(**last).logits

    plain = by_hand()
    with lynx.attach(model, PRUNING) as handle:
        assert torch.equal(by_hand(handle), plain)
        assert handle.report().total["decode"].steps == 0
        assert not torch.equal(by_hand(), plain)
        assert handle.report().total["decode"].steps == 1


@pytest.mark.parametrize("family", SOME)
def test_generation_without_a_cache_says_that_it_has_no_decode(model, caplog):
    """Each step is a whole forward, so it is left exact; that is said once, not found out in a report."""
    batch = families.prompts()
    plain = _tokens(model, batch, use_cache=False)
    with lynx.attach(model, PRUNING) as handle:
        with pytest.warns(lynx.LynxWarning, match="without a cache .* use_cache=True") as told:
            found = [_tokens(model, batch, use_cache=False) for _ in range(2)]
        assert all(torch.equal(tokens, plain) for tokens in found)
        assert handle.report().total["decode"].steps == 0
        assert [record.message.split()[0] for record in caplog.records] == ["lynx.cache_not_used"]
    assert len(told) == 1


@pytest.mark.parametrize("family", ["mixtral"])
def test_other_forwards_without_a_cache_are_no_generation(model):
    """Evaluation of sequences, however their lengths grow; and a strategy that acts on prefill has its say anyway."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        with lynx.attach(model, PRUNING) as handle:
            for columns in (4, 5, 6, 6):
                model(torch.randint(3, families.VOCABULARY, (2, columns), generator=generator), use_cache=False)
            ids = torch.randint(3, families.VOCABULARY, (2, 8), generator=generator)
            with handle.teacher_forced(2):
                model(ids[:, :6], use_cache=False)
                model(ids[:, :7], use_cache=False)
            cached = as_argument(DynamicCache(config=model.config), model)
            model(ids[:, :6], **cached)
            model(ids[:, :7], use_cache=False)
        with lynx.attach(model, {"name": "phase-aware", "prefill": PRUNING}):
            _tokens(model, families.prompts(), use_cache=False)
