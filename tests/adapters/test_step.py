"""Which rows are tokens and what phase they are in, from what a forward is called with."""

from types import SimpleNamespace

import families
import pytest
import torch
from transformers import StaticCache

import lynx
from lynx.adapters.transformers.step import read_step
from lynx.demo.cache import as_argument
from lynx.routing import Phase, Role

P, E, O = int(Role.PADDING), int(Role.EXACT), int(Role.OPEN)  # noqa: E741
PREFILL, DECODE = int(Phase.PREFILL), int(Phase.DECODE)


def cache(length):
    return SimpleNamespace(get_seq_length=lambda: length)


def ids(*rows):
    return torch.tensor(rows)


def read(step):
    """Roles and phases as lists."""
    assert step.role.dtype == step.phase.dtype == torch.int8
    return step.role.tolist(), step.phase.tolist()


def test_prefill_with_two_dimensional_mask():
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    for past in (None, cache(0)):
        step = read_step({"input_ids": ids([0, 0, 5], [5, 6, 7]), "attention_mask": mask, "past_key_values": past})
        assert read(step) == ([P, P, O, O, O, O], [PREFILL] * 6)
        assert step.all_prefill
        assert step.columns == 0


def test_decode_takes_the_end_of_the_mask():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    step = read_step({"input_ids": ids([5], [6]), "attention_mask": mask, "past_key_values": cache(3)})
    assert read(step) == ([O, P], [DECODE] * 2)
    assert not step.all_prefill


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_any_name_of_the_cache(name):
    """It was renamed in transformers 5.24; a caller may use the old name there, and a wrapper may pass None beside."""
    step = read_step({"input_ids": ids([5], [6]), "cache": None, "past_key_values": None} | {name: cache(3)})
    assert read(step) == ([O, O], [DECODE] * 2)


def test_no_mask_and_a_mask_that_cannot_be_read():
    for mask in (None, "flex", {}, {"full_attention": None}, torch.ones(2, 1), torch.ones(2, 1, 9, 9)):
        step = read_step({"input_ids": ids([5, 6, 7], [5, 6, 7]), "attention_mask": mask})
        assert read(step) == ([O] * 6, [PREFILL] * 6)


def test_embeddings():
    step = read_step({"inputs_embeds": torch.zeros(2, 1, 8), "past_key_values": cache(4)}, stop_ids=(1,))
    assert read(step) == ([O, O], [DECODE, DECODE])
    # what the outermost model was given counts, if it is about the same rows
    tokens = ids([5], [1])
    step = read_step({"inputs_embeds": torch.zeros(2, 1, 8), "past_key_values": cache(4)}, 1, (1,), None, tokens)
    assert read(step) == ([O, P], [DECODE, DECODE])
    step = read_step({"inputs_embeds": torch.zeros(1, 1, 8), "past_key_values": cache(4)}, 1, (1,), None, tokens)
    assert read(step) == ([O], [DECODE])


def test_nothing_to_read():
    assert read_step({}) is None
    assert read_step({"input_ids": None, "attention_mask": torch.ones(1, 1)}) is None
    assert read_step({"input_ids": torch.zeros(3)}) is None


@pytest.mark.parametrize(("q", "allowed", "phase"), [(1, 1, DECODE), (2, 1, PREFILL), (2, 2, DECODE), (3, 2, PREFILL)])
def test_longest_decode_step(q, allowed, phase):
    step = read_step({"input_ids": torch.full((2, q), 5), "past_key_values": cache(4)}, max_decode_q=allowed)
    assert read(step) == ([O] * 2 * q, [phase] * 2 * q)
    assert step.all_prefill == (phase == PREFILL)
    # on an empty cache it is a prompt, however short
    assert read_step(
        {"input_ids": torch.full((2, q), 5), "past_key_values": cache(0)}, max_decode_q=allowed
    ).all_prefill


@pytest.mark.parametrize("length", [torch.tensor(0), torch.tensor([0]), torch.tensor(3), torch.tensor([3])])
def test_length_on_the_device(length):
    """The length is not read: what it says is found in the phase."""
    mask = torch.zeros(2, 1, 1, 8, dtype=torch.bool)
    mask[0, ..., : int(length) + 1] = True
    arguments = {"input_ids": ids([5], [5]), "attention_mask": mask, "past_key_values": cache(length)}
    step = read_step(arguments, stop_ids=(5,))
    phase = DECODE if int(length) else PREFILL
    # a stop token ends a sequence in decode; in a prompt it is a token
    assert read(step) == ([P if phase == DECODE else O, P], [phase] * 2)
    assert not step.all_prefill
    assert read_step({**arguments, "input_ids": torch.full((2, 2), 5)}).all_prefill


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["bool", "additive", "dict"])
def test_four_dimensional_masks(kind):
    """A row is a token if it may see its own position."""
    seen = torch.zeros(2, 1, 3, 6, dtype=torch.bool)
    seen[0, 0] = torch.ones(3, 6).tril().bool()
    seen[1, 0] = torch.ones(3, 6).tril().bool() & (torch.arange(6) >= 2)  # two columns of left padding
    mask = {
        "bool": seen,
        "additive": torch.where(seen, 0.0, torch.finfo(torch.float32).min),
        "dict": {"sliding_attention": torch.zeros(2, 1, 3, 2, dtype=torch.bool), "full_attention": seen, "other": None},
    }[kind]
    tokens = torch.full((2, 3), 5)
    step = read_step({"input_ids": tokens, "attention_mask": mask, "past_key_values": cache(0)})
    assert read(step)[0] == [O, O, O, P, P, O]
    # on a filled cache the rows' own positions come later
    later = torch.zeros(2, 1, 1, 6, dtype=torch.bool)
    later[0, ..., :5] = True
    later[1, ..., :4] = True
    step = read_step({"input_ids": tokens[:, :1], "attention_mask": later, "past_key_values": cache(4)})
    assert read(step) == ([O, P], [DECODE, DECODE])


