"""Steps and the layers in them: what runs, between which marks, on which clock."""

import pickle

import pytest
import torch

from lynx.errors import AttachError, ConfigError
from lynx.measuring import clock as clock_module
from lynx.measuring.batches import align
from lynx.measuring.clock import Mark, StepClock
from lynx.measuring.contenders import Contender, measure
from lynx.measuring.decode import DecodeSteps, random_batch
from lynx.measuring.settings import parse_setting


def test_steps_start_from_the_same_cache_and_go_on_by_a_token(tiny):
    batch = random_batch(64, 3, prompt=5, columns=4, without=(0, 1))
    assert batch.ids.min() > 1
    assert batch.ids.shape == (3, 9)
    steps = DecodeSteps(tiny, batch)
    assert steps.columns_left == 3
    with torch.inference_mode():
        first, again = steps.prepared()().logits, steps.prepared()().logits
        assert torch.equal(first, again)
        walked = [step().logits for step in steps.walk()]
        assert len(walked) == 3
        assert torch.equal(walked[0], first)
        steps.advance()
        assert steps.columns_left == 2
        assert torch.equal(steps.prepared()().logits, walked[1])
        whole = tiny(input_ids=batch.ids[:, :7]).logits[:, -1:]
    torch.testing.assert_close(walked[1], whole)


def test_prompts_of_different_lengths_are_padded(tiny):
    """The step of each sequence is what it would be alone."""
    rows = [([5, 6, 7, 8, 9], [10, 11, 12]), ([13, 14], [15, 16, 17])]
    steps = DecodeSteps(tiny, align([prompt for prompt, _ in rows], [goes_on for _, goes_on in rows], pad_id=0))
    steps.advance()
    with torch.inference_mode():
        together = steps.prepared()().logits[:, -1]
        for row, (prompt, goes_on) in enumerate(rows):
            alone = tiny(input_ids=torch.tensor([[*prompt, *goes_on[:2]]])).logits[0, -1]
            torch.testing.assert_close(together[row], alone)


def test_blocks_are_timed_and_hooks_taken_out(monkeypatch, tiny):
    times = iter(range(100))
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: float(next(times)))
    with StepClock(tiny, ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]) as clock:
        # start, began, two marks for each of two blocks, issued, end
        found = clock.time(lambda: tiny(input_ids=torch.tensor([[2, 3]])))
        assert found.layers == (1.0, 1.0)
        assert found.step == 7.0
        assert found.host is None
        assert clock.time(lambda: tiny(input_ids=torch.tensor([[2]]))).layers == (1.0, 1.0)
    assert clock.contents() == "MixtralSparseMoeBlock (gate, experts)"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.modules())


class Layer(torch.nn.Module):
    """A decoder layer that holds router and experts itself."""

    def __init__(self):
        super().__init__()
        self.self_attn = torch.nn.Linear(8, 8)
        self.router = torch.nn.Linear(8, 4)
        self.experts = torch.nn.Linear(8, 80)

    def forward(self, hidden):
        attended = self.self_attn(hidden)
        return self.router(attended), self.experts(attended)


def test_what_is_timed_where_there_is_no_block(tiny):
    model = torch.nn.Sequential(Layer())
    clock = StepClock(model, ["0.router"])
    assert clock.contents() == "Linear to Linear"
    assert (clock.spans[0].first, clock.spans[0].last) == (model[0].router, model[0].experts)
    with clock:
        assert len(clock.time(lambda: model(torch.ones(2, 8))).layers) == 1
    # where the block itself is what decides
    deciding = tiny
    clock = StepClock(deciding, ["model.layers.0.mlp"])
    assert clock.spans[0].first is clock.spans[0].last is deciding.model.layers[0].mlp


class Event:
    """Stands in for an event of a GPU that is 5 ms behind whatever was issued before it."""

    made = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.made += 1
        self.at = 5.0 * Event.made

    def elapsed_time(self, other):
        return other.at - self.at


def test_a_gpu_is_timed_by_events(monkeypatch, tiny):
    waits = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    clock = StepClock(tiny, ["model.layers.0.mlp.gate"])
    clock._on_gpu, clock._now = True, clock_module.event
    with clock:
        found = clock.time(lambda: tiny(input_ids=torch.tensor([[2, 3]])))
    assert (found.step, found.layers) == (pytest.approx(0.015), (pytest.approx(0.005),))
    assert len(waits) == 2
    assert 0 < found.host <= 1


def test_clocks_that_cannot_be(monkeypatch, tiny):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ConfigError, match="times one thread"):
        StepClock(tiny, [], "thread")
    with StepClock(tiny, []) as clock:
        assert clock.time(lambda: None).own is None
    with pytest.raises(ConfigError, match="'meta'"):
        StepClock(tiny.to("meta"), [])


def test_marks_can_be_pickled():
    assert pickle.loads(pickle.dumps(Mark([1.0], clock_module.event))).marks == [1.0]


def test_routers_that_are_passed_over_are_named(tiny):
    """As with a fused kernel: the block computes, and its router is not called."""
    tiny.model.layers[0].mlp.forward = lambda hidden: hidden
    steps = DecodeSteps(tiny, random_batch(64, 3, prompt=5, columns=2, without=(0, 1)))
    exact = Contender("exact", "exact", parse_setting("exact"))
    clock = StepClock(tiny, ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"])
    with clock, pytest.raises(AttachError, match=r"1 of 2 routers were not called .*layers\.0\.mlp\.gate"):
        measure(exact, tiny, steps, clock)
