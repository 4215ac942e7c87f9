"""The contract: built-ins pass it, and it catches what is wrong."""

import subprocess
import sys
import time
from pathlib import Path

import broken
import pytest

import lynx
import lynx.selection
from lynx.errors import LynxError
from lynx.plugins import registry
from lynx.testing import ContractViolation, check_strategy, make_routing

BUILT_IN = registry().strategies
HERE = Path(__file__).parent  # not the checkout, whose folder `lynx` would be found before the installed one


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_registered_strategies_pass_quickly(name):
    start = time.thread_time()
    check_strategy(BUILT_IN[name].cls)
    assert time.thread_time() - start < 10.0  # 2 s where it was written; room for a slow machine


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "importance-threshold", "mass": 0.6},
        {"name": "importance-threshold", "ratio": 0.9, "protect": 0},
        {"name": "batch-union", "top": 1, "refill": "none"},
        {"name": "static-top", "top": 1, "refill": "re-pick"},
        {"name": "top-budget", "budget": 2, "utility": "count", "protect": 0},
        {"name": "top-budget", "budget": 3, "utility": "own-mass", "refill": "none"},
        {"name": "top-budget", "budget": 2, "floor": 0.6},
        {"name": "static-top", "top": 1, "floor": 0.6},
        {"name": "coverage", "share": 0.3, "utility": "count", "protect": 0},
        {"name": "affinity-binning", "budget": 2, "alpha": 3.0, "beta": 2},
        {
            "name": "phase-aware",
            "prefill": {"name": "top-budget", "budget": 2},
            "decode": {"name": "static-top", "top": 1},
        },
        {
            "name": "by-batch-size",
            "sizes": {
                2: {"name": "static-top", "top": 1},
                3: {"name": "batch-union", "top": 1},
                5: {"name": "top-budget", "budget": 2},
            },
        },
    ],
    ids=lambda strategy: "-".join(str(value) for value in strategy.values() if not isinstance(value, dict)),
)
def test_other_settings_pass(strategy):
    check_strategy(lynx.make_strategy(strategy), max_examples=25)


@pytest.mark.parametrize("cls", broken.STRATEGIES, ids=lambda cls: cls.registered_name())
def test_broken_strategies_are_caught(cls):
    with pytest.raises(ContractViolation) as caught:
        check_strategy(cls)
    assert caught.value.invariant in broken.STRATEGIES[cls]
    assert cls.__name__ in str(caught.value)
    assert f": {caught.value.invariant}: {caught.value.detail}" in str(caught.value)


@pytest.mark.parametrize("core", broken.CORES, ids=lambda core: core.__name__)
def test_broken_cores_are_caught(core, monkeypatch):
    monkeypatch.setattr(lynx.selection, "reroute", core)
    with pytest.raises(ContractViolation) as caught:
        check_strategy(lynx.make_strategy("batch-union", top=1, refill="re-pick"))
    assert caught.value.invariant in broken.CORES[core]


def test_a_core_that_forgets_protection_is_caught(monkeypatch):
    monkeypatch.setattr(lynx.SelectionStrategy, "secured", broken.unprotected)
    with pytest.raises(ContractViolation) as caught:
        check_strategy(lynx.make_strategy("top-budget", budget=1))
    assert caught.value.invariant == "protected-experts-stay"


def test_a_core_that_forgets_the_floor_is_caught(monkeypatch):
    monkeypatch.setattr(lynx.SelectionStrategy, "secured", broken.floorless)
    with pytest.raises(ContractViolation) as caught:
        check_strategy(lynx.make_strategy("top-budget", budget=1))
    assert caught.value.invariant == "floor-is-kept"


def test_a_failure_prints_the_call_that_makes_the_batch():
    with pytest.raises(ContractViolation) as caught:
        check_strategy(broken.KeepsEvenIds)
    notes = "\n".join(caught.value.__notes__)
    call = (
        next(line for line in notes.splitlines() if "make_routing(" in line).strip().removeprefix("spec=").rstrip(",")
    )
    routing = eval(call, {"make_routing": make_routing, "Role": lynx.Role, "Phase": lynx.Phase, "torch": broken.torch})
    assert isinstance(routing, lynx.Routing)
    assert routing.role.shape[0] <= 4  # shrunk


def test_the_cause_of_a_failing_select_is_kept():
    with pytest.raises(ContractViolation, match="select\\(\\) failed: RuntimeError") as caught:
        check_strategy(broken.Raises)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_class_and_an_instance_may_be_given():
    check_strategy(lynx.make_strategy("batch-union", top=1), max_examples=5)
    check_strategy(BUILT_IN["batch-union"].cls, max_examples=5)


def test_without_hypothesis_it_says_what_to_install():
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import lynx\n"
        "try:\n    import lynx.testing\n"
        "except lynx.LynxError as error:\n    print(isinstance(error, ImportError), error)\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE).stdout
    assert output.startswith("True")
    assert "pip install lynx-moe[testing]" in output


def test_options_for_large_layers_are_tried_on_large_layers():
    check_strategy(lynx.make_strategy("top-budget", budget=100), max_examples=3)
    with pytest.raises(ContractViolation, match=r"binds: its options fit no layer that was tried: .*budget=300"):
        check_strategy(lynx.make_strategy("top-budget", budget=300))


def test_violations_are_assertion_errors():
    assert issubclass(ContractViolation, AssertionError)
    assert not issubclass(ContractViolation, LynxError)
