"""Holding a time per output token: a trained model on a clock of its own experts, and a compiled one."""

import copy
import itertools
import statistics

import families
import pytest
import torch
from test_compiled import Graphs
from transformers import CompileConfig

import lynx
from lynx.routing import Phase

TARGET_MS, CONSTANT_MS = 13.0, 2.0  # beside a millisecond for each active expert of a layer


@pytest.fixture(scope="module")
def reference():
    return lynx.load_reference_model()


def generate(model, batch, **options):
    return model.generate(**batch, do_sample=False, **options)


class ExpertsClock:
    """Tells the time that all decode steps so far would have taken."""

    def __init__(self, handle):
        self.layers, self.read = handle._selections, []

    def __call__(self):
        counts = [layer.counters.read()[Phase.DECODE] for layer in self.layers]
        active = sum(each.active_after for each in counts) / len(counts)
        self.read.append(1e-3 * (CONSTANT_MS * counts[0].steps + active))
        return self.read[-1]

    @property
    def taken(self):
        """Milliseconds of each step since the last one that was not timed."""
        return [1e3 * (end - begin) for begin, end in itertools.pairwise(self.read)]


def test_the_time_is_held_while_a_trained_model_generates(reference):
    """Code, then problems, then both; each window begins 20 steps after the change."""
    code = [prompt.prompt for prompt in reference.code[:8]]
    problems = [problem.prompt for problem in reference.problems[:8]]
    windows, positions = [], []
    with lynx.attach(reference.model, "target-active", share=0.35, floor=0.3, tpot_ms=TARGET_MS) as handle:
        clock = handle.tpot._clock = ExpertsClock(handle)
        for texts in (code, problems, code[:4] + problems[:4]):
            clock.read.clear()
            generate(reference.model, reference.encode(texts), max_new_tokens=62, min_new_tokens=62)
            windows.append(clock.taken[20:])
            positions.append(handle.tpot.position)
    for window in windows:
        assert len(window) == 40
        assert statistics.mean(window) == pytest.approx(TARGET_MS, rel=0.05)
    assert all(0.0 < position < 1.0 for position in positions)
    with lynx.attach(reference.model, "exact") as handle:
        clock = ExpertsClock(handle)
        generate(reference.model, reference.encode(code), max_new_tokens=30)
        assert clock() > 1.2e-3 * TARGET_MS * 29  # alone the model takes more


def test_only_decode_steps_are_timed(reference):
    """Not prefill, not what is paused, not teacher forcing, not from one generation to the next, not batches of 1."""
    model, batch = reference.model, reference.encode(["one = ", "two = ", "three = "])
    with lynx.attach(model, "target-active", share=0.5, tpot_ms=1) as handle:
        generate(model, batch, max_new_tokens=6, min_new_tokens=6)
        assert handle.tpot.steps == 4  # 5 steps of decode, from one to the next
        generate(model, batch, max_new_tokens=3, min_new_tokens=3)
        assert handle.tpot.steps == 5
        with handle.paused():
            generate(model, batch, max_new_tokens=6)
        with handle.teacher_forced(0), torch.no_grad():
            model(**batch)
            model(**batch)
        generate(model, reference.encode(["one = "]), max_new_tokens=6, min_new_tokens=6)
        assert handle.tpot.steps == 5
        timed = handle.tpot
    generate(model, batch, max_new_tokens=6)
    assert timed.steps == 5


def test_without_a_time_nothing_is_steered(reference):
    with lynx.attach(reference.model, "target-active", share=0.5) as handle:
        assert handle.tpot is None


def test_detach_leaves_nothing(reference):
    model, batch = reference.model, reference.encode(["one = ", "two = ", "three = "])
    before, keys = generate(model, batch, max_new_tokens=8), set(model.state_dict())
    with lynx.attach(model, "target-active", share=0.3, tpot_ms=1000):
        generate(model, batch, max_new_tokens=8)
    assert torch.equal(generate(model, batch, max_new_tokens=8), before)
    assert set(model.state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_copied_model_steers_itself(reference):
    batch = reference.encode(["one = ", "two = ", "three = "])
    with lynx.attach(reference.model, "target-active", share=0.5, tpot_ms=1e6) as handle:
        other = copy.deepcopy(reference.model)
        generate(other, batch, max_new_tokens=30)
        assert (handle.tpot.steps, handle.tpot.position) == (0, 0.0)
        generate(reference.model, batch, max_new_tokens=30)
        assert handle.tpot.position == 1.0


@pytest.mark.parametrize("told", ["streamer", "took"])
def test_nothing_is_compiled_again_when_targets_move(told):
    """Whole graphs, whose hooks have no clock: `generate` tells the times of its steps, or a loop does."""
    torch.compiler.reset()
    graphs, times = Graphs(), itertools.count()
    model, batch = families.build("mixtral", num_hidden_layers=1), families.prompts()
    settings = CompileConfig(fullgraph=True, mode=None, backend=graphs)
    settings._compile_all_devices = True  # it is for GPUs only, otherwise
    compiled = {"cache_implementation": "static", "compile_config": settings, "max_new_tokens": 14}
    with lynx.attach(model, "target-active", share=0.3, tpot_ms=2000) as handle:
        handle.tpot._clock = lambda: float(next(times))  # a second for each step
        families.generate(model, batch, **compiled)
        needed, state = graphs.count, handle._selections[0].bound.state
        assert (handle.tpot.steps, handle.tpot.position, state[4].item()) == (0, 0.0, 0.0)
        for position in (0.2, 1.0):
            told_by = {"streamer": handle.tpot} if told == "streamer" else {}
            if told == "took":
                for _ in range(12):
                    handle.tpot.took(1.0)
            families.generate(model, batch, **compiled, **told_by)
            handle.tpot.target = 1e6 if position < 1.0 else handle.tpot.target
            assert handle.tpot.position >= position
            assert state[4].item() > 0.0
            assert handle._selections[0].bound.state is state
        assert graphs.count == needed > 0
    torch.compiler.reset()


def test_parallel_models_are_refused(reference):
    """Ranks would measure times of their own, and choose apart."""
    router = reference.model.model.layers[1].mlp.gate
    router._hf_tp_plan = "moe_router"
    try:
        with pytest.raises(lynx.ConfigError, match="tpot_ms cannot hold a time under tensor or expert parallelism"):
            lynx.attach(reference.model, "target-active", share=0.5, tpot_ms=20)
    finally:
        del router._hf_tp_plan


def test_a_setting_without_a_target_is_refused(reference):
    with pytest.raises(lynx.ConfigError, match=r"'importance-threshold' has none: give target-active"):
        lynx.attach(reference.model, "importance-threshold", ratio=0.4, tpot_ms=20)
    with pytest.raises(lynx.AttachError):
        lynx.handle_of(reference.model)
