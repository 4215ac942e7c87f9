"""Moments against the samples they were made of, and fits against what least squares and an SVD give."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lynx.calibration.fit import RIDGE, fit, missed, smallest_rank, unexplained
from lynx.calibration.moments import Moments

E, H = 3, 10


def slots(seed: int, many: int = 400, noise: float = 0.3, rank: int = 2):
    """Inputs far from 0, and outputs of a map of low rank and something else beside."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    maps = normal(E, H, rank) @ normal(E, rank, H)
    ids = torch.randint(E, (many,), generator=generator)
    inputs = normal(many, H) + 5 * normal(H)
    outputs = torch.einsum("nh,nhi->ni", inputs, maps[ids]) + noise * torch.tanh(normal(many, H)) + 3
    return inputs, outputs, ids, torch.rand(many, generator=generator, dtype=torch.float64)


def moments(*parts, origin=None) -> Moments:
    made = Moments.empty(E, torch.zeros(H, dtype=torch.float64) if origin is None else origin)
    made.add(*parts)
    return made


@settings(max_examples=20)
@given(st.integers(0, 2**20), st.integers(0, 60))
def test_moments_are_sums_over_slots_in_any_order_and_any_parts(seed, cut):
    inputs, outputs, ids, weights = slots(seed, 60)
    weights = weights * (weights > 0.3)
    whole = moments(inputs, outputs, ids, weights)
    split = moments(inputs[:cut], outputs[:cut], ids[:cut], weights[:cut])
    split.add(inputs[cut:], outputs[cut:], ids[cut:], weights[cut:])
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(tensor, split.tensors()[name])
    for expert in range(E):
        x, y, w = (part[ids == expert] for part in (inputs, outputs, weights))
        torch.testing.assert_close(whole.input_output[expert], (x * w.unsqueeze(-1)).T @ y)
        torch.testing.assert_close(whole.input_input[expert], (x * w.unsqueeze(-1)).T @ x)
        assert whole.count[expert] == (w > 0).sum()


@pytest.mark.parametrize("rank", [0, 1, 2, 5, H])
def test_a_fit_is_the_best_map_of_its_rank(rank):
    inputs, outputs, ids, weights = slots(1)
    fitted = fit(moments(inputs, outputs, ids, weights), rank)
    assert fitted.known.all()
    for expert in range(E):
        x, y, w = (part[ids == expert] for part in (inputs, outputs, weights))
        w = w / w.sum()
        mean_in, mean_out = w @ x, w @ y
        a, b = (x - mean_in) * w.sqrt().unsqueeze(-1), (y - mean_out) * w.sqrt().unsqueeze(-1)
        ridge = RIDGE * a.square().sum(0).mean()
        solved = torch.linalg.solve(a.T @ a + ridge * torch.eye(H, dtype=a.dtype), a.T @ b)
        _, _, directions = torch.linalg.svd(a @ solved)
        best = solved @ directions[:rank].T @ directions[:rank]
        torch.testing.assert_close(fitted.inner[expert].T @ fitted.outer[expert], best, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(fitted.mean_in[expert], mean_in)
        torch.testing.assert_close(fitted.mean_out[expert], mean_out)


def test_the_origin_of_moments_changes_nothing():
    parts = slots(2)
    plain, moved = fit(moments(*parts), 3), fit(moments(*parts, origin=parts[0].mean(0)), 3)
    torch.testing.assert_close(plain.inner.mT @ plain.outer, moved.inner.mT @ moved.outer, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(plain.mean_in, moved.mean_in)


@pytest.mark.parametrize("origin", [0.0, 4.0])
def test_what_is_missed_is_the_sum_of_squared_residuals(origin):
    fitted = fit(moments(*slots(3)), 4)
    inputs, outputs, ids, weights = slots(3, 150, noise=2.0)
    found = missed(moments(inputs, outputs, ids, weights, origin=torch.full((H,), origin, dtype=torch.float64)), fitted)
    assert found.shape == (5, E)
    for rank in range(5):
        cut = fitted.cut(rank)
        seen = torch.einsum("nh,nrh->nr", inputs - cut.mean_in[ids], cut.inner[ids])
        answer = cut.mean_out[ids] + torch.einsum("nr,nrh->nh", seen, cut.outer[ids])
        squares = weights * (outputs - answer).square().sum(-1)
        expected = torch.stack([squares[ids == expert].sum() for expert in range(E)])
        torch.testing.assert_close(found[rank], expected, rtol=1e-6, atol=1e-6)


def test_more_rank_explains_more_until_there_is_no_more():
    made = moments(*slots(4, noise=0.0))
    shares = unexplained(made, fit(made, 4))
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(shares))
    assert shares[2] < 1e-3 < shares[1]
    assert smallest_rank(shares, [0, 1, 2, 3, 4]) == 2
    assert smallest_rank(shares, [1]) == 1


def test_experts_that_saw_too_few_tokens_get_none():
    inputs, outputs, ids, weights = slots(5)
    ids[ids == 1] = 0
    ids[:3] = 1
    fitted = fit(moments(inputs, outputs, ids, weights), 2)
    assert fitted.known.tolist() == [True, False, True]
    assert not fitted.inner[1].any()
    assert torch.isfinite(fitted.inner).all()
    held = moments(inputs, outputs, ids, weights)
    torch.testing.assert_close(missed(held, fitted)[:, 1], held.output_output[1].expand(3))


def test_many_slots_of_hardly_any_weight_are_few():
    inputs, outputs, ids, weights = slots(6)
    weights[ids == 2] = 1e-9
    weights[(ids == 2).nonzero()[0]] = 1.0
    assert fit(moments(inputs, outputs, ids, weights), 2).known.tolist() == [True, True, False]


def test_inputs_that_are_all_the_same_give_the_mean_output():
    inputs, outputs, ids, weights = slots(7)
    inputs[ids == 0] = inputs[0].clone()
    fitted = fit(moments(inputs, outputs, ids, weights, origin=inputs[0]), 2)
    assert fitted.known.all()
    assert not fitted.inner[0].any()
    w = weights[ids == 0] / weights[ids == 0].sum()
    torch.testing.assert_close(fitted.mean_out[0], w @ outputs[ids == 0])
    few = fit(moments(inputs[:3], outputs[:3], torch.tensor([1, 1, 2]), weights[:3]), 4, least=1)
    assert few.known.tolist() == [False, True, True]
    assert torch.isfinite(few.inner).all()
