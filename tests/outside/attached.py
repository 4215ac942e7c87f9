"""A plugin for pytest: every model that a test makes has Lynx attached, in this process only.

A model is attached when the outermost constructor or `from_pretrained` returns it; a deep copy of it is attached by
being one, and has no handle to be counted by. After each test the counters are read, and Lynx is taken off again.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import transformers

import lynx


@dataclass
class Attacher:
    """Attaches what is built, and knows whether something is still being built."""

    strategy: dict[str, Any]
    options: dict[str, Any]
    depth: int = 0
    handles: list[lynx.Handle] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def wrap_constructor(self, cls: type[Any]) -> None:
        """Attach at the end of a class's own `__init__`, unless it was called by another one."""
        if "__init__" not in vars(cls):
            return
        construct = vars(cls)["__init__"]

        @functools.wraps(construct)
        def __init__(model: Any, *args: Any, **kwargs: Any) -> None:
            self.depth += 1
            try:
                construct(model, *args, **kwargs)
            finally:
                self.depth -= 1
            self.take(model)

        cls.__init__ = __init__

    def wrap_loader(self) -> None:
        """Attach at the end of `from_pretrained`, which builds on the meta device and fills the model later."""
        load = vars(transformers.PreTrainedModel)["from_pretrained"].__func__

        @functools.wraps(load)
        def from_pretrained(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            try:
                loaded = load(cls, *args, **kwargs)
            finally:
                self.depth -= 1
            self.take(loaded[0] if isinstance(loaded, tuple) else loaded)
            return loaded

        transformers.PreTrainedModel.from_pretrained = classmethod(from_pretrained)

    def wrap_later_classes(self) -> None:
        """Classes that tests define get the same constructor."""
        announce = vars(transformers.PreTrainedModel)["__init_subclass__"].__func__

        @functools.wraps(announce)
        def __init_subclass__(cls: type[Any], **kwargs: Any) -> None:
            announce(cls, **kwargs)
            self.wrap_constructor(cls)

        transformers.PreTrainedModel.__init_subclass__ = classmethod(__init_subclass__)

    def take(self, model: Any) -> None:
        """Attach, if this is the outermost model; remember a refusal."""
        if self.depth:
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the model is in training mode", lynx.LynxWarning)
            try:
                self.handles.append(lynx.attach(model, self.strategy, **self.options))
            except lynx.LynxError as refusal:
                self.refused.append(f"{type(model).__name__}: {refusal}")

    def release(self) -> dict[str, Any]:
        """Read what the handles counted and take Lynx off."""
        handles, self.handles = self.handles, []
        refused, self.refused = self.refused, []
        counted: dict[str, Any] = {"attached": len(handles), "refused": refused, "prefill": 0, "decode": 0}
        for handle in handles:
            report = handle.report()
            for phase in ("prefill", "decode"):
                if phase in report.total:
                    counted[phase] += report.total[phase].steps - report.total[phase].exact_steps
            handle.detach()
        return counted


_ATTACHER = pytest.StashKey[Attacher]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--attach", type=json.loads, required=True, help="JSON: a strategy, and options of lynx.attach")


def pytest_configure(config: pytest.Config) -> None:
    attacher = config.stash[_ATTACHER] = Attacher(**config.option.attach)
    attacher.wrap_loader()
    attacher.wrap_later_classes()
    for cls in _subclasses(transformers.PreTrainedModel):
        attacher.wrap_constructor(cls)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Count around the test itself; what cannot be taken off again fails it."""
    attacher = item.config.stash[_ATTACHER]
    try:
        return (yield)
    finally:
        item.user_properties.append(("lynx", attacher.release()))


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for below in cls.__subclasses__():
        yield below
        yield from _subclasses(below)
