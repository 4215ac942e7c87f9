"""Stand-ins for lost experts against nested sums in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lynx.kernels import StandInWeights, add_standins, reference_standins


def drawn(T: int, k: int, E: int, H: int, r: int, seed: int, dtype: torch.dtype = torch.float32):
    """Draw a batch in which some slots are lost, and the stand-ins of a layer."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    standins = StandInWeights(
        (normal(E, r, H) / H**0.5).to(dtype), (normal(E, r, H) / max(r, 1) ** 0.5).to(dtype), normal(E, H).to(dtype)
    )
    ids = torch.stack([torch.randperm(E, generator=generator)[:k] for _ in range(T)]) if T else torch.zeros(0, k).long()
    weights = torch.rand(T, k, generator=generator) * (torch.rand(T, k, generator=generator) < 0.4)
    return normal(T, H).to(dtype), normal(T, H).to(dtype), ids, weights, standins


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_they_add_what_nested_sums_add(data):
    E = data.draw(st.integers(1, 12), label="E")
    k, T = data.draw(st.integers(1, E), label="k"), data.draw(st.integers(0, 20), label="T")
    H, r = data.draw(st.integers(1, 40), label="H"), data.draw(st.integers(0, 6), label="r")
    case = drawn(T, k, E, H, r, data.draw(st.integers(0, 2**20), label="seed"))
    torch.testing.assert_close(add_standins(*case).double(), reference_standins(*case), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [2, 16])
def test_half_precision_stays_within_its_rounding(dtype, tokens):
    output, hidden, ids, weights, standins = drawn(tokens, 4, 16, 64, 8, 3, dtype)
    got = add_standins(output, hidden, ids, weights, standins)
    assert got.dtype == dtype
    expected = reference_standins(output, hidden, ids, weights, standins)
    torch.testing.assert_close(got.double(), expected, rtol=3e-2, atol=6e-2)


@pytest.mark.parametrize("tokens", [2, 16])
def test_a_slot_without_weight_adds_nothing_whatever_the_token_holds(tokens):
    output, hidden, ids, weights, standins = drawn(tokens, 2, 8, 16, 4, 5)
    weights[0] = 0.0
    hidden[0] = torch.inf
    got = add_standins(output, hidden, ids, weights, standins)
    assert torch.equal(got[0], output[0])
    assert torch.isfinite(got).all()
