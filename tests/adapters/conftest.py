"""One test per family where a test asks for `family`; the shared model of a family as `model`, left as it was found."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent))  # `families` is imported by its bare name

import families
import pytest
import torch

torch.set_num_threads(1)


def pytest_generate_tests(metafunc):
    chosen = any(mark.args[0] == "family" for mark in metafunc.definition.iter_markers("parametrize"))
    if "family" in metafunc.fixturenames and not chosen:
        metafunc.parametrize("family", list(families.FAMILIES))


@pytest.fixture
def model(family):
    """The shared model of a family; the test fails if it leaves anything behind."""
    shared = families.shared(family)
    before = families.footprint(shared)
    yield shared
    assert families.footprint(shared) == before
