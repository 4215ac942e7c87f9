"""The command line as it was given, for results to name."""

from __future__ import annotations

import shlex
from typing import Any

import typer


def command_line(context: typer.Context) -> str:
    """Return the command with the arguments and options that differ from their defaults."""
    words = context.command_path.split()
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if value is None or value == parameter.get_default(context):
            continue
        values: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
        for each in values:
            if parameter.param_type_name == "argument":
                words.append(str(each))
            else:
                words += [parameter.opts[0]] if each is True else [parameter.opts[0], str(each)]
    return shlex.join(words)


def given(context: typer.Context, *names: str) -> list[str]:
    """Return those of some options that stand on the command line, as they are written there."""
    options = {str(parameter.name): parameter.opts[0] for parameter in context.command.params}
    return [
        options[name] for name in names if getattr(context.get_parameter_source(name), "name", None) == "COMMANDLINE"
    ]
