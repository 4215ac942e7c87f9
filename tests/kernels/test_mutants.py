"""The seeded faults still fit the kernels, and `make mutants` fails for one that no test notices."""

import ast
import shlex
import subprocess
import sys
from pathlib import Path

import mutants
import pytest

MUTANTS = mutants.load()

TWO_FAULTS = """
[[mutant]]
name = "noticed"
file = "tests/kernels/mutants.py"
old = "LIMIT_S = 300"
new = "LIMIT_S = 301"
tests = "tests/kernels/test_mutants.py -k only_here_to_fail"

[[mutant]]
name = "not noticed"
file = "tests/kernels/mutants.py"
old = '''"not done after'''
new = '''"not yet done after'''
tests = "tests/kernels/test_mutants.py -k only_here_to_fail"

[[mutant]]
name = "no Python"
file = "tests/kernels/mutants.py"
old = "def main():"
new = "def main(:"
tests = "tests/kernels/test_mutants.py -k only_here_to_fail"
"""


def test_there_are_enough_and_each_has_a_name():
    assert len(MUTANTS) >= 16
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    kinds = {"route", "plan", "gate_up", "down", "combine", "standins", "answer"}
    assert {mutant.name.partition(":")[0] for mutant in MUTANTS} == kinds


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_fits(mutant):
    ast.parse(mutants.mutate(mutant, (mutants.ROOT / mutant.file).read_text("utf-8")))
    assert (mutants.ROOT / shlex.split(mutant.tests)[0]).is_file()


def test_text_that_is_gone_is_told():
    mutant = MUTANTS[0]._replace(old="no such text")
    with pytest.raises(ValueError, match=r"its old text stands 0 times in .*, not once"):
        mutants.mutate(mutant, Path(mutants.ROOT, mutant.file).read_text("utf-8"))


def test_only_here_to_fail_in_a_copy():
    assert mutants.LIMIT_S == 300


def test_a_fault_that_is_not_noticed_fails(tmp_path):
    (tmp_path / "mutants.toml").write_text(TWO_FAULTS)
    script = Path(mutants.__file__)
    command = [sys.executable, str(script), "--mutants", str(tmp_path / "mutants.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    verdicts = [line.split("│")[1::4] for line in done.stdout.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in verdict] for verdict in verdicts] == [
        ["noticed", "caught"],
        ["not noticed", "survived"],
        ["no Python", "no test ran to its end"],
    ]
    assert "1 of 3 caught." in done.stdout
    assert done.returncode == 1
    assert (script.read_text("utf-8")).count("LIMIT_S = 300") == 1  # what is broken is a copy
