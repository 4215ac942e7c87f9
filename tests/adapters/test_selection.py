"""A strategy changes decode rows of real, unfinished sequences, and those alone vote."""

import families
import pytest
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig

import lynx
from lynx.demo.cache import as_argument

pytestmark = pytest.mark.smoke

PRUNING = {"name": "batch-union", "top": 1}


def test_only_decode_changes(model):
    batch, tokens = families.prompts(), families.new_tokens()
    with families.counted(model) as plain:
        before = families.stepwise(model, batch, tokens)
    with lynx.attach(model, PRUNING) as handle, families.counted(model) as counter:
        pruned = families.stepwise(model, batch, tokens)
    layers = handle.layers
    assert torch.equal(pruned.prefill, before.prefill)
    for column in range(tokens.shape[1]):
        assert not torch.equal(pruned.decode[:, column], before.decode[:, column])

    # counted at the experts, apart from Lynx: prefill is untouched, every decode call of a layer wakes fewer experts
    assert counter.active[:layers] == plain.active[:layers]
    for (ids, weights), (own_ids, own_weights) in zip(counter.calls[:layers], plain.calls[:layers], strict=True):
        assert torch.equal(ids, own_ids)
        assert torch.equal(weights, own_weights)
    decode = counter.active[layers:]
    assert len(decode) == 3 * layers
    assert sum(decode) < sum(plain.active[layers:])
    # the union of 4 best experts has 4 at most
    assert max(decode) <= 4
    total = handle.report().total["decode"]
    assert total.active_after == pytest.approx(sum(decode) / len(decode))
    assert total.active_after < total.active_before


def test_lost_slots_of_a_row(model, family):
    """Inside a row: no expert twice with weight, at least one, lost slots re-picked from what is active, or empty."""
    batch, tokens = families.prompts(), families.new_tokens(columns=1)
    rule = families.FAMILIES[family]
    for refill in ("re-pick", "none"):
        with lynx.attach(model, PRUNING, refill=refill) as handle, families.counted(model) as counter:
            families.stepwise(model, batch, tokens)
        for ids, weights in counter.calls[handle.layers :]:
            active = ids[weights != 0].unique()
            for row, row_weights in zip(ids, weights, strict=True):
                used = row[row_weights != 0]
                assert len(used) == len(used.unique()) >= 1
                assert set(row.tolist()) == set(used.tolist())  # an empty slot repeats an expert that the row uses
                if refill == "re-pick" and rule.repick and rule.groups[0] == 1:  # groups may forbid what is active
                    assert len(used) == min(ids.shape[1], len(active))


def test_padding_does_not_vote(model):
    """With selection in prefill too, what stands in padding columns changes nothing for other rows."""
    strategy = {"name": "phase-aware", "prefill": PRUNING, "decode": PRUNING}
    batch, tokens = families.prompts(), families.new_tokens()
    real = batch["attention_mask"].bool()
    other = {**batch, "input_ids": torch.where(real, batch["input_ids"], 77)}
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    with lynx.attach(model, strategy) as handle:
        (first, first_calls), (second, second_calls) = (_run(model, case, tokens) for case in (batch, other))
        report = handle.report()
    layers = handle.layers
    _assert_same_ids(first_calls[:layers], second_calls[:layers], real.flatten())
    _assert_same_ids(first_calls[layers:], second_calls[layers:], ...)
    assert families.same(first.prefill[real], second.prefill[real])
    assert families.same(first.decode, second.decode)
    prefill = report.total["prefill"]
    assert prefill.padding_rows == 2 * int((~real).sum())
    assert prefill.open_rows == 2 * int(real.sum())
    assert prefill.rows_changed > 0

    # the test can fail: called tokens, the same columns do change a row that has none of them
    assert real[3].all()
    unmasked = [{**case, "attention_mask": torch.ones_like(batch["attention_mask"])} for case in (batch, other)]
    with lynx.attach(model, strategy):
        (first, _), (second, _) = (_run(model, case, tokens) for case in unmasked)
    assert not families.same(first.decode[3], second.decode[3])


