"""The helper module of these tests, `cases`, is imported by its bare name. Triton is set up in tests/conftest.py."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)


@pytest.fixture
def poisoned(monkeypatch):
    """Fill every output and scratch buffer of the launches with NaN, or with numbers that are no index."""
    from cases import poisoned_empty

    from lynx.kernels.fused import launch

    monkeypatch.setattr(launch, "empty", poisoned_empty)
