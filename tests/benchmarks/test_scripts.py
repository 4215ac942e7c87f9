"""The benchmarks run through their command line, on toy layers, and their results fit together."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

KERNELS = ["--device", "cpu", "--divide", "16", "--routing", "skewed", "--fractions", "0.5", "--rounds", "2"]


def test_kernels(toys: Path, read: Any) -> None:
    result = read(toys / "kernels_cpu.json")
    assert result["complete"]
    assert result["cases"] == {"asked": 4, "missing": 0}
    assert {"lynx", "torch", "transformers"} <= result["versions"].keys()
    assert result["commit"]
    (part,) = result["parts"]
    assert {"cpu", "cores"} <= part["hardware"].keys()
    assert "kernels.py" in part["command"]
    assert part["lynx"] in ("from the checkout", "installed, the same files as the checkout")
    assert not result["targets"]  # they are for a GPU
    full, half, *rest = result["rows"]
    assert [row["fraction"] for row in result["rows"]] == [1.0, 0.5, 1.0, 0.5]
    assert full["active"] == full["active_before"] == full["budget"] > 8
    assert half["active"] == half["budget"] == pytest.approx(full["active"] / 2, abs=0.5)
    assert rest[0]["layout"] == "input first, biased"
    for row in result["rows"]:
        timed = {name for name, figures in row["contenders"].items() if "us" in figures}
        assert timed >= {"layer", "route", "experts", "standins", "grouped_mm"}
        assert row["timed"]
        assert "not available here" in row["contenders"]["vllm_fused"]["refused"]
        copied = row["bandwidth_gb_per_s"]["copy"] * 1e3
        assert row["floor_us"] == pytest.approx(row["active"] * row["expert_bytes"] / copied, rel=1e-3)
        assert row["best_peer"] in ("grouped_mm", "batched_mm")
        assert (row["experts_run_by"], row["route_run_by"]) == ("loop", "torch")
        assert row["route_why"]
        assert (row["lost"] > 0) == (row["fraction"] < 1)
        assert row["standins_by_layer"]["median"] > 0


def test_kernels_go_on_with_their_file(toys: Path, run: Any, read: Any, tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    shutil.copy(toys / "kernels_cpu.json", out)
    before = read(out)
    more = [*KERNELS, "--tokens", "8", "--shapes", "OLMoE-1B-7B,Mixtral-8x7B", "--resume", "--out", str(out)]
    done = run("kernels.py", *more, "--minutes", "1e-9")  # time for nothing
    assert done.returncode == 0, done.stderr
    assert "2 of 6 cases are missing" in done.stdout
    after = read(out)
    assert after["rows"] == before["rows"]
    assert after["parts"][0] == before["parts"][0]
    assert len(after["parts"]) == 2
    assert not after["complete"]
    assert run("kernels.py", *more).returncode == 0
    after = read(out)
    assert after["complete"]
    assert after["rows"][:4] == before["rows"]
    assert [row["shape"] for row in after["rows"][4:]] == ["Mixtral-8x7B, H/16, I/16"] * 2


def test_launches_are_told_apart(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    launch_route = importlib.import_module("lynx.kernels.fused.launch_route")
    monkeypatch.setattr(launch_route, "shape_options", lambda *shape: {"PART": 64})
    words = [benchmarks.cases.launches(plan, torch.ones(T, 8), 2) for plan, T in ((None, 8), ("", 64), ("", 65))]
    assert words == ["torch", "one launch", "two launches"]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("kernels.py", ("--shapes", "Mixtral")),
        ("kernels.py", ("--tokens", "1.5")),
        ("decode.py", ("--models", "Mixtral")),
        ("decode.py", ("--steps", "1")),
        ("decode.py", ("--device", "cpu", "--modes", "graph")),
        ("tune.py", ("--kernels", "route")),
    ],
)
def test_unknown_words_are_refused(run: Any, script: str, words: tuple[str, ...], tmp_path: Path) -> None:
    done = run(script, *words, "--out", str(tmp_path / "never.json"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_decode(toys: Path, read: Any) -> None:
    result = read(toys / "decode_cpu.json")
    assert result["complete"]
    stock = [row for row in result["rows"] if not row["setting"]]
    lynx = [row for row in result["rows"] if row["setting"]]
    assert [row["experts"] for row in stock] == ["eager", "grouped_mm", "batched_mm"]
    assert len(lynx) == 4
    assert sum(row["fastest_stock"] for row in result["rows"]) == 1
    exact, *pruned = lynx
    assert exact["counts"]["active_after"] == exact["counts"]["active_before"]
    for row in pruned:
        assert row["counts"]["active_after"] < row["counts"]["active_before"]
        assert row["ratio"] == row["ratio_same_mode"]  # there is one mode on a CPU
    assert pruned[-1]["options"]["protect"] == 1
    for row in lynx:  # two rounds of two steps were timed and counted, after one that warmed up
        assert row["rounds"] == 2
        assert row["counts"]["steps"] == 4


def test_tuned(run: Any, read: Any, tmp_path: Path) -> None:
    out, small = (
        tmp_path / "tuned.json",
        ("--seeds", "1", "--candidates", "1", "--columns", "8", "--shares", "0.95,0.01"),
    )
    text = tmp_path / "text.jsonl"
    line = {"prompt": "x = ", "continuation": "[1, 2, 3, 4]"}
    lines = [line | {"prompt": f"x{i} = ", "domain": domain} for i in range(60) for domain in ("a", "b")]
    text.write_text("".join(json.dumps(each) + "\n" for each in lines))
    done = run("tuned.py", "--data", str(text), *small, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "At equal active experts" in done.stdout
    result = read(out)
    assert result["complete"]
    (row,) = result["rows"]
    assert row["promise"]["chosen"] is None or row["promise"]["verified"]["high"] <= result["max_kl"]
    assert len(row["uniform"]) == 10
    mild, never = row["equal"]
    assert never == {"asked": 0.01, "share": None}
    assert 0 < mild["share"] <= 0.95
    for each in mild["uniform"].values():
        assert each["ratio"]["low"] <= each["ratio"]["value"] <= each["ratio"]["high"]
        assert each["ratio"]["value"] == pytest.approx(mild["kl"]["value"] / each["kl"])
    assert {path.name for path in tmp_path.iterdir()} == {"tuned.json", "text.jsonl"}


def test_standins(run: Any, read: Any, tmp_path: Path) -> None:
    out, text = tmp_path / "standins.json", tmp_path / "text.jsonl"
    continuation = "[1, 2, 3, 4]\n" * 6
    lines = [
        {"prompt": f"{domain}{i} = ", "continuation": continuation, "domain": domain, "answer": "4]"}
        for i in range(48)
        for domain in ("a", "b")
    ]
    text.write_text("".join(json.dumps(each) + "\n" for each in lines))
    done = run("standins.py", "--data", str(text), "--rank", "2", "--asked", "4", "--brief", "--out", str(out))
    assert done.returncode == 0, done.stderr
    result = read(out)
    assert [row["way"] for row in result["ways"]] == ["re-pick", "stand-in, rank 0", "stand-in, rank 2"]
    assert {row["way"] for row in result["answers"]} == {"exact", "re-pick", "blend"}
    assert {(row["calibrated"], row["judged"]) for row in result["shift"]} == {
        (source, target) for source in ("a", "b", "both") for target in ("a", "b")
    }
    assert result["strategies"][0]["change"]["low"] <= result["strategies"][0]["change"]["high"]