@pytest.mark.parametrize("stop", [families.EOS, families.PAD], ids=["eos", "pad"])
def test_finished_rows_do_not_vote(model, stop):
    """A row that is fed an end of sequence or padding is finished: what is behind it changes nothing for the others."""
    cases = [families.prompts(seed=seed) for seed in (1, 9)]
    cases[1]["input_ids"][:3] = cases[0]["input_ids"][:3]
    assert not torch.equal(cases[0]["input_ids"][3], cases[1]["input_ids"][3])

    def run(last_token):
        tokens = families.new_tokens(columns=4)
        tokens[3] = last_token
        return [_run(model, case, tokens) for case in cases]

    with lynx.attach(model, "top-budget", budget=2) as handle:
        (first, first_calls), (second, second_calls) = run(stop)
        decode = handle.report().total["decode"]
        _assert_same_ids(first_calls[handle.layers :], second_calls[handle.layers :], slice(3))
        assert families.same(first.decode[:3], second.decode[:3])
        assert decode.padding_rows == 2 * 4
        assert decode.open_rows == 2 * 4 * 3
        assert decode.rows_changed > 0
        # the test can fail: fed tokens, the last row does vote
        (first, _), (second, _) = run(50)
        assert not families.same(first.decode[:3], second.decode[:3])


@pytest.mark.parametrize("family", ["qwen3_moe", "minimax"])
@pytest.mark.parametrize("pad", [families.PAD, None], ids=["pad", "no-pad"])
def test_finished_rows_in_generate(family, pad):
    """Rows stop voting with their end of sequence; without a pad id, `generate` feeds them that again."""
    model = families.build(family)
    model.generation_config.pad_token_id = model.config.pad_token_id = pad
    batch = families.prompts()
    ends = [1, 3, 5, 99]  # row r generates its end of sequence as its ends[r]-th token

    def finish(ids, scores):
        for row, end in enumerate(ends):
            scores[row, families.EOS] = torch.inf if ids.shape[1] - 6 == end else -torch.inf
        return scores

    with lynx.attach(model, "exact") as handle:
        tokens = model.generate(**batch, max_new_tokens=8, do_sample=False, logits_processor=[finish])[:, 6:]
    assert [row.index(families.EOS) for row in tokens.tolist()[:3]] == ends[:3]
    assert (tokens[0, 2:] == (families.EOS if pad is None else pad)).all()
    decode = handle.report().total["decode"]
    # the token generated at place n is fed in decode step n; row r is a token in steps 0 to ends[r] - 1
    assert decode.tokens == sum(min(end, 7) for end in ends)
    assert decode.padding_rows == 7 * 4 - decode.tokens


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_special_tokens_set_after_attach(family):
    model = families.build(family)
    with lynx.attach(model, "exact") as handle:
        model.generation_config.eos_token_id = [7, families.EOS]
        tokens = families.new_tokens()
        tokens[0] = 7
        families.stepwise(model, families.prompts(), tokens)
    assert handle.report().total["decode"].padding_rows == tokens.shape[1]


class TakesEmbeddings(PreTrainedModel):
    """A model around a text model, which is given embeddings only, as in multimodal models."""

    config_class = PreTrainedConfig

    def __init__(self, text):
        super().__init__(PreTrainedConfig(eos_token_id=families.EOS))
        self.text = text

    def forward(self, input_ids, past_key_values=None):
        return self.text(inputs_embeds=self.text.embed_tokens(input_ids), **as_argument(past_key_values, self.text))


