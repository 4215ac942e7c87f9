"""Holding a number of active experts on a trained model, over batches of changing composition."""

import copy

import pytest
import torch

import lynx
from lynx.demo.batches import forced_batches
from lynx.demo.cache import as_argument

COLUMNS = 40


@pytest.fixture(scope="module")
def reference():
    return lynx.load_reference_model()


@pytest.fixture(scope="module")
def traffic(reference):
    """A batch each of code, of problems, and of both; then the first again."""
    kinds = ("code", "problems", "mixed")
    made = [forced_batches(reference, kind, 1, 6, COLUMNS)[0] for kind in kinds]
    return [*made, made[0]]


def forward(model, batch):
    with torch.inference_mode():
        model(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, logits_to_keep=1)


def test_the_target_is_held_from_batch_to_batch(reference, traffic):
    """Every layer by itself, each batch a window; the first brings the thresholds in."""
    with lynx.attach(reference.model, "target-active", share=0.7) as handle:
        shares = []
        for batch in traffic:
            handle.reset()
            with handle.teacher_forced(batch.prompt_columns):
                forward(reference.model, batch)
            reports = [layer.phases["decode"] for layer in handle.report().layers]
            assert all(report.steps == COLUMNS for report in reports)
            assert all(report.kept_mass_worst >= 0.5 for report in reports)
            shares.append([report.active_after / report.active_before for report in reports])
    for window in shares[1:]:
        assert window == pytest.approx([0.7] * 4, rel=0.05)


def test_steps_in_one_pass_are_those_of_a_generation(reference, traffic):
    """Column after column moves the thresholds as one step after the other does."""
    batch = traffic[0]
    states = []
    with lynx.attach(reference.model, "target-active", active=8) as handle, handle.teacher_forced(batch.prompt_columns):
        forward(reference.model, batch)
        states.append([selection.bound.state.clone() for selection in handle._selections])
    with lynx.attach(reference.model, "target-active", active=8) as handle, torch.inference_mode():
        start = batch.prompt_columns
        cache = reference.model(
            input_ids=batch.ids[:, :start],
            attention_mask=batch.mask[:, :start],
            position_ids=batch.positions[:, :start],
        ).past_key_values
        for column in range(start, batch.ids.shape[1]):
            reference.model(
                input_ids=batch.ids[:, column : column + 1],
                attention_mask=batch.mask[:, : column + 1],
                position_ids=batch.positions[:, column : column + 1],
                **as_argument(cache, reference.model),
            )
        states.append([selection.bound.state.clone() for selection in handle._selections])
    for forced, stepped in zip(*states, strict=True):
        assert forced[2] == stepped[2] == COLUMNS
        torch.testing.assert_close(forced, stepped, rtol=0.02, atol=0.02)


def test_a_copied_model_has_thresholds_of_its_own(reference, traffic):
    batch = traffic[0]
    with lynx.attach(reference.model, "target-active", active=8) as handle, handle.teacher_forced(batch.prompt_columns):
        forward(reference.model, batch)
        before = [selection.bound.state.clone() for selection in handle._selections]
        other = copy.deepcopy(reference.model)
        forward(other, batch)
        assert all(torch.equal(s.bound.state, b) for s, b in zip(handle._selections, before, strict=True))
