"""Break the kernels one seeded fault at a time, and require that the tests notice: `make mutants`.

The faults are in mutants.toml. Each is put into a copy of the repository, where the tests that it names must fail, and
must pass without it. A fault whose old text is not there exactly once is refused, so that none goes stale unseen.

    python mutants.py                  # all
    python mutants.py --only route     # those whose name holds a word
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
MUTANTS = Path(__file__).with_name("mutants.toml")
COPIED = ("adapters", "kernels", "lynx", "strategies", "tests", "pyproject.toml")
LIMIT_S = 300


class Mutant(NamedTuple):
    """A fault and what must notice it.

    Attributes:
        name: What is broken.
        file: Where, from the root of the repository.
        old: Text that stands there exactly once.
        new: Text in its place.
        tests: Arguments of pytest: a file, and perhaps -k.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


class Run(NamedTuple):
    """How pytest ended, in how many seconds, and its last lines."""

    status: int
    seconds: float
    text: str

    @property
    def failed(self):
        """Whether a test failed; errors around tests do not count."""
        return self.status == 1 and re.search(r"\b\d+ failed\b", self.text.splitlines()[-1]) is not None


def load(path=MUTANTS):
    """Read the mutants of a file."""
    return [Mutant(**entry) for entry in tomllib.loads(path.read_text("utf-8"))["mutant"]]


def mutate(mutant, text):
    """The text with the fault in it.

    Raises:
        ValueError: The old text is not there exactly once, or the new one is the same.
    """
    count = text.count(mutant.old)
    if count != 1:
        raise ValueError(f"{mutant.name}: its old text stands {count} times in {mutant.file}, not once")
    if mutant.old == mutant.new:
        raise ValueError(f"{mutant.name} changes nothing")
    return text.replace(mutant.old, mutant.new)


def copy_to(folder):
    """Copy what tests need; the links of `lynx` to the rooms stay links, into the copy."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", ".*_cache")
            shutil.copytree(source, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, folder / name)
    return folder


def run_tests(tests, folder):
    """Run pytest on a copy, up to the first failure."""
    # Compiled files would be taken for a mutant's where size and second are the same.
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile", "first-failure"]
    command = [sys.executable, "-P", "-m", "pytest", *options, *shlex.split(tests)]
    started = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
        status, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        status, text = -1, f"not done after {LIMIT_S} s"
    return Run(status, time.perf_counter() - started, "\n".join(text.splitlines()[-30:]))


def try_mutant(mutant, folder):
    """Break a copy, test it, and mend it."""
    file = folder / mutant.file
    text = file.read_text("utf-8")
    file.write_text(mutate(mutant, text), "utf-8")
    try:
        return run_tests(mutant.tests, folder)
    finally:
        file.write_text(text, "utf-8")


def main():
    """Run all; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="WORD", help="mutants whose name holds it")
    parser.add_argument("--mutants", type=Path, default=MUTANTS, metavar="FILE")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    mutants = [mutant for mutant in load(options.mutants) if options.only in mutant.name]
    for mutant in mutants:  # before anything slow
        mutate(mutant, (ROOT / mutant.file).read_text("utf-8"))

    with tempfile.TemporaryDirectory(prefix="lynx-mutants-") as scratch, ThreadPoolExecutor(options.jobs) as threads:
        copies = SimpleQueue()
        for n in range(options.jobs):
            copies.put(copy_to(Path(scratch, str(n))))

        def in_a_copy(function, argument):
            folder = copies.get()
            try:
                return function(argument, folder)
            finally:
                copies.put(folder)

        sound = {mutant.tests: threads.submit(in_a_copy, run_tests, mutant.tests) for mutant in mutants}
        sound = {tests: run.result() for tests, run in sound.items()}
        broken = [(mutant, threads.submit(in_a_copy, try_mutant, mutant)) for mutant in mutants]
        broken = [(mutant, run.result()) for mutant, run in broken]

    table = Table(title="Seeded faults of the kernels")
    for column in ("mutant", "in", "tests", "seconds", ""):
        table.add_column(column, overflow="fold")
    bad = 0
    for mutant, run in broken:
        before = sound[mutant.tests]
        verdict = "caught" if run.failed else "survived" if run.status == 0 else "no test ran to its end"
        if before.status != 0:
            verdict = "its tests fail without it"
        bad += verdict != "caught"
        table.add_row(mutant.name, Path(mutant.file).name, mutant.tests, f"{run.seconds:.0f}", verdict)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for tests, run in sound.items():
        if run.status != 0:
            print(f"Without any fault, pytest {tests} ends with {run.status}:\n{run.text}")
    for mutant, run in broken:
        if run.status != 0 and not run.failed:
            print(f"{mutant.name}: pytest {mutant.tests} ends with {run.status}:\n{run.text}")
    print(f"{len(broken) - bad} of {len(broken)} caught.")
    return 1 if bad or not broken else 0


if __name__ == "__main__":
    sys.exit(main())
