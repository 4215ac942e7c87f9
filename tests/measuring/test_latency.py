"""Lines through times: the arithmetic of the latency model."""

import math

import pytest
import torch

from lynx.errors import ConfigError
from lynx.measuring.intervals import Estimate
from lynx.measuring.latency import BatchLatency, LatencyModel, LayerLatency, fit
from lynx.measuring.spread import Spread, ratios, spread


def line(constant, slope, r_squared=0.99, low=None):
    return LayerLatency(
        layer="gate",
        constant=Estimate(constant, constant, constant),
        per_expert=Estimate(slope, slope / 2 if low is None else low, 2 * slope),
        r_squared=r_squared,
        fewest=4,
        most=20,
    )


def measured(rounds=9, noise=0.0, seed=0):
    """Two layers of known lines at five points."""
    generator = torch.Generator().manual_seed(seed)
    active = torch.tensor([4.0, 8.0, 12.0, 16.0, 20.0])[None, :, None].expand(rounds, 5, 2)
    times = torch.tensor([1e-3, 5e-4]) + torch.tensor([1e-4, 2e-5]) * active
    return active, times + noise * torch.rand(times.shape, generator=generator)


def test_a_line_is_found():
    first, second = fit(["a", "b"], *measured())
    assert (first.layer, second.layer) == ("a", "b")
    assert first.constant.value == pytest.approx(1e-3, rel=1e-5)
    assert first.per_expert.value == pytest.approx(1e-4, rel=1e-5)
    assert second.constant.value == pytest.approx(5e-4, rel=1e-5)
    assert second.per_expert.value == pytest.approx(2e-5, rel=1e-5)
    assert first.r_squared == pytest.approx(1.0)
    assert (first.fewest, first.most) == (4.0, 20.0)
    assert first.good
    assert first.predict(10) == pytest.approx(2e-3)


def test_r_squared_is_that_of_the_definition():
    active, times = measured(rounds=1, noise=1e-3)
    layer, _ = fit(["a", "b"], active, times)
    y, x = times[0, :, 0].double(), active[0, :, 0].double()
    predicted = layer.constant.value + layer.per_expert.value * x
    assert layer.r_squared == pytest.approx(
        1 - float((y - predicted).square().sum() / (y - y.mean()).square().sum()), rel=1e-6
    )
    assert layer.r_squared < 0.99
    # no line is nearer
    for change in (1e-6, -1e-6):
        assert (y - predicted - change * x).square().sum() > (y - predicted).square().sum()
        assert (y - predicted - change).square().sum() > (y - predicted).square().sum()


def test_intervals_hold_the_truth_and_narrow_with_rounds():
    """Noise adds up to a millisecond: its lower quartile, a quarter of one, is part of the constant."""
    few = fit(["a", "b"], *measured(rounds=8, noise=1e-3))[0]
    many = fit(["a", "b"], *measured(rounds=128, noise=1e-3))[0]
    assert many.per_expert.low <= 1e-4 <= many.per_expert.high
    assert many.constant.low <= 1.25e-3 <= many.constant.high
    assert many.per_expert.high - many.per_expert.low < few.per_expert.high - few.per_expert.low
    assert few.per_expert.low <= few.per_expert.value <= few.per_expert.high


def test_one_round_that_was_disturbed_changes_little():
    active, times = measured()
    times[4] *= 10
    assert fit(["a", "b"], active, times)[0].per_expert.value == pytest.approx(1e-4, rel=1e-5)


def test_times_that_do_not_depend_on_the_experts():
    active, times = measured()
    flat = torch.full_like(times, 2e-3)
    layer, _ = fit(["a", "b"], active, flat)
    assert (layer.per_expert.value, layer.r_squared) == (pytest.approx(0, abs=1e-12), 0.0)
    assert layer.constant.value == pytest.approx(2e-3)
    assert not layer.good


def test_points_that_are_all_alike():
    active, times = measured()
    layer, _ = fit(["a", "b"], torch.full_like(active, 8.0), times)
    assert (layer.per_expert.value, layer.r_squared) == (0.0, 0.0)
    assert layer.constant.value == pytest.approx(float(times[0, :, 0].mean()))
    assert all(map(math.isfinite, (layer.constant.low, layer.constant.high, layer.per_expert.low)))


def test_a_step_is_predicted():
    times = BatchLatency(batch=16, rest=0.01, layers=(line(1e-3, 1e-4), line(2e-3, 2e-4)))
    assert times.predict([10, 20]) == pytest.approx(0.01 + 2e-3 + 6e-3)
    assert times.predict(10) == pytest.approx(0.01 + 2e-3 + 4e-3)
    with pytest.raises(ConfigError, match="of 3 layers were given; there are 2"):
        times.predict([1, 2, 3])


def test_a_bad_fit_is_said():
    good = BatchLatency(batch=16, rest=0.0, layers=(line(1e-3, 1e-4), line(1e-3, 1e-4, r_squared=0.957)))
    assert good.r_squared == 0.957
    assert good.statement == "a line describes each of them (R^2 at least 0.95)"
    bad = BatchLatency(
        batch=16, rest=0.0, layers=(line(1e-3, 1e-4), line(1e-3, 1e-5, 0.3, low=-1e-5), line(1e-3, 1e-4, 0.5))
    )
    assert bad.statement == (
        "a line does not describe 2 of them (R^2 down to 0.30; "
        "in 1 the time may not depend on the active experts at all)"
    )


def test_it_is_written_and_read(tmp_path):
    path = tmp_path / "latency.json"
    model = LatencyModel(
        model="mine",
        experts="lynx: loop",
        batches=[BatchLatency(batch=16, rest=0.01, layers=(line(1e-3, 1e-4),))],
        conditions={"torch": "2"},
    )
    model.save(path)
    assert LatencyModel.load(path) == model
    assert LatencyModel.load(path).predict([5], batch=16) == pytest.approx(0.0115)
    with pytest.raises(ConfigError, match="batches of 8 were not timed; there are 16"):
        model.predict([5], batch=8)


@pytest.mark.parametrize(
    ("content", "words"), [("[1]", "holds no latency model"), ("{", "cannot read"), ('{"modell": 1}', "model")]
)
def test_what_is_no_latency_model_is_refused(tmp_path, content, words):
    path = tmp_path / "latency.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        LatencyModel.load(path)
    with pytest.raises(ConfigError, match="cannot read"):
        LatencyModel.load(tmp_path / "nowhere.json")


def test_spreads():
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    # round by round: a round that was slow for both says nothing
    assert ratios([1.0, 20.0, 3.0], [2.0, 40.0, 6.0]) == Spread(0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])
