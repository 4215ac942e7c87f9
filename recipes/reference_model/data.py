"""The training bytes: Python's standard library, split by file, and generated problems, split by arithmetic."""

from __future__ import annotations

import hashlib
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from model import EOS
from problems import Problem, generate_drill, generate_problem

HELD_OUT_PERCENT = 5
# Tables and generated files: many bytes of little structure. `_sysconfigdata` also differs between machines.
SKIPPED = (
    "site-packages/",
    "dist-packages/",
    "encodings/",
    "pydoc_data/",
    "_sysconfigdata",
    "config-",
    "html/entities",
)
LARGEST_LIBRARY_FILE = 300_000
LARGEST_TEST_FILE = 100_000
TEST_SHARE = 4  # each epoch takes one test file in this many


@dataclass(frozen=True)
class SourceFile:
    """One file of the standard library."""

    path: str
    content: bytes
    is_test: bool
    held_out: bool


def _bucket(path: str, buckets: int, salt: str = "") -> int:
    return int.from_bytes(hashlib.sha256((salt + path).encode()).digest()[:4], "big") % buckets


def read_standard_library() -> list[SourceFile]:
    """Reads the running interpreter's standard library, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        is_test = "test" in name.split("/")[0] or "/test" in name or "/idle_test" in name
        limit = LARGEST_TEST_FILE if is_test else LARGEST_LIBRARY_FILE
        if any(part in name for part in SKIPPED) or not 64 <= path.stat().st_size <= limit:
            continue
        files.append(SourceFile(name, path.read_bytes(), is_test, _bucket(name, 100) < HELD_OUT_PERCENT))
    return files


def corpus_hash(files: list[SourceFile]) -> str:
    """SHA-256 over the names and contents of all files, training and held-out."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.path.encode() + b"\0" + file.content + b"\0")
    return digest.hexdigest()


def held_out_code(files: list[SourceFile]) -> list[SourceFile]:
    """The held-out files that are measured: library code, no tests."""
    return [file for file in files if file.held_out and not file.is_test]


def seen_code(files: list[SourceFile]) -> list[SourceFile]:
    """The files that are trained on: library code, no tests."""
    return [file for file in files if not file.held_out and not file.is_test]


def distinct_problems(count: int, seed: int, held_out: bool = True) -> list[Problem]:
    """Draws distinct problems, held-out ones or others, the three kinds in turn."""
    rng = random.Random(f"{'held-out' if held_out else 'seen'} {seed}")
    problems: dict[str, Problem] = {}
    kinds = ("single", "chain-2", "chain-3")
    while len(problems) < count:
        problem = generate_problem(rng, held_out=held_out, kind=kinds[len(problems) % 3])
        problems.setdefault(problem.prompt, problem)
    return list(problems.values())


class TrainingBatches:
    """Batches as a function of counters alone, so that a resumed run sees the bytes it would have seen."""

    def __init__(
        self, files: list[SourceFile], seed: int, context: int, batch_size: int, code_share: float, drill_share: float
    ) -> None:
        self.seed, self.context, self.batch_size = seed, context, batch_size
        self.code_windows = round(batch_size * code_share)
        self.drill_windows = round(batch_size * drill_share)
        self.library = [self._tokens(f) for f in files if not f.held_out and not f.is_test]
        tests = [f for f in files if not f.held_out and f.is_test]
        self.tests = [
            [self._tokens(f) for f in tests if _bucket(f.path, TEST_SHARE, "t") == i] for i in range(TEST_SHARE)
        ]
        # Every epoch is cut to the same number of windows, so that the epoch of a step is a division.
        smallest = min(sum(map(len, part)) for part in self.tests)
        self.windows_per_epoch = (sum(map(len, self.library)) + smallest) // (context + 1) - 1
        self._epoch = -1
        self._windows = np.empty((0, 0), dtype=np.int16)

    @staticmethod
    def _tokens(file: SourceFile) -> np.ndarray:
        return np.append(np.frombuffer(file.content, dtype=np.uint8).astype(np.int16), np.int16(EOS))

    def _load_epoch(self, epoch: int) -> None:
        rng = np.random.default_rng([self.seed, epoch])
        parts = self.library + self.tests[epoch % TEST_SHARE]
        stream = np.concatenate([parts[i] for i in rng.permutation(len(parts))])
        width, count = self.context + 1, self.windows_per_epoch
        phase = int(rng.integers(width))
        windows = stream[phase : phase + count * width].reshape(count, width)
        self._epoch, self._windows = epoch, windows[rng.permutation(count)]

    def _generated_window(self, rng: random.Random, drill: bool) -> np.ndarray:
        window: list[int] = []
        while len(window) <= self.context:
            text = generate_drill(rng) if drill else generate_problem(rng, held_out=False).text
            window += [*text.encode(), EOS]
        return np.array(window[: self.context + 1], dtype=np.int16)

    def batch(self, step: int, first_window: int) -> torch.Tensor:
        """Returns token ids [batch, context + 1]: windows of code, of drills, then windows that start with a problem.

        Args:
            step: Seeds the problems.
            first_window: Windows of code that earlier steps have used.
        """
        rows = []
        for index in range(first_window, first_window + self.code_windows):
            epoch, position = divmod(index, self.windows_per_epoch)
            if epoch != self._epoch:
                self._load_epoch(epoch)
            rows.append(self._windows[position])
        rng = random.Random(f"{self.seed} {step}")
        rows += [self._generated_window(rng, drill=True) for _ in range(self.drill_windows)]
        rows += [self._generated_window(rng, drill=False) for _ in range(self.batch_size - len(rows))]
        return torch.from_numpy(np.stack(rows).astype(np.int64))
