"""Counters and reports against a plain Python count."""

import json
import math

import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from support import layer_of, with_host_slots

import lynx
from lynx.counters import Counters
from lynx.report import make_report
from lynx.routing import Phase, Role
from lynx.selection import LayerSelection
from lynx.testing import make_routing
from lynx.testing.routings import RoutingSpec, specs
from lynx.testing.transforms import stack

MIN_TOKENS = 2


def count(routing, phase, min_tokens=MIN_TOKENS):
    """What a batch-union of top 1 does to one batch, counted by the oracle."""
    batch = reference.Batch.of(routing)
    acting = batch.acting_on(Phase.DECODE)
    if len(acting.rows(reference.OPEN)) < min_tokens:
        acting = batch.acting_on()
    after = reference.reroute(acting, reference.union(reference.wants_by_rank(acting, 1)))

    def rows(*roles):
        return [t for t in acting.rows(*roles) if batch.phase[t] == phase]

    def distinct(rows, ids, weights):
        return len({e for t in rows for e, w in zip(ids(t), weights(t), strict=True) if w and 0 <= e < batch.experts})

    live, opened = rows(reference.EXACT, reference.OPEN), rows(reference.OPEN)
    kept = [
        1.0 - sum(acting.mass(t, e) for e, gone in zip(batch.ids[t], after[t].lost, strict=True) if gone)
        for t in opened
    ]
    before_ids, before_weights = batch.ids.__getitem__, batch.weights.__getitem__
    after_ids, after_weights = (lambda t: after[t].ids), (lambda t: after[t].weights)
    return {
        "steps": int(bool(live)),
        "exact_steps": int(bool(live) and not opened),
        "padding_rows": len(rows(reference.PADDING)),
        "exact_rows": len(rows(reference.EXACT)),
        "open_rows": len(opened),
        "active_before": distinct(live, before_ids, before_weights),
        "active_after": distinct(live, after_ids, after_weights),
        "open_active_before": distinct(opened, before_ids, before_weights),
        "open_active_after": distinct(opened, after_ids, after_weights),
        "rows_changed": sum(after[t].changed for t in opened),
        "unsound_rows": 0,
        "kept_mass": sum(kept),
        "kept_mass_worst": min(kept, default=1.0),
    }


def add(counts):
    """Add up what single batches gave."""
    total = {key: sum(one[key] for one in counts) for key in counts[0]}
    total["kept_mass_worst"] = min(one["kept_mass_worst"] for one in counts)
    return total


def compare(got, expected):
    for key, value in expected.items():
        if isinstance(value, float):
            assert math.isclose(getattr(got, key), value, rel_tol=1e-5, abs_tol=1e-6), key
        else:
            assert getattr(got, key) == value, key


def union_of_one(routing, **options):
    return LayerSelection(layer_of(routing), lynx.make_strategy("batch-union", top=1), **options)


@settings(max_examples=80)
@given(st.lists(specs(shapes=[(16, 4)]), min_size=1, max_size=3), st.sampled_from([(), (-1, 99)]))
def test_counts_match_a_plain_count(batches, host):
    routings = [with_host_slots(spec.build(), host) for spec in batches]
    selection = union_of_one(routings[0])
    for routing in routings:
        selection(routing)
    for phase, got in selection.counters.read().items():
        compare(got, add([count(routing, phase) for routing in routings]))


def test_independent_batches_in_one_call_are_steps_of_their_own():
    roles = [[2, 2, 1, 0], [2, 0, 0, 0], [0, 0, 0, 0], [2, 2, 2, 2]]
    routings = [RoutingSpec(tokens=4, seed=seed, roles=tuple(map(Role, row))).build() for seed, row in enumerate(roles)]
    selection = union_of_one(routings[0])
    selection(stack(routings))
    counts = selection.counters.read()
    for phase in Phase:
        compare(counts[phase], add([count(routing, phase) for routing in routings]))
    assert (counts[Phase.DECODE].steps, counts[Phase.DECODE].exact_steps) == (3, 1)


def test_an_expert_of_weight_zero_is_not_active():
    routing = make_routing(tokens=2, experts=8, top_k=2)
    routing.weights[:, 1] = 0.0
    selection = union_of_one(routing)
    selection.observe(routing)
    assert selection.counters.read()[Phase.DECODE].active_before == len(routing.ids[:, 0].unique())


def test_reset_starts_anew():
    routing = make_routing(tokens=4)
    selection = union_of_one(routing)
    fresh = selection.counters.read()
    assert fresh[Phase.DECODE].steps == 0
    assert fresh[Phase.DECODE].kept_mass_worst == 1.0
    selection(routing)
    selection.counters.failures = 3
    assert selection.counters.read() != fresh
    selection.counters.reset()
    assert selection.counters.read() == fresh
    assert selection.counters.failures == 0
    selection(routing)
    compare(selection.counters.read()[Phase.DECODE], count(routing, Phase.DECODE))


def test_counters_stay_in_place():
    """A captured graph writes to the tensors that it was captured with."""
    routing = make_routing(tokens=4)
    selection = union_of_one(routing)
    selection(routing)
    kept = [value for value in vars(selection.counters).values() if hasattr(value, "data_ptr")]
    assert len(kept) == 4
    places = [tensor.data_ptr() for tensor in kept]
    selection(routing)
    selection.counters.reset()
    assert [v.data_ptr() for v in vars(selection.counters).values() if hasattr(v, "data_ptr")] == places


