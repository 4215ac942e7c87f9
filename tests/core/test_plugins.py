"""The plugin registry: what a third party may do wrong, and how it is told."""

import ast
import inspect
import logging
import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Literal

import pytest
import torch

import lynx
from lynx import attachment, hookimpl, hookspecs, plugins
from lynx.plugins import BUILT_IN, Registry
from lynx.strategies import lynx_strategies


class Distribution:
    """Enough of a distribution for an entry point to have a package name."""

    def __init__(self, name):
        self.name = name


@pytest.fixture
def plug(monkeypatch):
    """Make a module of the given hooks importable and return an entry point to it."""

    def plug(package, module_name=None, fault=None, **hooks):
        module = types.ModuleType(module_name or package.replace("-", "_"))
        for name, returned in hooks.items():
            setattr(module, name, hookimpl(hook(name, returned)))
        if fault is None:
            monkeypatch.setitem(sys.modules, module.__name__, module)
        point = EntryPoint(name=package.removeprefix("lynx-"), value=module.__name__, group="lynx")
        return point._for(Distribution(package))

    def hook(name, returned):
        def implementation():
            if isinstance(returned, Exception):
                raise returned
            return returned

        implementation.__name__ = name
        return implementation

    return plug


def strategy(called, **fields):
    """Make a strategy class."""
    annotations = {"name": Literal[called], **{key: kind for key, (kind, _) in fields.items()}}
    body = {"name": called, "__annotations__": annotations, "select": lambda self, routing: routing.wanted}
    return type("Made", (lynx.SelectionStrategy,), {**body, **{key: default for key, (_, default) in fields.items()}})


def test_built_ins_come_by_the_same_hooks():
    registry = Registry([])
    assert len(registry.strategies) == len(lynx_strategies())
    assert {found.package for found in registry.strategies.values()} == {BUILT_IN}
    assert registry.adapters
    assert {package for _, package in registry.adapters} == {BUILT_IN}
    assert registry.broken == []
    assert ("lynx.strategies", BUILT_IN) in registry.plugins


def test_a_third_partys_strategy_is_found_by_name(plug):
    mine = strategy("mine", speed=(int, 3))
    registry = Registry([plug("lynx-mine", lynx_strategies=[mine])])
    assert registry.strategy("mine") is mine
    assert registry.strategies["mine"].package == "lynx-mine"
    assert ("lynx-mine:mine", "lynx-mine") in registry.plugins


class Mine:
    """An adapter that takes nothing."""

    def __init__(self, name="mine", fault=None):
        self.name, self.fault = name, fault

    def recognises(self, model):
        if self.fault is not None:
            raise self.fault
        return False

    def discover(self, model):
        raise AssertionError("it recognised nothing")

    prepare = discover


def test_third_party_adapters_are_asked_first(plug):
    adapter = Mine()
    registry = Registry([plug("lynx-mine", lynx_adapters=[adapter])])
    assert registry.adapters[0] == (adapter, "lynx-mine")
    assert len(registry.adapters) > 1


class TestBroken:
    @pytest.mark.parametrize(
        ("hooks", "reason"),
        [
            ({"lynx_strategies": RuntimeError("no luck")}, "RuntimeError: no luck"),
            ({"lynx_strategies": [int]}, "which is not a subclass of lynx.SelectionStrategy"),
            ({"lynx_strategies": ["batch-union"]}, "which is not a subclass of lynx.SelectionStrategy"),
            ({}, "neither lynx_strategies() nor lynx_adapters()"),
            ({"lynx_strategies": []}, "neither lynx_strategies() nor lynx_adapters()"),
            ({"lynx_stratagems": []}, "lynx_stratagems"),
            ({"lynx_adapters": RuntimeError("no luck")}, "RuntimeError: no luck"),
            ({"lynx_adapters": [object()]}, "which is no adapter"),
            ({"lynx_adapters": [Mine]}, "which is no adapter"),
            (
                {"lynx_adapters": [types.SimpleNamespace(name="half")]},
                "'half' has no recognises(), discover(), prepare()",
            ),
            ({"lynx_adapters": [Mine(), Mine()]}, "it registers an adapter twice"),
        ],
        ids=[
            "raises",
            "no-strategy",
            "a-name",
            "no-hooks",
            "nothing",
            "unknown-hook",
            "adapters-raise",
            "no-adapter",
            "a-class",
            "half-an-adapter",
            "twice",
        ],
    )
    def test_it_is_reported_and_breaks_nothing_else(self, plug, hooks, reason, caplog):
        bad = plug("lynx-bad", **hooks)
        good = plug("lynx-good", lynx_strategies=[strategy("good")])
        with caplog.at_level(logging.ERROR, "lynx"):
            registry = Registry([bad, good])
        (broken,) = registry.broken
        assert (broken.package, broken.entry_point) == ("lynx-bad", "bad")
        assert reason in broken.reason
        assert "good" in registry.strategies
        assert len(registry.strategies) == len(lynx_strategies()) + 1
        (record,) = caplog.records
        assert record.getMessage().startswith("lynx.plugin_failed package=lynx-bad entry_point=bad reason=")

    def test_a_module_that_cannot_be_imported(self, plug):
        registry = Registry([plug("lynx-gone", fault="missing"), plug("lynx-good", lynx_strategies=[strategy("good")])])
        (broken,) = registry.broken
        assert broken.reason.startswith("ModuleNotFoundError: No module named 'lynx_gone'")
        assert "good" in registry.strategies

    def test_strict_mode_raises(self, plug):
        with pytest.raises(lynx.PluginError, match="plugin 'bad' of lynx-bad could not be loaded: no luck") as told:
            Registry([plug("lynx-bad", lynx_strategies=RuntimeError("no luck"))], strict=True)
        assert isinstance(told.value.__cause__, RuntimeError)

    def test_the_environment_makes_it_strict(self, plug, monkeypatch):
        bad = plug("lynx-bad", lynx_strategies=RuntimeError("no luck"))
        monkeypatch.setattr(plugins, "entry_points", lambda group: [bad] if group == "lynx" else [])
        load = plugins.registry.__wrapped__
        for value in ("", "0"):
            monkeypatch.setenv("LYNX_STRICT_PLUGINS", value)
            assert len(load().broken) == 1
        monkeypatch.setenv("LYNX_STRICT_PLUGINS", "1")
        with pytest.raises(lynx.PluginError, match="lynx-bad"):
            load()

    def test_who_asks_for_its_strategy_is_told_why_it_is_not_there(self, plug):
        registry = Registry([plug("lynx-bad", lynx_strategies=RuntimeError("no luck"))])
        with pytest.raises(lynx.ConfigError) as told:
            registry.strategy("bad-one")
        assert "Plugin 'bad' of lynx-bad is broken: RuntimeError: no luck." in str(told.value)

    def test_a_plugin_is_registered_whole_or_not_at_all(self, plug):
        registry = Registry([plug("lynx-half", lynx_strategies=[strategy("fine"), int])])
        assert "fine" not in registry.strategies
        assert len(registry.broken) == 1

    def test_a_strategy_without_a_default_name(self, plug):
        class Nameless(lynx.SelectionStrategy):
            name: str

        registry = Registry([plug("lynx-nameless", lynx_strategies=[Nameless])])
        assert "Nameless needs a default name" in registry.broken[0].reason

    @pytest.mark.parametrize("option", ["strategy", "min_tokens", "max_decode_q", "layers", "experts", "evidence"])
    def test_options_that_attach_takes_itself_are_reserved(self, plug, option):
        greedy = strategy("greedy", **{option: (int, 1)})
        registry = Registry([plug("lynx-greedy", lynx_strategies=[greedy])])
        assert f"strategy 'greedy' has options that attach() takes itself: {option}" in registry.broken[0].reason
        assert "greedy" not in registry.strategies

    def test_the_reserved_options_are_those_of_the_configuration(self):
        assert set(lynx.Config.model_fields) == plugins._RESERVED_OPTIONS


