"""The gate of tests/conftest.py, on a suite made for it: a run of all tests in which kernels were not tested fails."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNEL_TESTS = runpy.run_path(str(ROOT / "tests" / "conftest.py"))["KERNEL_TESTS"]
FIRST = next(iter(KERNEL_TESTS), "")

INI = """
[pytest]
testpaths = tests
addopts = --import-mode=importlib --strict-markers -p no:cacheprovider
markers =
    kernel: runs Triton kernels
    gpu: needs a GPU
"""
FILE = """
import os
import pytest

pytestmark = pytest.mark.kernel

@pytest.mark.parametrize("n", range({passing}))
def test_passes(n):
    assert os.environ.get("TRITON_INTERPRET") == {interpret!r}
"""
SKIPPED = "\n@pytest.mark.skip\ndef test_skipped(): pass\n"
XFAILED = "\n@pytest.mark.xfail\ndef test_expected_to_fail(): assert False\n"
FOR_GPUS = "\n@pytest.mark.gpu\ndef test_on_a_gpu(): assert False\n"


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A suite as the gate wants it, in which as many tests pass as must."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text(INI)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    write_torch(tmp_path, gpu=False)
    for file, least in KERNEL_TESTS.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(FILE.format(passing=least, interpret="1"))
    return tmp_path


def write_torch(suite, gpu):
    """All that the gate asks of torch."""
    (suite / "torch.py").write_text(f"class cuda:\n    is_available = staticmethod(lambda: {gpu})\n")


def append(suite, text):
    with (suite / FIRST).open("a") as file:
        file.write(text)


def run(suite, *arguments):
    """Run pytest on the suite; the status and the lines of the gate."""
    command = [sys.executable, "-m", "pytest", *arguments]
    done = subprocess.run(command, cwd=suite, capture_output=True, text=True, timeout=120)
    text = done.stdout.partition("kernels were not tested")[2]
    return done.returncode, re.findall(r"^tests/.*", text, re.MULTILINE)


def test_all_passed(suite):
    assert KERNEL_TESTS
    assert run(suite) == (0, [])


@pytest.mark.parametrize(
    ("text", "lines"),
    [(SKIPPED, [f"{FIRST}: 1 skipped"]), (XFAILED, [f"{FIRST}: 1 skipped"]), (FOR_GPUS, [])],
    ids=["skip", "xfail", "gpu"],
)
def test_a_test_that_did_not_run(suite, text, lines):
    append(suite, text)
    assert run(suite) == (1 if lines else 0, lines)


def test_a_file_that_is_skipped_whole(suite):
    (suite / FIRST).write_text("import pytest\npytest.importorskip('no_such_module')\n")
    assert run(suite) == (1, [f"{FIRST}: 0 passed, at least {KERNEL_TESTS[FIRST]} must"])


def test_a_file_that_is_gone_is_noticed_and_a_new_one_too(suite):
    (suite / FIRST).rename(suite / "tests" / "test_new.py")
    assert run(suite) == (
        1,
        [
            f"{FIRST}: 0 passed, at least {KERNEL_TESTS[FIRST]} must",
            "tests/test_new.py has tests marked kernel, and no line in KERNEL_TESTS",
        ],
    )


def test_a_part_of_the_suite_is_not_held_to_it(suite):
    append(suite, SKIPPED)
    assert run(suite, "-k", "skipped") == (0, [])
    assert run(suite, "-m", "kernel") == (0, [])
    assert run(suite, FIRST) == (0, [])
    assert run(suite, "tests") == (1, [f"{FIRST}: 1 skipped"])


def test_with_a_gpu_kernels_run_there(suite):
    write_torch(suite, gpu=True)
    for file, least in KERNEL_TESTS.items():
        (suite / file).write_text(FILE.format(passing=least, interpret=None))
    there = FOR_GPUS.replace("False", "True")
    (suite / "tests" / "test_only_there.py").write_text(f"import pytest\npytestmark = pytest.mark.kernel\n{there}")
    assert run(suite) == (0, [])
    append(suite, SKIPPED)
    assert run(suite) == (1, [f"{FIRST}: 1 skipped"])
    assert run(suite, "--need-gpu", "-m", "kernel", FIRST) == (1, [f"{FIRST}: 1 skipped"])


def test_a_gpu_that_is_needed(suite):
    command = [sys.executable, "-m", "pytest", "--need-gpu", "-m", "kernel"]
    done = subprocess.run(command, cwd=suite, capture_output=True, text=True, timeout=120)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--need-gpu: torch sees no GPU here" in done.stderr


def test_every_file_marked_kernel_is_known():
    """But for those that are all for GPUs."""
    texts = {file: file.read_text() for file in set(ROOT.glob("tests/**/test_*.py")) - {Path(__file__)}}
    for_gpus = re.compile(r"^pytestmark = .*pytest\.mark\.gpu", re.MULTILINE)
    marked = [file for file, text in texts.items() if "pytest.mark.kernel" in text and not for_gpus.search(text)]
    assert {str(file.relative_to(ROOT)) for file in marked} == set(KERNEL_TESTS)
