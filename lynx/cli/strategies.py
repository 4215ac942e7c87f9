"""``lynx strategies``."""

from __future__ import annotations

import inspect
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from lynx.plugins import registry
from lynx.strategy import BaseStrategy


def show_strategies(name: str | None, as_json: bool) -> None:
    """Print all strategies, or one with its options."""
    found = registry()
    names = sorted(found.strategies) if name is None else [name]
    described = [
        _describe(found.strategy(each), found.strategies[each].package) for each in names if found.strategy(each)
    ]
    if as_json:
        print(json.dumps(described if name is None else described[0], indent=2))
        return
    console = Console()
    if name is None:
        table = Table("strategy", "what it does", "package")
        for each in described:
            table.add_row(each["name"], each["summary"], each["package"])
        console.print(table)
        return
    (one,) = described
    console.print(one["documentation"], highlight=False)
    table = Table("option", "default", "meaning", title=f"{one['name']} ({one['package']})", title_justify="left")
    for option in one["options"]:
        table.add_row(option["name"], option["default"], option["description"])
    console.print(table)


def _describe(cls: type[BaseStrategy], package: str) -> dict[str, Any]:
    documentation = (inspect.getdoc(cls) or "").replace("``", "`")
    options = []
    for name, field in cls.model_fields.items():
        if name != "name":
            default = "required" if field.is_required() else json.dumps(field.default)
            options.append({"name": name, "default": default, "description": field.description or ""})
    return {
        "name": cls.registered_name(),
        "package": package,
        "summary": documentation.split("\n\n")[0].replace("\n", " "),
        "documentation": documentation,
        "options": options,
    }
