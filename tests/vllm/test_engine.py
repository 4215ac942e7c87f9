"""vLLM serves the reference model: alone, and with Lynx."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

ROOT = Path(__file__).parents[2]
EXACT = {"strategy": {"name": "exact"}}
SETTINGS = [
    {"name": "exact"},
    {"name": "importance-threshold", "mass": 0.6},
    {"name": "top-budget", "budget": 14},
    {"name": "phase-aware", "decode": {"name": "importance-threshold", "ratio": 0.5}},
    {"name": "batch-union", "top": 1},
]
PRUNED = [json.dumps(setting) for setting in SETTINGS[1:]]
EXACT_ROWS = [1, 5, 6]


@pytest.fixture(scope="module")
def strategies(offline):
    """One engine, on which one strategy after another is put."""
    result, log = offline(lynx=EXACT, strategies=SETTINGS, exact_rows=EXACT_ROWS, problems=48)
    return result | {"log": log}


@pytest.mark.first
def test_exact_gives_vllms_own_tokens(strategies, stock):
    assert strategies["tokens"][: len(stock)] == stock
    assert strategies["outcomes"][json.dumps(SETTINGS[0])]["tokens"] == strategies["tokens"]
    assert strategies["log"].count("Lynx is armed: 4 MoE layers, strategy exact, vLLM ") == 1


@pytest.mark.first
@pytest.mark.parametrize("setting", PRUNED)
def test_fewer_experts_in_decode_and_prefill_untouched(strategies, setting):
    """Counted where the experts are called; Lynx's own report says the same."""
    outcome = strategies["outcomes"][setting]
    assert 1 < outcome["active"] < 0.85 * strategies["stock_active"]
    assert outcome["reported"] == pytest.approx(outcome["active"])
    assert outcome["prefill_as_first"]


@pytest.mark.first
@pytest.mark.parametrize("setting", PRUNED)
def test_quality_is_that_of_the_demo(strategies, setting):
    """Exact match lies in the interval that `lynx demo` printed for the same setting."""
    demo = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    wanted = json.loads(setting)
    wanted = wanted.get("decode", wanted)
    interval = next(each["exact_match"] for each in demo["outcomes"] if each["setting"] == wanted)
    assert interval["low_95"] <= strategies["outcomes"][setting]["solved"] / 48 <= interval["high_95"]


@pytest.mark.first
def test_detached_it_is_vllm_again(strategies):
    assert strategies["stock"] == strategies["tokens"]


@pytest.mark.first
def test_requests_may_ask_for_exact_routing(strategies):
    """Among pruned neighbours their rows leave the hook as the router made them, and their tokens are vLLM's own."""
    seen = strategies["exact_rows"]
    assert seen["same"] > 0
    assert seen["changed"] == 0
    assert seen["others_changed"] > 0
    pruned = strategies["outcomes"][json.dumps(SETTINGS[-1])]["tokens"]
    for row in EXACT_ROWS:
        assert strategies["mixed"][row] == strategies["stock"][row]
    assert any(pruned[row] != strategies["stock"][row] for row in range(48))


@pytest.mark.first
def test_a_time_is_held_by_what_the_engines_steps_take(strategies):
    """Where each step has time enough routing becomes exact, and where none has the configured target holds."""
    slow, fast = strategies["times"]
    assert (slow["position"], fast["position"]) == (1.0, 0.0)
    assert slow["share"] > 0.95
    assert 0.45 < fast["share"] < 0.6  # each step has experts of its own floor
    for found in (slow, fast):
        assert found["timed"] > 0.5 * found["steps"]  # not those in which a prompt is read
        assert 1e-4 < found["measured"] < 10


def test_compiled(offline, stock):
    """torch.compile traces through vLLM's CPU routers: the hook must be opaque to it, and no stale code be found."""
    compiled, _ = offline(engine={"enforce_eager": False})
    exact, log = offline(lynx=EXACT, engine={"enforce_eager": False})
    assert log.count("Lynx is armed") == 1
    assert exact["tokens"] == compiled["tokens"] == stock
    pruned, _ = offline(lynx={"strategy": SETTINGS[-1]}, engine={"enforce_eager": False})
    assert pruned["tokens"] != stock


