"""Timing steps: what is measured in which order, on what, and what becomes of it. Times themselves are not asserted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lynx
from lynx.cli import main
from lynx.cli.bench import COLUMNS, counts_of
from lynx.measuring.bench import BenchPlan, bench, rounds
from lynx.measuring.examples import reference_examples
from lynx.measuring.latency import LatencyModel
from lynx.measuring.settings import parse_setting
from lynx.measuring.subject import load_subject

PLAN = BenchPlan(batches=(1, 4), rounds=3)
SETTING = parse_setting("batch-union top=1")


@pytest.fixture(scope="module")
def result():
    subject = load_subject("reference")
    calls = []
    found = bench(subject, reference_examples(), [SETTING], PLAN, calls.append)
    assert calls == ["batch 1"] * 4 + ["batch 4"] * 4
    assert len(calls) == rounds(PLAN)
    model = subject.model
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return found


def test_rows(result):
    one, four = result.batches
    assert (one.batch, four.batch) == (1, 4)
    kinds = [row.kind for row in four.rows]
    assert kinds == ["alone", "exact", "setting", *["budget"] * (len(kinds) - 3)]
    alone, exact, setting, *budgets = four.rows
    assert (alone.setting, alone.to_exact, alone.active_after) == (None, None, None)
    assert (exact.to_exact.median, alone.to_alone.median) == (1.0, 1.0)
    assert exact.active_before == exact.active_after > setting.active_after
    assert setting.setting == SETTING.dump()
    assert exact.experts == "model: grouped_mm"
    for row in four.rows:
        assert row.step.low <= row.step.median <= row.step.high
        assert len(row.layers) == 4
        assert 0 < row.layer.median < row.step.median
    # what a budget keeps is what it says: that is what lines are fitted to
    for row in budgets[:-1]:
        assert row.active_after == pytest.approx(int(row.label.split()[-1]), abs=0.5)
    assert budgets[-1].label == "budget of all experts"
    assert budgets[-1].active_after == budgets[-1].active_before
    assert one.rows[2].active_after == 4.0  # a batch of one is left exact


def test_lines_are_fitted_over_the_budgets(result):
    four = result.batches[1]
    budgets = [row for row in four.rows if row.kind == "budget"]
    assert len(four.latency.layers) == 4
    layer = four.latency.layers[0]
    assert layer.layer == "model.layers.0.mlp.gate"
    assert layer.fewest <= min(row.active_after for row in budgets) + 1
    assert layer.most > layer.fewest
    assert result.latency.at(4) == four.latency
    assert result.latency.experts == "model: grouped_mm"


def test_a_batch_of_one_has_nothing_to_share(result):
    assert result.batches[0].verdict.findings[0].rule == "the batch is too small"


def test_conditions_and_plain_data(result):
    data = json.loads(json.dumps(result.to_dict()))
    conditions = data["conditions"]
    assert (conditions["model"], conditions["layers"], conditions["dtype"]) == ("reference", 4, "float32")
    assert (conditions["lynx"], conditions["rounds"], conditions["batches"]) == (lynx.__version__, 3, [1, 4])
    assert conditions["timed_layer"].endswith("MoeSparseMoeBlock (experts, gate)")
    assert len(conditions["data"]) == 16
    assert data["batches"][1]["rows"][0]["label"] == "alone"
    assert data["batches"][1]["verdict"]["findings"]


def test_random_tokens_are_said(tiny):
    subject = replace(load_subject("reference"), model=tiny, stop_ids=(1,))
    found = bench(subject, None, (), BenchPlan(batches=(4,), rounds=1, prompt=8, experts="lynx"))
    assert found.conditions["data"] == "random tokens"
    assert "there was no text" in [finding.rule for finding in found.batches[0].verdict.findings]
    assert {row.experts.split(":")[0] for row in found.batches[0].rows[1:]} == {"lynx"}


def run(*arguments, code=0):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert stopped.value.code == code


def test_the_command(capsys, tmp_path, tiny):
    folder, fitted = tmp_path / "model", tmp_path / "latency.json"
    tiny.save_pretrained(folder)
    options = ["--strategy", "batch-union", "--sweep", "top=1:2", "--batch", "4", "--rounds", "3", "--prompt", "8"]
    options += ["--experts", "lynx", "--dtype", "float32", "--device", "cpu", "--fit", str(fitted)]
    run(str(folder), *options, "--json")
    data = json.loads(capsys.readouterr().out)
    command = data["conditions"]["command"]
    assert command.startswith(f"lynx bench {folder} --strategy batch-union --sweep top=1:2 --batch 4 --rounds 3")
    assert command.endswith("--json")
    assert "--clock" not in command
    labels = [row["label"] for row in data["batches"][0]["rows"]]
    assert labels[:4] == ["alone", "exact", "batch-union top=1", "batch-union"]
    read = LatencyModel.load(fitted)
    assert read.batches[0].model_dump(mode="json") == data["batches"][0]["latency"]
    assert read.conditions["command"] == command


def test_tables_and_words(capsys, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    run("reference", "--batch", "4", "--rounds", "3", "--clock", "thread")
    printed = " ".join(capsys.readouterr().out.split())
    for words in (
        "a decode step of 4 (mixed text); experts under Lynx by model: grouped_mm",
        "budget of all experts",
        "An MoE layer takes",
        "Batch 4: it ",
        "only decode was timed",
        "time of one CPU thread",
    ):
        assert words in printed


def test_batch_sizes_as_they_are_written():
    assert counts_of("1,4,16") == (1, 4, 16)
    assert counts_of(" 8, 8") == (8,)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reference", "--batch", "1,a"], "--batch takes whole numbers"),
        (["reference", "--batch", "0"], "--batch takes whole numbers"),
        (["reference", "--fit", "no/such/folder/x.json"], "there is no folder"),
        (["reference", "--device", "gpu"], "no device 'gpu'"),
        (["reference", "--device", "cuda:97"], "no device 'cuda:97'"),
        (["reference", "--dtype", "int8"], "no dtype 'int8'"),
        (["nowhere"], "cannot load a model"),
        (["reference", "--sweep", "top=1:2"], "0 are given"),
        (["reference", "--batch", "4000"], "makes no batch of 4000"),
    ],
)
def test_misuse_is_told(arguments, words, capsys):
    run(*arguments, code=2)
    assert words in capsys.readouterr().err


def test_columns_are_documented():
    page = (Path(__file__).parents[2] / "docs" / "bench.md").read_text(encoding="utf-8")
    rows = page.partition("| column |")[2].partition("\n\n")[0].splitlines()[2:]
    assert tuple(row.split("|")[1].strip(" `") for row in rows) == COLUMNS
