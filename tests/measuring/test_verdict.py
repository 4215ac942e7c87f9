"""Will it help here: every rule on measurements made up for it."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from lynx.measuring.observed import THRESHOLDS, Observed, Thresholds
from lynx.measuring.verdict import RULES, judge

HELPS = Observed(
    batch=16,
    num_experts=64,
    top_k=8,
    active=40.0,
    alone=0.1,
    attached=0.1,
    by_experts=0.06,
    r_squared=0.99,
    experts="model: grouped_mm",
    layers=4,
)


def found(**changes):
    return {finding.rule: finding for finding in judge(replace(HELPS, **changes)).findings}


def test_where_it_helps():
    verdict = judge(HELPS)
    assert verdict.helps
    assert verdict.summary == (
        "it can help: with half the active experts a step would take 0.70 of the model's own time, "
        "and 0.70 of its time under Lynx with every expert kept"
    )
    faster = judge(replace(HELPS, alone=0.2)).summary  # Lynx's experts alone may be what saves
    assert "take 0.35 of the model's own time, and 0.70 of its time under Lynx with every" in faster
    assert [finding.rule for finding in verdict.findings] == ["only decode was timed"]


RULE_CASES = [
    ({"silent": 4}, "routers are bypassed", "stops", "4 of 4 MoE layers"),
    ({"silent": 1}, "routers are bypassed", "limits", "1 of 4 MoE layers"),
    ({"batch": 1, "active": 8.0}, "the batch is too small", "stops", "Decode more together"),
    ({"active": 9.9}, "tokens share their experts already", "stops", "wakes 9.9 experts per layer, and a single"),
    ({"host": 0.97}, "the host is the bottleneck", "stops", "for 97% of a step"),
    (
        {"by_experts": 0.001, "experts": "model: batched_mm"},
        "the experts implementation does not profit",
        "stops",
        "--experts lynx",
    ),
    ({"by_experts": 0.01}, "a step barely depends on the active experts", "stops", "10% of a step"),
    ({"by_experts": -0.01}, "a step barely depends on the active experts", "stops", "0% of a step"),
    ({"attached": 0.12}, "Lynx costs before it saves", "limits", "takes 1.20 of the model's own time"),
    ({"attached": 0.14}, "the overhead eats the gain", "stops", "fewer than 33% of the active experts"),
    ({"attached": 0.2}, "the overhead eats the gain", "stops", "no cut would win that back"),
    ({"attached": 0.2, "by_experts": -0.01}, "the overhead eats the gain", "stops", "no cut would win that back"),
    (
        {"num_experts": 8, "top_k": 2, "active": 7.4},
        "there are few experts per token",
        "limits",
        "7.4 of 8 experts are awake and a token takes 2",
    ),
    ({"r_squared": 0.4}, "the fit is bad", "limits", "as little as 40%"),
    ({"own": 0.5}, "the machine is busy", "note", "for 50% of a step only"),
    ({"expert_bytes": 10**7, "cache_bytes": 2**25}, "the model lies in the cache", "note", "10 MB"),
    ({"random_tokens": True}, "there was no text", "note", "Give --data"),
]


@pytest.mark.parametrize(("changes", "rule", "weight", "words"), RULE_CASES)
def test_rules(changes, rule, weight, words):
    assert rule not in found()
    finding = found(**changes)[rule]
    assert finding.weight == weight
    assert words in finding.text
    assert finding.text.endswith(".")
    verdict = judge(replace(HELPS, **changes))
    if weight == "stops":
        assert not verdict.helps
        first = next(each.rule for each in verdict.findings if each.weight == "stops")
        assert verdict.summary == f"it will not help: {first}"
    elif weight == "limits":
        assert verdict.summary.startswith("it can help, within limits: ")
    else:
        assert verdict.helps


@pytest.mark.parametrize(
    "changes",
    [
        {"host": 0.5},
        {"own": 0.95},
        {"active": 10.1},
        {"by_experts": 0.016},
        {"attached": 0.104},
        {"r_squared": 0.9},
        {"num_experts": 64, "top_k": 8, "active": 63.0},  # many small experts: all awake, and much to share
        {"num_experts": 8, "top_k": 2, "active": 6.0},
        {"expert_bytes": 10**9, "cache_bytes": 2**25},
        {"expert_bytes": 0, "cache_bytes": 2**25},
        {"by_experts": 0.05, "experts": "model: batched_mm"},
    ],
)
def test_rules_are_silent_before_their_thresholds(changes):
    assert set(found(**changes)) == {"only decode was timed"}


def test_a_gain_that_is_too_small():
    """No rule speaks, and still half the experts would save next to nothing."""
    verdict = judge(replace(HELPS, by_experts=0.016, attached=0.104))
    assert not verdict.helps
    assert verdict.summary.startswith("it will hardly help: with half the active experts a step would take 0.96")


def test_the_cause_is_named_once():
    """A flat step is explained by the host or by what runs the experts, if they are to blame."""
    for changes in ({"host": 0.95}, {"experts": "model: batched_mm"}):
        rules = found(by_experts=0.001, **changes)
        assert "a step barely depends on the active experts" not in rules
        assert len([each for each in rules.values() if each.weight == "stops"]) == 1


def test_break_even_is_where_both_take_as_long():
    seen = replace(HELPS, attached=0.12)
    assert seen.attached - (1 - seen.break_even) * seen.by_experts == pytest.approx(seen.alone)


def test_thresholds_are_in_one_place():
    assert not judge(HELPS, Thresholds(gain=0.5)).helps
    assert judge(replace(HELPS, host=0.97), Thresholds(host_share=0.99)).helps
    documented = Thresholds.__doc__
    assert all(f"{field.name}: " in documented for field in fields(THRESHOLDS))


def test_every_rule_is_tried():
    """As many rules as names of findings above, two of which are of one rule, twice."""
    names = {rule for _, rule, _, _ in RULE_CASES} | {"only decode was timed"}
    assert len(set(RULES)) == len(RULES) == len(names) - 2


def test_findings_are_documented():
    page = (Path(__file__).parents[2] / "docs" / "bench.md").read_text(encoding="utf-8")
    rows = page.partition("| finding |")[2].partition("\n\n")[0].splitlines()[2:]
    names = {row.split("|")[1].strip() for row in rows}
    assert names == {rule for _, rule, _, _ in RULE_CASES} | {"only decode was timed"}