def test_second_model_runner(offline):
    """The one that vLLM takes by itself for many models on GPUs; here its kernels are interpreted."""
    second = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
    alone, _ = offline(environment=second)
    chosen = [SETTINGS[0], SETTINGS[-1]]
    result, log = offline(lynx=EXACT, environment=second, strategies=chosen, exact_rows=EXACT_ROWS)
    assert log.count("Lynx is armed: 4 MoE layers, strategy exact") == 1
    assert "Using V2 Model Runner" in log
    assert result["tokens"] == result["stock"] == alone["tokens"]
    union = result["outcomes"][json.dumps(SETTINGS[-1])]
    assert union["active"] < 0.6 * result["stock_active"]
    assert union["prefill_as_first"]
    seen = result["exact_rows"]
    assert (seen["same"] > 0, seen["changed"], seen["others_changed"] > 0) == (True, 0, True)
    assert all(result["mixed"][row] == alone["tokens"][row] for row in EXACT_ROWS)


def test_subprocess_workers_configured_by_the_environment(offline, stock, tmp_path):
    """The engine core and its worker are processes of their own, and LYNX_CONFIG is all that they are told."""
    file = tmp_path / "lynx.yaml"
    apart = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "LYNX_CONFIG": str(file)}
    engine = {"distributed_executor_backend": "mp"}
    file.write_text("strategy: {name: exact}\n")
    exact, log = offline(environment=apart, engine=engine)
    assert log.count("Lynx is armed: 4 MoE layers, strategy exact") == 1
    assert exact["tokens"] == stock
    file.write_text("strategy: {name: batch-union, top: 1}\n")
    mixed, log = offline(environment=apart, engine=engine, mixed=True, exact_rows=EXACT_ROWS)
    assert "strategy batch-union" in log
    assert mixed["tokens"] != stock
    assert all(mixed["tokens"][row] == stock[row] for row in EXACT_ROWS)


def test_tensor_parallel_ranks(offline):
    """Two ranks, each armed; had they chosen differently, not even exact requests would get their tokens."""
    engine = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    apart = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    alone, _ = offline(environment=apart, engine=engine)
    exact, log = offline(lynx=EXACT, environment=apart, engine=engine)
    assert log.count("Lynx is armed: 4 MoE layers, strategy exact") == 2
    assert exact["tokens"] == alone["tokens"]
    union = {"strategy": SETTINGS[-1]}
    mixed, _ = offline(lynx=union, environment=apart, engine=engine, mixed=True, exact_rows=EXACT_ROWS)
    assert mixed["tokens"] != alone["tokens"]
    assert all(mixed["tokens"][row] == alone["tokens"][row] for row in EXACT_ROWS)


def test_doctor_shows_what_is_armed(folder):
    command = [str(Path(sys.executable).with_name("lynx")), "doctor", "--vllm", str(folder), "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    facts = json.loads(done.stdout)
    assert facts["armed"]["layers"] == "4"
    assert facts["armed"]["strategy"] == "exact"
    assert facts["armed"]["stand-ins"] == "taken, if they were made for these experts"
    assert facts["MoE layers"]["model.layers.0.mlp.experts"] == "32 experts, 4 per token, softmax, renormalised"


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"lynx": {"strategy": {"name": "batch-onion"}}}, "batch-onion"),
        ({"lynx": {"strategy": {"name": "top-budget", "budget": 64}}}, "budget=64"),
        ({"lynx": EXACT | {"experts": "lynx"}}, "experts='lynx' cannot run inside vLLM"),
        ({"lynx": EXACT, "environment": {"VLLM_BATCH_INVARIANT": "1"}}, "VLLM_BATCH_INVARIANT"),
    ],
    ids=["unknown strategy", "budget", "experts", "batch invariant"],
)
def test_what_cannot_be_is_refused_before_anything_is_served(offline, wish, words):
    _, log = offline(fails=True, **wish)
    assert words in log
    assert "Lynx is armed" not in log
