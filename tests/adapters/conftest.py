"""One test per family where a test asks for `family`; the shared model of a family as `model`, left as it was found."""

import logging
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
        absent = [pytest.param(name, marks=pytest.mark.skip(why)) for name, why in families.ABSENT.items()]
        metafunc.parametrize("family", [*families.FAMILIES, *absent])


@pytest.fixture
def model(family):
    """The shared model of a family; the test fails if it leaves anything behind."""
    shared = families.shared(family)
    before = families.footprint(shared)
    yield shared
    assert families.footprint(shared) == before


@pytest.fixture
def vllm(monkeypatch):
    """Stand-ins for vLLM's modules, with Lynx's plugin loaded; Lynx's logging and counters as they were, afterwards."""
    from vllm_stand_in import StandIn

    from lynx.adapters.vllm import hook, metrics, plugin, requests, routers

    events = logging.getLogger("lynx")
    before = list(events.handlers), events.level
    for name in ("LYNX_CONFIG", "PROMETHEUS_MULTIPROC_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(metrics, "_exporters", [])
    monkeypatch.setattr(requests, "_said", set())
    monkeypatch.setattr(hook, "_said", set())
    monkeypatch.setattr(plugin, "log_when_served", lambda handle: None)  # not when the tests end
    metrics._gauges.cache_clear()
    routers._subclass.cache_clear()
    stand_in = StandIn(monkeypatch)
    plugin.register()
    yield stand_in
    metrics._gauges.cache_clear()
    routers._subclass.cache_clear()
    events.handlers, events.level = before