class TestDuplicates:
    @pytest.mark.parametrize("strict", [True, False])
    def test_two_packages_with_one_name(self, plug, strict):
        first = plug("lynx-one", lynx_strategies=[strategy("same")])
        second = plug("lynx-two", lynx_strategies=[strategy("same")])
        with pytest.raises(lynx.PluginError, match="strategy 'same' is registered by both lynx-one and lynx-two"):
            Registry([first, second], strict)

    def test_a_built_in_name_is_taken(self, plug):
        mine = plug("lynx-mine", lynx_strategies=[strategy("batch-union")])
        with pytest.raises(lynx.PluginError, match=f"'batch-union' is registered by both {BUILT_IN} and lynx-mine"):
            Registry([mine])

    @pytest.mark.parametrize("strict", [True, False])
    def test_two_adapters_with_one_name(self, plug, strict):
        first, second = plug("lynx-one", lynx_adapters=[Mine("same")]), plug("lynx-two", lynx_adapters=[Mine("same")])
        with pytest.raises(lynx.PluginError, match="adapter 'same' is registered by both lynx-one and lynx-two"):
            Registry([first, second], strict)
        taken = plug("lynx-three", lynx_adapters=[Mine("transformers")])
        with pytest.raises(lynx.PluginError, match=f"'transformers' is registered by both {BUILT_IN} and lynx-three"):
            Registry([taken], strict)

    def test_one_package_with_one_name_twice(self, plug):
        mine = plug("lynx-mine", lynx_strategies=[strategy("same"), strategy("same")])
        registry = Registry([mine])
        assert registry.broken[0].reason == "PluginError: it registers strategy 'same' twice"
        assert "same" not in registry.strategies


class TestAdapterThatFails:
    """Every model is put to every plugin's adapters: one that cannot look at it is not in the way."""

    @pytest.fixture
    def installed(self, plug, monkeypatch):
        def installed(strict):
            made = Registry([plug("lynx-mine", lynx_adapters=[Mine(fault=ValueError("not like this"))])], strict)
            monkeypatch.setattr(attachment, "registry", lambda: made)

        return installed

    def test_it_is_passed_over_and_told(self, installed, caplog):
        installed(strict=False)
        with caplog.at_level(logging.ERROR, "lynx"), lynx.attach(lynx.load_reference_model().model, "exact") as handle:
            assert handle.adapter == "transformers"
        (record,) = caplog.records
        assert record.getMessage() == (
            "lynx.adapter_failed adapter=mine package=lynx-mine reason=ValueError: not like this"
        )

    def test_strict_mode_raises(self, installed):
        installed(strict=True)
        with pytest.raises(lynx.PluginError, match="adapter 'mine' of lynx-mine failed to look at a model: not like"):
            lynx.attach(torch.nn.Linear(2, 2), "exact")


def test_every_hook_has_a_test():
    """Each hook is implemented by a plugin of some test here, which does more than fail."""
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    given = {
        keyword.arg
        for test in tests
        for call in ast.walk(test)
        if isinstance(call, ast.Call)
        for keyword in call.keywords
    }
    hooks = {name for name in vars(hookspecs) if name.startswith("lynx_")}
    assert hooks
    assert hooks <= given
    for name in hooks:
        assert inspect.getdoc(getattr(hookspecs, name))


def test_the_registry_is_loaded_once():
    assert plugins.registry() is plugins.registry()