def test_masks_without_a_batch_or_shorter_than_the_cache():
    shared = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    arguments = {"input_ids": ids([5], [6]), "attention_mask": shared, "past_key_values": cache(3)}
    assert read(read_step(arguments))[0] == [O, O]
    window = {"sliding_attention": torch.ones(2, 1, 1, 4, dtype=torch.bool)}  # shorter than the position 9
    arguments = {"input_ids": ids([5], [6]), "attention_mask": window, "past_key_values": cache(9)}
    assert read(read_step(arguments))[0] == [O, O]


def test_finished_sequences():
    arguments = {"input_ids": ids([1], [9], [0], [2]), "past_key_values": cache(4)}
    assert read(read_step(arguments, stop_ids=(0, 1)))[0] == [P, O, P, O]
    assert read(read_step(arguments))[0] == [O, O, O, O]
    # in a prompt they are tokens: chat templates are full of them
    assert read(read_step({"input_ids": ids([1], [9])}, stop_ids=(0, 1)))[0] == [O, O]


def test_teacher_forcing():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    step = read_step({"input_ids": torch.full((2, 4), 1), "attention_mask": mask}, stop_ids=(1,), prompt_columns=2)
    assert read(step) == ([P, O, O, O, O, O, O, P], [PREFILL, PREFILL, DECODE, DECODE] * 2)
    assert (step.columns, step.all_prefill) == (4, False)
    assert read(read_step({"input_ids": torch.full((1, 2), 5)}, prompt_columns=0))[1] == [DECODE, DECODE]
    assert read(read_step({"input_ids": torch.full((1, 2), 5)}, prompt_columns=9))[1] == [PREFILL, PREFILL]


def test_sequences_laid_end_to_end():
    """Continuous batching: lengths 3, 1, 1 and two rows of padding; the second continues, the others are prompts."""
    packed = {
        "input_ids": torch.full((1, 7), 5),
        "cu_seq_lens_q": torch.tensor([0, 3, 4, 5], dtype=torch.int32),
        "attention_mask": torch.zeros(1, 1, 7, 30),
    }
    lengths = torch.tensor([0, 3, 12, 13], dtype=torch.int32)
    for cached in (lengths, {"full_attention": lengths}):
        step = read_step({**packed, "cu_seq_lens_k": cached}, stop_ids=(5,))
        assert step.role.tolist() == [O] * 5 + [P] * 2
        assert step.phase.tolist()[:5] == [PREFILL] * 3 + [DECODE, PREFILL]
        assert not step.all_prefill
    # a chunk of a prompt on a filled cache
    step = read_step({**packed, "cu_seq_lens_k": torch.tensor([0, 9, 18, 19])})
    assert step.phase.tolist()[:4] == [PREFILL] * 3 + [DECODE]
    step = read_step({**packed, "cu_seq_lens_k": torch.tensor([0, 9, 18, 19])}, max_decode_q=3)
    assert step.phase.tolist()[:5] == [DECODE] * 4 + [PREFILL]
    # padded by sequences of no length
    step = read_step(
        {**packed, "cu_seq_lens_q": torch.tensor([0, 1, 2, 2, 2]), "cu_seq_lens_k": torch.tensor([0, 9, 18, 18, 18])}
    )
    assert (step.role.tolist(), step.phase.tolist()[:2]) == ([O] * 2 + [P] * 5, [DECODE] * 2)
    # a block table is given where all sequences decode
    assert read_step({**packed, "block_table": torch.zeros(1, 3, 4)}).phase.tolist() == [DECODE] * 7
    # packed without a cache, as trainers do
    assert read_step(packed).all_prefill


@pytest.mark.smoke
@pytest.mark.parametrize("family", ["mixtral"])
def test_compiled_with_a_static_cache(model):
    """Hooks trace whole: one graph for all steps, pruning as in eager mode, and none of it after detach.

    The code was compiled before attach, and is not used with the hooks in place.
    """
    batch, tokens = families.prompts(), families.new_tokens(columns=4)
    long = torch.zeros(4, 1, 1, 16, dtype=torch.bool)

    @torch.no_grad()
    def run(step):
        mask = batch["attention_mask"]
        kept = StaticCache(config=model.config, max_cache_len=16)
        model(**batch, **as_argument(kept, model))
        logits = []
        for column in tokens.unbind(1):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            wide = long.clone()
            wide[:, 0, 0, : mask.shape[1]] = mask.bool()
            logits.append(step(column.unsqueeze(1), kept, mask.sum(-1, keepdim=True) - 1, wide))
        return torch.cat(logits, dim=1)

    (name,) = as_argument(None, model)

    def step(ids, kept, positions, mask):
        return model(input_ids=ids, **{name: kept}, position_ids=positions, attention_mask=mask).logits

    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    plain = run(compiled)
    traced = len(graphs)
    with lynx.attach(model, "batch-union", top=1) as handle:
        eager = run(step)
        first = handle.report().total["decode"]
        handle.reset()
        pruned = run(compiled)
        second = handle.report().total["decode"]
    assert len(graphs) <= 2 * traced  # no graph more than the model alone needs
    assert families.same(pruned, eager)
    assert not families.same(pruned, plain)
    assert (second.steps, second.open_rows) == (first.steps, first.open_rows) == (4, 16)
    assert second.active_after == first.active_after < first.active_before
    assert torch.equal(run(compiled), plain)
    torch.compiler.reset()
