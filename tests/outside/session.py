"""One run of the judged tests in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
_SECONDS_FOR_A_TEST = 300


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one test.

    Attributes:
        result: `passed`, `failed` or `skipped`.
        reason: Why it was skipped or failed.
        tokens: What it generated, if it is one of ours.
        lynx: What the attached models counted; empty for a plain run.
    """

    result: str
    reason: str
    tokens: Any
    lynx: dict[str, Any]

    @property
    def compared(self) -> tuple[str, str, Any]:
        """What must be the same: not why it failed, as numbers and addresses may be in there."""
        return self.result, self.reason if self.result == "skipped" else "", self.tokens


def run(scratch: Path, tests: Sequence[str], attach: dict[str, Any] | None) -> dict[str, Outcome]:
    """Run test cases, or single tests, on models that are plain or attached.

    Args:
        scratch: The folder of `source.unpack`.
        tests: Names such as `TestMixtral` or `TestMixtral::test_save_load`.
        attach: What `attached.py` is to attach; None for plain models.

    Returns:
        Outcomes by name. A subtest that failed or was skipped is named behind its test.
    """
    written = Path(tempfile.mkdtemp(dir=scratch)) / "outcomes.jsonl"
    command = [sys.executable, "-m", "pytest", "--quiet", "-c", str(HERE / "pytest.ini"), "--rootdir", str(HERE)]
    command += ["--confcutdir", str(HERE), "--tb=short", "--timeout", str(_SECONDS_FOR_A_TEST)]
    command += ["-p", "outcomes", "--outcomes", str(written)]
    if attach is not None:
        command += ["-p", "attached", "--attach", json.dumps(attach)]
    command += [f"{HERE / 'test_families.py'}::{test}" for test in tests]
    paths = [str(scratch), str(HERE), str(HERE.parent / "adapters"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):  # 1: some tests failed
        raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    written.with_name("pytest.log").write_text(done.stdout, encoding="utf-8")
    return _read(written)


def _read(path: Path) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        name, count = line["test"], 2
        while name in outcomes:  # subtests may have no name of their own
            name, count = f"{line['test']} {count}", count + 1
        outcomes[name] = Outcome(line["outcome"], line["reason"], line.get("tokens"), line.get("lynx", {}))
    return outcomes
