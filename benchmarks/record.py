"""A benchmark's file: what was asked for, what was timed, and on what; and how a later run goes on with it."""

from __future__ import annotations

import json
import shlex
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import typer

Row = dict[str, Any]
Case = tuple[Any, ...]


class Record:
    """The figures of a benchmark, in one file, made by one run or by several parts.

    A case is one combination of values of the keys, and may have several rows. It is there if one of them was timed.
    All rows of a case are replaced together. The record is complete if every case is there that any part asked for.

    Args:
        out: The file.
        head: What must be the same in all parts, as JSON gives it back.
        part: What may differ from part to part: its `hardware`, of which the same machine is still asked, and more.
        asked: The cases that this part asks for, as grids: for each key its values.
        resume: Go on with the file, if it exists.

    Attributes:
        result: What the file holds.

    Raises:
        typer.BadParameter: The file was measured on or with something else.
    """

    def __init__(
        self, out: Path, head: dict[str, Any], part: dict[str, Any], asked: list[dict[str, list[Any]]], resume: bool
    ) -> None:
        self.out, self.keys = out, tuple(asked[0])
        self._part = {"command": shlex.join(sys.argv)} | part | {"asked": asked}
        earlier = json.loads(out.read_text(encoding="utf-8")) if resume and out.exists() else None
        if earlier is not None:
            different = [name for name, value in head.items() if earlier.get(name) != value]
            if not different and _machine(earlier["parts"][0]["hardware"]) != _machine(part["hardware"]):
                different = ["hardware"]
            if different:
                raise typer.BadParameter(f"{out} cannot go on: it differs from this run in {', '.join(different)}.")
        before = earlier or {"parts": [], "rows": []}
        self.result = head | {"complete": False, "cases": {}, "failed": [], "parts": [*before["parts"], self._part]}
        self.result["rows"] = before["rows"]
        self._began = time.perf_counter(), time.thread_time()

    @property
    def rows(self) -> list[Row]:
        """All rows, also those of earlier parts."""
        rows: list[Row] = self.result["rows"]
        return rows

    @property
    def asked(self) -> list[Case]:
        """The cases that some part asked for."""
        return self._cases(self.result["parts"])

    @property
    def missing(self) -> list[Case]:
        """Those of them that were not timed."""
        return self._not_timed(self.asked)

    @property
    def left(self) -> list[Case]:
        """The cases that this part asked for and that were not timed, in any part."""
        return self._not_timed(self._cases([self._part]))

    def put(self, rows: list[Row]) -> None:
        """Take rows in, in place of those that their cases have."""
        new = {self._case(row) for row in rows}
        self.rows[:] = [row for row in self.rows if self._case(row) not in new] + rows

    def fail(self, what: str, reason: str) -> None:
        """Note what went wrong; the rest is worth having all the same."""
        self.result["failed"].append(f"{what}: {reason}")

    def save(self) -> None:
        """Write the file, and say how much of a core a CPU's one thread has had in this part."""
        if self.result["device"] == "cpu":
            wall, cpu = time.perf_counter() - self._began[0], time.thread_time() - self._began[1]
            self._part["core_share"] = cpu / wall
        missing = len(self.missing)
        self.result |= {"complete": not missing, "cases": {"asked": len(self.asked), "missing": missing}}
        save(self.out, self.result)

    def finish(self) -> None:
        """Write the file, say what went wrong and what is missing, and exit with 1 if something went wrong."""
        self.save()
        for reason in self.result["failed"]:
            print(f"failed: {reason}")
        if missing := len(self.missing):
            print(f"Not complete: {missing} of {len(self.asked)} cases are missing. --resume goes on with {self.out}.")
        if self.result["failed"]:
            raise typer.Exit(1)

    def _cases(self, parts: list[dict[str, Any]]) -> list[Case]:
        grids = [[grid[key] for key in self.keys] for part in parts for grid in part["asked"]]
        return list(dict.fromkeys(case for grid in grids for case in product(*grid)))

    def _not_timed(self, cases: list[Case]) -> list[Case]:
        there = {self._case(row) for row in self.rows if row["timed"]}
        return [case for case in cases if case not in there]

    def _case(self, row: Row) -> Case:
        return tuple(row[key] for key in self.keys)


def save(path: Path, result: dict[str, Any]) -> None:
    """Write JSON, a line for each row and each part, and five digits for each number.

    The file is put in place in one move, so that a run that is cut off leaves the last whole one.
    """
    fields = []
    for name, value in result.items():
        text = json.dumps(_short(value))
        if name in ("rows", "parts") and value:
            text = "[\n  " + ",\n  ".join(json.dumps(_short(row)) for row in value) + "\n ]"
        fields.append(f" {json.dumps(name)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("{\n" + ",\n".join(fields) + "\n}\n", encoding="utf-8")
    part.replace(path)


def _short(value: Any) -> Any:
    """Round all floats to five digits."""
    match value:
        case float():
            return float(f"{value:.5g}")
        case dict():
            return {key: _short(item) for key, item in value.items()}
        case list() | tuple():
            return [_short(item) for item in value]
        case _:
            return value


def _machine(hardware: dict[str, Any]) -> dict[str, Any]:
    """What must agree between parts: of a machine with a GPU the card and its driver, which do the work."""
    gpu = hardware.get("gpu")
    return {name: gpu[name] for name in ("name", "capability", "driver")} if gpu else hardware
