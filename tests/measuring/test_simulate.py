"""Replaying strategies on a trace: the counts of a real run, without the model."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lynx
from lynx.cli import main
from lynx.config import load_config
from lynx.errors import ConfigError
from lynx.measuring.batches import forced_batches
from lynx.measuring.examples import Example, reference_examples
from lynx.measuring.settings import parse_setting
from lynx.measuring.simulate import Traffic, decode_steps, rounds, simulate
from lynx.measuring.subject import Subject, load_subject
from lynx.measuring.trace import TracedSequence, record

COLUMNS = 6
UNION = {"name": "batch-union", "top": 1}
MASS = {"name": "importance-threshold", "mass": 0.7}
SETTINGS = {
    "batch-union": {"strategy": UNION},
    "importance-threshold": {"strategy": MASS},
    "without re-picking": {"strategy": {**MASS, "refill": "none", "protect": 2}},
    "top-budget": {"strategy": {"name": "top-budget", "budget": 5}},
    "affinity-binning": {"strategy": {"name": "affinity-binning", "budget": 4}},
    "popularity": {"strategy": {"name": "popularity", "drop": 3}},
    "static-top": {"strategy": {"name": "static-top", "top": 2}},
    "by-batch-size": {"strategy": {"name": "by-batch-size", "sizes": {3: UNION, 5: MASS}}},
    "phase-aware": {"strategy": {"name": "phase-aware", "decode": MASS}},
    "per-layer": {"strategy": {"name": "per-layer", "default": UNION, "strategies": {1: MASS, 2: "exact"}}},
    "min_tokens": {"strategy": UNION, "min_tokens": 5},
}


@pytest.fixture(scope="module")
def subject():
    return load_subject("reference")


@pytest.fixture(scope="module")
def examples():
    """Of two domains, with short prompts of many lengths; one goes on for too short."""
    chosen = reference_examples()[:7] + reference_examples()[200:208]
    cut = [
        Example(each.prompt[-3 - place :], each.continuation, None, each.domain) for place, each in enumerate(chosen)
    ]
    return [*cut, Example((1, 2), (3, 4), None, "code")]


@pytest.fixture(scope="module")
def trace(subject, examples, tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "t.safetensors"
    return record(subject, examples, path, columns=COLUMNS + 2, prompts=True)


def real_run(subject, batches, setting, layer, stress=False):
    """The report of a run with one layer attached, whose router so sees what the model alone gives it."""
    config = lynx.Config.build({**setting.dump(), "layers": {"include": [layer]}})
    with lynx.attach(subject.model, config) as handle, torch.no_grad():
        for batch in batches:
            with handle.teacher_forced(0 if stress else batch.prompt_columns):
                subject.model(
                    input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
                )
        return handle.report().layers[0].phases["decode"]


def counts(phase):
    whole = ("steps", "exact_steps", "tokens", "padding_rows", "exact_rows", "open_rows", "rows_changed")
    active = ("active_before", "active_after", "open_active_before", "open_active_after")
    return {name: getattr(phase, name) for name in (*whole, *active, "expert_bytes_after", "unsound_rows")}


@pytest.mark.parametrize(
    ("traffic", "names"),
    [
        (Traffic(sizes=(4,), columns=COLUMNS, seeds=(0, 1)), [*SETTINGS]),
        (Traffic(sizes=(7,), columns=COLUMNS, mix="similar"), ["top-budget", "per-layer"]),
        (Traffic(sizes=(5,), columns=3, most_batches=2), ["importance-threshold"]),
        (Traffic(sizes=(4,), columns=COLUMNS, stress=True), ["batch-union", "importance-threshold"]),
    ],
    ids=["mixed", "similar", "few", "stress"],
)
def test_equals_a_real_run_to_the_last_count(subject, examples, trace, traffic, names):
    settings = [load_config(SETTINGS[name]) for name in names]
    (size,) = traffic.sizes
    batches = [
        batch
        for seed in traffic.seeds
        for batch in list(forced_batches(examples, size, traffic.columns, subject.pad_id, traffic.mix, seed))[
            : traffic.most_batches
        ]
    ]
    changed = 0
    for row in simulate(trace, settings, traffic).rows:
        for layer, simulated in enumerate(row.report.layers):
            mine = simulated.phases["decode"]
            its = real_run(subject, batches, load_config(row.setting), layer, traffic.stress)
            assert counts(mine) == counts(its), (row.label, layer)
            assert mine.kept_mass_mean == pytest.approx(its.kept_mass_mean, abs=1e-5)
            assert mine.kept_mass_worst == pytest.approx(its.kept_mass_worst, abs=1e-5)
            changed += mine.rows_changed
    assert changed > 0


def deepseek():
    """A tiny model whose routers rank by a biased score within groups, and weigh by another."""
    path = Path(__file__).parents[1] / "adapters" / "families.py"
    spec = importlib.util.spec_from_file_location("families_to_trace", path)
    families = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = families
    try:
        spec.loader.exec_module(families)
        return families.build("deepseek_v3")
    finally:
        del sys.modules[spec.name]


def test_routers_that_do_not_rank_by_their_logits(tmp_path):
    subject = Subject("tiny", deepseek(), None, None, 0, (1,))
    examples = [Example(tuple(range(5 + place, 9 + 2 * place)), tuple(range(30 - place, 34))) for place in range(5)]
    trace = record(subject, examples, tmp_path / "tiny.safetensors")
    for info in trace.layers:
        routing = trace.routing(info, torch.arange(trace.tokens))
        assert routing.rule == info.rule
        assert routing.rule.score == "sigmoid"
        assert not torch.equal(routing.choice, routing.logits)
        assert (routing.choice == -torch.inf).any()  # groups that a token may not choose from
        assert torch.equal(routing.choice.topk(info.top_k).indices.sort(-1).values, routing.ids.sort(-1).values)
    batches = list(forced_batches(examples, 5, 4, subject.pad_id))
    (row,) = simulate(trace, [load_config(SETTINGS["batch-union"])], Traffic(sizes=(5,), columns=4)).rows
    for layer, simulated in enumerate(row.report.layers):
        its = real_run(subject, batches, load_config(row.setting), layer)
        assert counts(simulated.phases["decode"]) == counts(its)
        assert its.rows_changed > 0


def test_the_first_layer_is_that_of_a_run_with_all_layers(subject, examples, trace):
    """Those behind it are shown other hidden states there, which is what a trace cannot know."""
    setting = load_config(SETTINGS["batch-union"])
    traffic = Traffic(sizes=(4,), columns=COLUMNS)
    (row,) = simulate(trace, [setting], traffic).rows
    with lynx.attach(subject.model, setting) as handle, torch.no_grad():
        for batch in forced_batches(examples, 4, COLUMNS, subject.pad_id):
            with handle.teacher_forced(batch.prompt_columns):
                subject.model(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions)
        real = handle.report()
    same = [
        counts(mine.phases["decode"]) == counts(its.phases["decode"])
        for mine, its in zip(row.report.layers, real.layers, strict=True)
    ]
    assert same[0]
    assert not all(same)
    assert row.report.total["decode"].active_after == pytest.approx(real.total["decode"].active_after, rel=0.05)


def test_exact_changes_nothing(trace):
    (row,) = simulate(trace, [parse_setting("exact")], Traffic(sizes=(4,), columns=COLUMNS)).rows
    total = row.report.total["decode"]
    assert (row.share, row.rows_changed) == (1, 0)
    assert total.active_after == total.active_before
    assert total.kept_mass_worst == 1


def test_sizes(trace):
    """Larger batches wake more; one row is fewer than `min_tokens`, and is left exact."""
    calls = []
    traffic = Traffic(sizes=(1, 2, 7), columns=COLUMNS)
    result = simulate(trace, [parse_setting("batch-union top=1"), parse_setting("exact")], traffic, calls.append)
    assert calls == [f"batches of {size}" for size in (1, 2, 7) for _ in range(15 // size)]
    assert len(calls) == rounds(trace, traffic)
    assert [(row.label, row.batch) for row in result.rows] == [
        (label, size) for label in ("batch-union top=1", "exact") for size in (1, 2, 7)
    ]
    one, two, seven, *exact = (row.report.total["decode"] for row in result.rows)
    assert one.active_before == one.active_after == 4
    assert one.exact_steps == one.steps == 15 * COLUMNS
    assert one.kept_mass_mean is None
    assert 4 < two.active_before < seven.active_before
    assert two.active_after < two.active_before
    assert [each.active_before for each in exact] == [each.active_before for each in (one, two, seven)]


def test_layers_of_a_configuration(trace):
    setting = load_config({"strategy": UNION, "layers": {"exclude": [0, 2]}})
    traffic = Traffic(sizes=(4,), columns=COLUMNS)
    some, every = simulate(trace, [setting, parse_setting("batch-union top=1")], traffic).rows
    assert some.report.layers == every.report.layers[1::2]


def test_as_many_steps_as_were_recorded(trace):
    traffic = Traffic(sizes=(15,))
    result = simulate(trace, [parse_setting("exact")], traffic)
    assert result.rows[0].report.total["decode"].steps == result.conditions["columns"] == COLUMNS + 2


def test_steps_are_aligned_where_continuations_start():
    batch = [TracedSequence(10, 1, 3, ""), TracedSequence(40, 3, 3, "")]
    assert decode_steps(batch, 2).tolist() == [[11, 43], [12, 44]]
    assert decode_steps(batch, 2, stress=True).tolist() == [[-1, 40], [-1, 41], [10, 42], [11, 43], [12, 44]]


@pytest.mark.parametrize(
    ("setting", "traffic", "words"),
    [
        ("top-budget budget=33", {}, "budget=33, but layer 'model.layers.0.mlp.gate' has E=32"),
        (
            "exact",
            {"sizes": (16,)},
            "a batch of 16 needs as many sequences that go on for 6 tokens; of the trace's 16 15",
        ),
        ("exact", {"sizes": (9,), "mix": "similar"}, "sequences of one domain that go on"),
        ("exact", {"columns": 9}, "holds 8 decode steps of a sequence at most, and 9 are asked for"),
        ({"strategy": {"name": "phase-aware", "prefill": UNION}}, {}, "leaves decode exact"),
        ({"strategy": UNION, "layers": {"include": [4]}}, {}, "no MoE layer 4; there are 4"),
    ],
)
def test_what_cannot_be_simulated_is_told(trace, setting, traffic, words):
    config = load_config(setting) if isinstance(setting, dict) else parse_setting(setting)
    with pytest.raises(ConfigError, match=words):
        simulate(trace, [config], Traffic(**{"sizes": (4,), "columns": COLUMNS, **traffic}))


def test_stress_needs_prompts(subject, examples, tmp_path):
    without = record(subject, examples[:4], tmp_path / "t.safetensors", columns=2)
    with pytest.raises(ConfigError, match="holds no prompts; record them with `lynx trace --prompts`"):
        simulate(without, [parse_setting("exact")], Traffic(sizes=(2,), columns=2, stress=True))


def run(*arguments, code=0):
    with pytest.raises(SystemExit) as stopped:
        main(["simulate", *map(str, arguments)])
    assert stopped.value.code == code


def test_the_command(trace, capsys):
    small = ["--batch", "2,4", "--columns", COLUMNS, "--seeds", "2"]
    run(trace.path, "--strategy", "importance-threshold", "--sweep", "ratio=0.2:0.8:3", *small, "--json")
    result = json.loads(capsys.readouterr().out)
    assert [(row["setting"]["strategy"]["ratio"], row["batch"]) for row in result["rows"]] == [
        (ratio, size) for ratio in (0.2, 0.5, 0.8) for size in (2, 4)
    ]
    for row in result["rows"]:
        assert row["steps"] == COLUMNS * 2 * (15 // row["batch"])
        assert row["active_after"] == pytest.approx(sum(layer["active_after"] for layer in row["layers"]) / 4)
        assert 0 < row["kept_mass_worst"] < row["kept_mass_mean"] < 1
        assert 0 < row["rows_changed"] < 1
    assert result["conditions"]["trace"] == trace.conditions
    run(trace.path, "--strategy", "batch-union top=1", *small, "--layers")
    table = capsys.readouterr().out
    assert table.count("model.layers.3.mlp.gate") == table.count(" all ") == 2
    run(trace.path, "--strategy", "batch-union top=1", *small, "--similar", "--batches", "1")
    assert "similar decode batches" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "at least one --strategy"),
        (["--strategy", "exact", "--batch", "4,x"], "no list of batch sizes"),
        (["--strategy", "exact", "--batch", "0"], "no list of batch sizes"),
    ],
)
def test_misuse_is_told(trace, arguments, words, capsys):
    run(trace.path, *arguments, code=2)
    assert words in capsys.readouterr().err


def test_needs_no_model(trace):
    code = (
        "import sys\n"
        "from lynx.measuring.settings import parse_setting\n"
        "from lynx.measuring.simulate import Traffic, simulate\n"
        "from lynx.measuring.trace import open_trace\n"
        f"trace = open_trace({str(trace.path)!r})\n"
        f"rows = simulate(trace, [parse_setting('batch-union top=1')], Traffic(sizes=(4,), columns={COLUMNS})).rows\n"
        "assert 0 < rows[0].share < 1\n"
        "assert not {'transformers', 'vllm'} & set(sys.modules)\n"
    )
    # not in the checkout, whose folder `lynx` would be found before the installed one
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert (done.returncode, done.stderr) == (0, "")
