"""Kernels compile for GPUs that are not here and keep to their budgets of registers and spills, and the check can fail.

This is the fast part of `make kernels`, which compiles all that is shipped.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUDGET = json.loads((HERE / "budget.json").read_text("utf-8"))

# One kernel whose rows do not fit the registers, one whose tiles do not fit the shared memory.
TOO_LARGE = """
from typing import NamedTuple

import triton
import triton.language as tl


@triton.jit
def hoarder(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    row = tl.load(x + i)
    tl.store(out + i, row * tl.sum(row))


@triton.jit
def wide(x, w, out, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    total = tl.zeros((16, SIZE), tl.float32)
    for k in range(n):
        rows = tl.load(x + k * SIZE + tl.arange(0, 16)[:, None] * SIZE + i[None, :])
        total = tl.dot(rows, tl.load(w + k * SIZE + i[:, None] * SIZE + i[None, :]), total)
    tl.store(out + tl.arange(0, 16)[:, None] * SIZE + i[None, :], total)


class Configuration(NamedTuple):
    name: str
    kernel: object
    signature: dict
    constexprs: dict
    options: dict


def shipped(target):
    few = {"waves_per_eu": 4} if target.startswith("hip") else {}
    size = {"x": "*fp32:16", "out": "*fp32:16", "SIZE": "constexpr"}
    yield Configuration("hoarder/all", hoarder, size, {"SIZE": 2**13}, {"num_warps": 1} | few)
    size = {"x": "*bf16:16", "w": "*bf16:16", "out": "*fp32:16", "n": "i32", "SIZE": "constexpr"}
    yield Configuration("wide/all", wide, size, {"SIZE": 256}, {"num_warps": 8, "num_stages": 4})
"""


def compile_kernels(*arguments, path=()):
    """Run the script without the interpreter; its status and its lines."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if path:
        environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "compile_kernels.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stdout.splitlines()


def test_a_subset_keeps_to_its_budget():
    status, lines = compile_kernels("--fast")
    assert status == 0, "\n".join(lines)
    shown = {tuple(cell.strip() for cell in line.split("│")[1:3]) for line in lines if "│" in line}
    for target, entries in BUDGET["targets"].items():
        kernels = {name.partition("/")[0] for name in entries}
        assert {"answer", "combine", "down", "gate_up", "plan", "route", "standin_inner", "standin_outer"} <= kernels
        assert {name.partition("/")[0] for card, name in shown if card == target} == kernels
        for layout in ("swiglu", "gpt_oss"):
            for kernel in ("gate_up", "down"):
                assert any(card == target and name.startswith(f"{kernel}/{layout}/") for card, name in shown)


def test_a_budget_that_is_not_kept_is_named(tmp_path):
    entries = BUDGET["targets"]["cuda:90"]
    tight, missing, *_ = (name for name in entries if name.startswith("combine/"))
    registers = entries[tight]["registers"]
    entries = entries | {tight: {"registers": 8, "spill": 0}, "gone/1": {"registers": 8, "spill": 0}}
    del entries[missing]
    changed = BUDGET | {"targets": BUDGET["targets"] | {"cuda:90": entries}}
    (tmp_path / "budget.json").write_text(json.dumps(changed))
    status, lines = compile_kernels("--only", f"^cuda:90 {tight}$", "--budget", tmp_path / "budget.json")
    assert status == 1
    faults = [line for line in lines if line.startswith("cuda:90 ")]
    assert re.fullmatch(rf"cuda:90 {tight}: (\d+) registers, its budget is 8", faults[0])
    assert registers - 8 < int(re.findall(r"(\d+) registers", faults[0])[0]) <= registers
    assert sorted(faults[1:]) == sorted(
        [f"cuda:90 {missing}: has no budget", "cuda:90 gone/1: has a budget and is not shipped"]
    )


def test_spills_and_too_much_shared_memory_are_seen(tmp_path):
    """On every card, also when the budget is about to be written."""
    (tmp_path / "too_large.py").write_text(TOO_LARGE)
    arguments = ("--shipped", "too_large", "--budget", tmp_path / "budget.json", "--update")
    status, lines = compile_kernels(*arguments, path=[tmp_path])
    assert status == 1
    for target in BUDGET["targets"]:
        (spilled,) = [line for line in lines if line.startswith(f"{target} hoarder/all: ")]
        assert re.search(r": \d{2,} bytes spilled, 16 are the most; has no budget$", spilled)
        (shared,) = [line for line in lines if line.startswith(f"{target} wide/all: ")]
        assert re.search(r": \d+ bytes of shared memory, the card has \d+", shared)
    written = json.loads((tmp_path / "budget.json").read_text())
    assert not any("hoarder/all" in entries for entries in written["targets"].values())


def test_no_budget_allows_more_than_the_limit():
    entries = [entry for target in BUDGET["targets"].values() for entry in target.values()]
    assert all(0 < entry["registers"] <= 512 and 0 <= entry["spill"] <= 16 for entry in entries)
    assert set(BUDGET["targets"]) == {"cuda:80", "cuda:90", "cuda:100", "hip:gfx942"}


def test_the_budget_was_made_with_the_compiler_that_is_installed_for_tests():
    pinned = re.search(r"^TRITON \?= triton==(\S+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert BUDGET["triton"] == pinned[1]


@pytest.mark.parametrize("arguments", [["--update", "--fast"], ["--update", "--only", "plan"]])
def test_a_part_does_not_make_a_budget(arguments):
    with pytest.raises(AssertionError, match="--update takes all configurations"):
        compile_kernels(*arguments)
