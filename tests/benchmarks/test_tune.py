"""tune.py on a toy in Triton's interpreter, and a file that is tuned in parts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer

ROOT = Path(__file__).parents[2]


def test_dry_run(run: Any, read: Any, tmp_path: Path) -> None:
    out = tmp_path / "tuned.json"
    pytest.importorskip("triton")
    words = [
        "--dry-run",
        "--kernels",
        "down,plan,standin_inner,standin_outer",
        "--loads",
        "4,64,256",
        "--out",
        str(out),
    ]
    done = run("tune.py", *words, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    tuned, shipped = read(out), read(ROOT / "kernels" / "configs" / "default.json")
    assert "combinations fit" in done.stdout
    assert tuned["measured"] is False
    assert tuned["made"].startswith(shipped["made"])
    assert "dry run" in tuned["made"]
    loads = {"down": 4, "plan": 256, "standin_inner": 64, "standin_outer": 64}
    assert tuned["made"].endswith(", ".join(f"{name} (loads up to {load})" for name, load in loads.items()) + ".")
    assert tuned.keys() == shipped.keys()
    for name, rows in shipped.items():
        if isinstance(rows, list):
            assert [row.keys() for row in tuned[name]] == [row.keys() for row in rows]
            assert [row["up_to"] for row in tuned[name]] == [row["up_to"] for row in rows]
    assert tuned["gate_up"] == shipped["gate_up"]

    again = run("tune.py", *words, "--resume", TRITON_INTERPRET="1")
    assert "Nothing was tuned." in again.stdout
    assert read(out) == tuned


@pytest.fixture
def part(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    card = {"gpu": {"name": "no card"}}
    monkeypatch.setattr(benchmarks.config_file, "hardware", lambda device: card)
    return lambda path, device: benchmarks.config_file.ConfigFile(path, "cuda_90", torch.device(device))


def test_a_file_is_tuned_in_parts(part: Any, read: Any, tmp_path: Path) -> None:
    out = tmp_path / "tuned.json"
    first = part(out, "cuda")
    by_hand = first._before
    assert first.tuned == set()
    small, large = first.lists["down"][:2]
    first.settle("down", small, {"num_warps": 8}, whole=True)
    first.settle("down", large, {"num_warps": 8}, whole=False)
    assert read(out)["measured"] is True

    second = part(out, "cuda")
    assert second.tuned == {("down", small["up_to"])}  # the other was broken off
    assert [row["num_warps"] for row in second.lists["down"][:2]] == [8, 8]
    second.settle("down", second.lists["down"][1], {"num_warps": 4}, whole=True)
    second.settle("plan", second.lists["plan"][0], {}, whole=True)
    made = read(out)["made"]
    assert made.startswith(by_hand)
    assert made.count("on one no card") == 2
    assert f"down (loads up to {small['up_to']}, {large['up_to']} broken off)." in made
    assert part(out, "cuda").tuned == {
        ("down", small["up_to"]),
        ("down", large["up_to"]),
        ("plan", second.lists["plan"][0]["up_to"]),
    }


def test_dry_runs_and_measurements_do_not_mix(part: Any, tmp_path: Path) -> None:
    measured, dry = tmp_path / "measured.json", tmp_path / "dry.json"
    for path, device in ((measured, "cuda"), (dry, "cpu")):
        file = part(path, device)
        file.settle("plan", file.lists["plan"][0], {}, whole=True)
    with pytest.raises(typer.BadParameter):
        part(measured, "cpu")
    with pytest.raises(typer.BadParameter):
        part(dry, "cuda")


def test_points_of_a_load_are_the_largest_in_it(benchmarks: Any) -> None:
    def point(name: str, T: int) -> Any:
        return SimpleNamespace(layers=[SimpleNamespace(shape=SimpleNamespace(name=name))], T=T)

    points = [point(name, T) for name in ("a", "b") for T in (1, 4, 8, 16, 32)]
    found = benchmarks.points.points_of(points, above=4, up_to=16, most=1)
    assert [(each.layers[0].shape.name, each.T) for each in found] == [("a", 16), ("b", 16)]
    assert [each.T for each in benchmarks.points.points_of(points, 0, 1, 2)] == [1, 1]
