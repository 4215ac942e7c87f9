"""Priorities of sequences: whose votes count for more, who stays exact, and what is refused."""

import pytest
import torch

import lynx
from lynx.routing import Phase, Role
from lynx.selection import LayerSelection


@pytest.fixture(scope="module")
def reference():
    return lynx.load_reference_model()


@pytest.fixture
def batch(reference):
    return reference.encode([problem.prompt for problem in reference.problems[:3]])


@pytest.fixture
def seen(monkeypatch):
    """The routings that selections were given in decode."""
    routings, call = [], LayerSelection.__call__

    def spy(self, routing):
        routings.append(routing)
        return call(self, routing)

    monkeypatch.setattr(LayerSelection, "__call__", spy)
    return routings


def generate(reference, batch, **options):
    options = {"max_new_tokens": 4, "do_sample": False} | options
    return reference.model.generate(**batch, **options)


def test_rows_have_the_priority_of_their_sequence(reference, batch, seen):
    with lynx.attach(reference.model, "coverage") as handle:
        with handle.priorities([2.0, 1.0, "exact"]):
            generate(reference, batch)
        assert [routing.role.tolist() for routing in seen] == [[Role.OPEN, Role.OPEN, Role.EXACT]] * len(seen)
        assert all(routing.priority.tolist() == [2.0, 1.0, 0.0] for routing in seen)
        seen.clear()
        generate(reference, batch)
        assert seen
        assert all(routing.priority is None for routing in seen)


def test_a_tensor_will_do(reference, batch, seen):
    with lynx.attach(reference.model, "coverage") as handle, handle.priorities(torch.tensor([0.5, 1.0, 3.0])):
        generate(reference, batch)
    assert seen[0].priority.tolist() == [0.5, 1.0, 3.0]


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_copies_stay_with_their_sequence(reference, batch, seen, options):
    with lynx.attach(reference.model, "coverage") as handle, handle.priorities([2.0, 1.0, "exact"], copies=2):
        generate(reference, batch, **options)
    assert seen[0].priority.tolist() == [2.0, 2.0, 1.0, 1.0, 0.0, 0.0]


def test_columns_of_a_whole_sequence_have_it_too(reference, batch, seen):
    with lynx.attach(reference.model, "coverage") as handle, handle.teacher_forced(0), handle.priorities([3, 1, 2]):
        reference.model(**batch)
    columns = batch["input_ids"].shape[1]
    assert seen[0].priority.shape == seen[0].role.shape == (columns, 3)
    assert seen[0].priority[columns // 2].tolist() == [3.0, 1.0, 2.0]


def test_a_heavy_sequence_keeps_more_of_its_own(reference):
    """Two halves of a batch, one with many votes: it keeps more, and more than when it has few."""
    texts = [problem.prompt for problem in reference.problems[:8]]
    batch = reference.encode(texts)
    kept = {}
    for name, weights in {"first": [8.0] * 4 + [0.125] * 4, "second": [0.125] * 4 + [8.0] * 4}.items():
        lost = []

        class Watched(lynx.SelectionStrategy):
            name: str = "watched"
            budget: int = 6

            def select(self, routing, lost=lost):
                active = lynx.make_strategy("top-budget", budget=self.budget, protect=0).select(routing)
                lost.append((routing.mass * ~active.unsqueeze(-2)).sum(-1))
                return active

        with lynx.attach(reference.model, Watched(protect=0)) as handle, handle.priorities(weights):
            generate(reference, batch, max_new_tokens=6)
        kept[name] = 1 - torch.stack(lost).mean(0)
    assert kept["first"][:4].mean() > kept["second"][:4].mean() + 0.01
    assert kept["first"][4:].mean() < kept["second"][4:].mean() - 0.01


def test_exact_sequences_answer_as_the_model_alone(reference, batch):
    plain = generate(reference, batch, max_new_tokens=12)
    with lynx.attach(reference.model, "batch-union", top=1, min_tokens=1) as handle:
        with handle.priorities(["exact", 1, "exact"]):
            tokens = generate(reference, batch, max_new_tokens=12)
        decode = handle.report().total["decode"]
    assert torch.equal(tokens[[0, 2]], plain[[0, 2]])
    assert decode.exact_rows > 0
    assert decode.open_rows > 0


@pytest.mark.parametrize(("given", "copies"), [([1, 2], 1), ([1, 2, 3, 4], 1), ([1, 2, 3], 2)])
def test_another_number_of_sequences_is_refused(reference, batch, given, copies):
    with lynx.attach(reference.model, "coverage") as handle:
        message = f"given for {len(given)} sequences.*this forward has 3"
        with handle.priorities(given, copies=copies), pytest.raises(lynx.ConfigError, match=message):
            reference.model(**batch)
        reference.model(**batch)
        assert handle.report().total["prefill"].steps == 1


@pytest.mark.parametrize(
    "values", [[], [0], [-1.0], [101], [float("nan")], ["exakt"], [True], "exact", 2.0, [None], torch.tensor(1.0)]
)
def test_what_is_no_priority_is_refused(reference, values):
    with lynx.attach(reference.model, "coverage") as handle, pytest.raises(lynx.ConfigError, match="priorit"):
        handle.priorities(values)


def test_copies_are_a_number(reference):
    with lynx.attach(reference.model, "coverage") as handle, pytest.raises(lynx.ConfigError, match="copies"):
        handle.priorities([1], copies=0)


def test_a_detached_handle_has_none(reference):
    handle = lynx.attach(reference.model, "coverage")
    handle.detach()
    with pytest.raises(lynx.AttachError, match="priorities"):
        handle.priorities([1])


def test_it_ends_with_the_block_also_after_an_exception(reference, batch, seen):
    with lynx.attach(reference.model, "coverage") as handle:
        with pytest.raises(ZeroDivisionError), handle.priorities([1, 2, 3]):
            raise ZeroDivisionError
        with handle.priorities([1, 2, 3]), handle.priorities([3, 2, 1]):
            generate(reference, batch)
        assert seen[0].priority.tolist() == [3.0, 2.0, 1.0]
        seen.clear()
        generate(reference, batch)
    assert seen[0].priority is None
    assert int(seen[0].phase[0]) == Phase.DECODE