class TestReport:
    def report(self):
        """Two layers; two decode steps, one with too few rows, and one prefill step."""
        roles = [Role.OPEN, Role.OPEN, Role.OPEN, Role.PADDING]
        steps = [
            RoutingSpec(tokens=4, seed=0, roles=tuple(roles)),
            RoutingSpec(tokens=1, seed=1),
            RoutingSpec(tokens=5, seed=2, phases=(Phase.PREFILL,) * 5),
        ]
        layers = []
        self.expected = []
        for index in range(2):
            routings = [RoutingSpec(**{**spec_fields(spec), "seed": spec.seed + 10 * index}).build() for spec in steps]
            info = layer_of(routings[0], index, expert_bytes=1000)
            selection = LayerSelection(info, lynx.make_strategy("batch-union", top=1))
            for routing in routings:
                selection(routing)
            layers.append((info, selection.counters.failures, selection.counters.read()))
            self.expected.append({phase: add([count(routing, phase) for routing in routings]) for phase in Phase})
        return make_report({"name": "batch-union", "top": 1}, "model", layers)

    def test_figures(self):
        report = self.report()
        assert [layer.num_experts for layer in report.layers] == [16, 16]
        assert [layer.top_k for layer in report.layers] == [4, 4]
        for layer, expected in zip(report.layers, self.expected, strict=True):
            decode, told = layer.phases["decode"], expected[Phase.DECODE]
            assert (decode.steps, decode.exact_steps, decode.tokens, decode.padding_rows) == (2, 1, 4, 1)
            assert (decode.open_rows, decode.exact_rows) == (3, 1)
            assert decode.active_before == told["active_before"] / 2
            assert decode.active_after == told["active_after"] / 2
            assert decode.open_active_before == told["open_active_before"] / 2
            assert decode.open_active_after == told["open_active_after"] / 2
            assert decode.active_after < decode.active_before
            assert decode.kept_mass_mean == pytest.approx(told["kept_mass"] / 3)
            assert decode.kept_mass_worst == pytest.approx(told["kept_mass_worst"])
            assert decode.kept_mass_worst < decode.kept_mass_mean < 1.0
            assert decode.rows_changed == told["rows_changed"]
            assert decode.expert_bytes_before == pytest.approx(1000 * told["active_before"] / 2)
            assert decode.expert_bytes_after == pytest.approx(1000 * told["active_after"] / 2)
            prefill = layer.phases["prefill"]
            assert (prefill.steps, prefill.exact_steps, prefill.tokens, prefill.open_rows) == (1, 1, 5, 0)
            assert prefill.active_before == prefill.active_after == expected[Phase.PREFILL]["active_before"]
            assert prefill.kept_mass_mean is None
            assert prefill.kept_mass_worst is None

    def test_total(self):
        report = self.report()
        layers, total = [layer.phases["decode"] for layer in report.layers], report.total["decode"]
        assert (total.steps, total.tokens, total.open_rows, total.padding_rows) == (2, 4, 3, 1)
        assert total.active_before == pytest.approx(sum(layer.active_before for layer in layers) / 2)
        assert total.active_after == pytest.approx(sum(layer.active_after for layer in layers) / 2)
        assert total.kept_mass_mean == pytest.approx(sum(layer.kept_mass_mean for layer in layers) / 2)
        assert total.kept_mass_worst == min(layer.kept_mass_worst for layer in layers)
        assert total.expert_bytes_before == pytest.approx(sum(layer.expert_bytes_before for layer in layers))

    def test_json_says_the_same(self):
        report = self.report()
        data = json.loads(report.to_json())
        assert data == json.loads(json.dumps(report.to_dict()))
        assert data["strategy"] == {"name": "batch-union", "top": 1}
        assert data["experts"] == "model"
        assert data["failures"] == 0
        assert data["layers"][1]["phases"]["decode"]["active_after"] == report.layers[1].phases["decode"].active_after
        assert data["layers"][0]["phases"]["prefill"]["kept_mass_mean"] is None
        assert data["total"]["decode"]["steps"] == 2

    def test_table(self):
        report = self.report()
        text = str(report)
        assert "batch-union(top=1)" in text
        console = Console(width=120, color_system=None)
        with console.capture() as captured:
            console.print(report)
        assert captured.get().rstrip() == text
        rows = [line for line in text.splitlines() if "decode" in line]
        assert len(rows) == 3  # two layers and their total
        assert f"{report.total['decode'].active_after:.2f}" in rows[-1]
        assert f"{report.total['decode'].kept_mass_worst:.4f}" in rows[-1]
        assert sum("prefill" in line for line in text.splitlines()) == 3

    def test_an_empty_report(self):
        report = make_report({"name": "exact"}, "model", [(layer_of(make_routing()), 0, Counters().read())])
        assert report.total["decode"].steps == 0
        assert report.total["decode"].kept_mass_mean is None
        assert "exact" in str(report)
        json.loads(report.to_json())

    def test_failures_are_reported(self):
        info = layer_of(make_routing())
        report = make_report({"name": "x"}, "model", [(info, 2, Counters().read()), (info, 3, Counters().read())])
        assert report.failures == 5
        assert report.to_dict()["failures"] == 5


def spec_fields(spec):
    return {name: getattr(spec, name) for name in spec.__slots__}