def test_finished_rows_where_the_backbone_sees_embeddings():
    model = TakesEmbeddings(families.build("mixtral").model).eval()
    with lynx.attach(model, "exact") as handle, torch.no_grad():
        cache = DynamicCache(config=model.text.config)
        model(torch.full((3, 4), 5), cache)
        model(torch.tensor([[5], [families.EOS], [6]]), cache)
        decode = handle.report().total["decode"]
        assert (decode.open_rows, decode.padding_rows) == (2, 1)
        # called without the outer model, nothing is left over from before
        model.text(inputs_embeds=torch.ones(3, 1, 32), **as_argument(cache, model.text))
    assert handle.report().total["decode"].padding_rows == 1


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_static_cache_prunes_alike(model):
    batch = families.prompts()
    settings = {"output_logits": False, "return_dict_in_generate": False}
    with lynx.attach(model, PRUNING) as handle:
        dynamic = families.generate(model, batch, **settings)
        first = handle.report().total["decode"]
        handle.reset()
        static = families.generate(model, batch, cache_implementation="static", **settings)
        second = handle.report().total["decode"]
    assert torch.equal(dynamic, static)
    assert second.kept_mass_mean == pytest.approx(first.kept_mass_mean)
    counts = ("steps", "open_rows", "rows_changed", "active_before", "active_after")
    assert [getattr(second, name) for name in counts] == [getattr(first, name) for name in counts]
    assert second.active_after < second.active_before


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_few_rows_and_long_steps_stay_exact(model):
    one = families.prompts(rows=1)
    tokens = families.new_tokens()
    with lynx.attach(model, PRUNING) as handle:
        before = families.stepwise(model, one, tokens[:1])
        assert handle.report().total["decode"].exact_steps == 3
    with lynx.attach(model, PRUNING, min_tokens=1) as handle:
        assert not torch.equal(families.stepwise(model, one, tokens[:1]).decode, before.decode)

    def verify(**options):
        """Feed three tokens at once on a filled cache, as speculative decoding does."""
        batch = families.prompts()
        with lynx.attach(model, PRUNING, **options) as handle, torch.no_grad():
            cached = as_argument(DynamicCache(config=model.config), model)
            model(**batch, **cached)
            mask = torch.cat([batch["attention_mask"], torch.ones(4, 3, dtype=torch.long)], dim=1)
            model(input_ids=tokens, attention_mask=mask, **cached)
        return handle.report().total["decode"]

    assert verify().steps == 0
    verified = verify(max_decode_q=3)
    assert (verified.steps, verified.open_rows) == (1, 12)
    assert verified.rows_changed > 0


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_continuous_batching(family):
    """Requests come and go: some rows of a batch are prompts, others decode, and each has its own phase."""
    model = families.build(family)
    lengths, new = (5, 1, 9, 3), 6  # the third prompt comes in two parts
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, families.VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=families.PAD)
    size = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=12, allow_block_sharing=False)

    def run():
        with families.counted(model) as counter:
            outputs = model.generate_batch(prompts, settings, size)
        return [outputs[name].generated_tokens for name in sorted(outputs)], counter.active

    before, active = run()
    assert [len(tokens) for tokens in before] == [new] * len(lengths)
    with lynx.attach(model, "exact") as handle:
        assert run() == (before, active)
        exact = handle.report().total
    assert exact["prefill"].exact_rows == sum(lengths)
    assert exact["decode"].tokens == len(lengths) * (new - 1)
    assert exact["decode"].steps + exact["prefill"].steps > new + 1  # some batches were counted in both phases
    with lynx.attach(model, PRUNING) as handle:
        pruned, fewer = run()
        total = handle.report().total
    assert [tokens[0] for tokens in pruned] == [tokens[0] for tokens in before]  # prefill is exact
    assert total["prefill"].exact_rows == sum(lengths)
    assert total["prefill"].rows_changed == 0
    assert total["decode"].rows_changed > 0
    assert total["decode"].open_active_after < total["decode"].open_active_before
    assert len(fewer) == len(active)
    assert sum(fewer) < sum(active)
    assert run() == (before, active)


def _run(model, batch, tokens):
    with families.counted(model) as counter:
        return families.stepwise(model, batch, tokens), counter.calls


def _assert_same_ids(first, second, rows):
    assert len(first) > 0
    for (ids, _), (other_ids, _) in zip(first, second, strict=True):
        assert torch.equal(ids[rows], other_ids[rows])
