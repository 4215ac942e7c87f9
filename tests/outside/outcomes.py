"""A plugin for pytest: one line of JSON for each outcome, and the same seed before each test."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, required=True, help="file to write")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(0)
    common: Any = sys.modules.get("tests.test_modeling_common")
    if common is not None:
        common.global_rng.seed(0)


class Writer:
    """Keeps the file open; a subtest that fails has a line of its own."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8", buffering=1)

    def pytest_runtest_logreport(self, report: Any) -> None:
        subtest = getattr(report, "context", None)
        if report.when != "call" and report.passed:
            return
        if subtest is not None and report.passed:
            return
        name = report.nodeid.partition("::")[2]
        if subtest is not None:
            name += f" [{subtest.msg or dict(subtest.kwargs)}]"
        elif report.when != "call":
            name += "" if report.skipped else f" ({report.when})"
        line = {"test": name, "outcome": report.outcome, "seconds": report.duration, "reason": _reason(report)}
        print(json.dumps(line | dict(report.user_properties)), file=self.file)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Writer(config.option.outcomes))


def _reason(report: Any) -> str:
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).strip().partition("\n")[0][:300]
