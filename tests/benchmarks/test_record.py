"""A benchmark's file, made in parts."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import typer

HEAD = {"benchmark": "toy", "commit": "abc", "versions": {"torch": "2"}, "device": "cpu", "rounds": 3}
CPU = {"cpu": "one", "cores": 2}
CARD = {"gpu": {"name": "card", "capability": "9.0", "driver": "1", "memory_gib": 80.0}}


def rows(shape: str, T: int, *times: float) -> list[dict[str, Any]]:
    return [{"shape": shape, "T": T, "timed": time > 0, "us": time} for time in times]


def record(benchmarks: Any, out: Path, resume: bool, hardware: Any = CPU, head: Any = HEAD, **asked: list[Any]) -> Any:
    return benchmarks.record.Record(out, head, {"hardware": hardware}, [asked], resume)


def test_parts_come_together(benchmarks: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    first = record(benchmarks, out, True, shape=["a"], T=[1, 2])
    first.put(rows("a", 1, 1.0))
    first.put(rows("a", 2, 0.0))  # it was tried, and Lynx did not run
    first.fail("a, T=2", "no memory")
    with pytest.raises(typer.Exit):
        first.finish()
    assert json.loads(out.read_text())["cases"] == {"asked": 2, "missing": 1}

    second = record(benchmarks, out, True, shape=["a", "b"], T=[1])
    assert second.left == [("b", 1)]
    second.put(rows("b", 1, 3.0, 4.0))
    second.put(rows("b", 1, 5.0, 6.0))  # in place of those before, not beside them
    second.finish()
    result = json.loads(out.read_text())
    assert [row["us"] for row in result["rows"]] == [1.0, 0.0, 5.0, 6.0]
    assert not result["complete"]  # what the first part asked for is still missing
    assert result["cases"] == {"asked": 3, "missing": 1}
    assert result["failed"] == []

    third = record(benchmarks, out, True, shape=["a"], T=[2])
    third.put(rows("a", 2, 2.0))
    third.finish()
    result = json.loads(out.read_text())
    assert result["complete"]
    assert [row["us"] for row in result["rows"]] == [1.0, 5.0, 6.0, 2.0]
    assert [part["asked"][0]["T"] for part in result["parts"]] == [[1, 2], [1], [2]]
    assert all(part["core_share"] > 0 for part in result["parts"])

    anew = record(benchmarks, out, False, shape=["a"], T=[2])
    assert anew.rows == []


def test_a_part_on_something_else_is_refused(benchmarks: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    record(benchmarks, out, True, shape=["a"], T=[1]).save()
    text = out.read_text()
    for name in HEAD:
        with pytest.raises(typer.BadParameter, match=f"differs from this run in {name}"):
            record(benchmarks, out, True, head=HEAD | {name: "other"}, shape=["a"], T=[1])
    with pytest.raises(typer.BadParameter, match="hardware"):
        record(benchmarks, out, True, hardware=CPU | {"cores": 4}, shape=["a"], T=[1])
    assert out.read_text() == text


def test_of_a_machine_with_a_gpu_the_card_and_its_driver_count(benchmarks: Any, tmp_path: Path) -> None:
    out, head = tmp_path / "out.json", HEAD | {"device": "cuda"}
    hosts = itertools.count()

    def part(card: Any) -> Any:
        return record(
            benchmarks, out, True, hardware={"cpu": f"host {next(hosts)}"} | card, head=head, shape=["a"], T=[1]
        )

    part(CARD).save()
    part(CARD).save()
    assert [each["hardware"]["cpu"] for each in json.loads(out.read_text())["parts"]] == ["host 0", "host 1"]
    other = copy.deepcopy(CARD)
    other["gpu"]["driver"] = "2"
    with pytest.raises(typer.BadParameter, match="hardware"):
        part(other)


def test_saved_files_are_whole_and_short(benchmarks: Any, tmp_path: Path) -> None:
    out = tmp_path / "folder" / "out.json"
    benchmarks.record.save(out, {"rows": [{"us": 1.23456789}, {"us": 1e-9}], "none": None, "empty": []})
    text = out.read_text(encoding="utf-8")
    assert text.splitlines()[1:5] == [' "rows": [', '  {"us": 1.2346},', '  {"us": 1e-09}', " ],"]
    assert list(out.parent.iterdir()) == [out]


def test_lists_are_read_or_refused(benchmarks: Any) -> None:
    options = benchmarks.options
    assert options.counts("1, 4,4", "tokens") == [1, 4]
    assert options.words("", ("a", "b"), "shape") == ["a", "b"]
    assert options.fractions("1,0.333333", "fractions") == [1.0, 0.3333]
    for text in ("1.5", "0", "-1", "", "1,", "x"):
        with pytest.raises(typer.BadParameter):
            options.counts(text, "tokens")
    for text in ("0", "1.5", "nan", "", "x"):
        with pytest.raises(typer.BadParameter):
            options.fractions(text, "fractions")
    with pytest.raises(typer.BadParameter, match="Known: a, b"):
        options.words("c", ("a", "b"), "shape")
