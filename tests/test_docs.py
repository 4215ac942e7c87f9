"""The documentation: its code runs, its configurations load, and its tables say what the code says."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy
import pytest
import typer
import yaml

import lynx
from lynx import hookspecs
from lynx.adapter import Adapter, Installation
from lynx.cli import app
from lynx.demo.table import _COLUMNS
from lynx.plugins import BUILT_IN, registry
from lynx.testing.contract import INVARIANTS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
STRATEGIES = {name: found.cls for name, found in registry().strategies.items() if found.package == BUILT_IN}
NOT_RUN = {"docs/transformers.md": 1, "docs/adapters/vllm.md": 1}
"""Blocks that cannot run in a test, by page; here: a model is downloaded, and vLLM is needed (tests/vllm has it)."""

_FENCE = re.compile(r"^```(?P<info>[^`\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_SNIPPET = re.compile(r"^--8<--\n(?P<path>.+)\n--8<--$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block.

    Attributes:
        info: What stands behind the opening fence.
        code: Its text, with snippets put in.
        line: Line of the page on which the text begins.
    """

    info: str
    code: str
    line: int


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _blocks(page: Path, *infos: str) -> list[Block]:
    text = _text(page)
    found = []
    for match in _FENCE.finditer(text):
        code = _SNIPPET.sub(lambda snippet: _text(ROOT / snippet["path"]), match["code"])
        found.append(Block(match["info"].strip(), code, text.count("\n", 0, match.start("code")) + 1))
    return [block for block in found if block.info in infos]


def _section(page: Path, heading: str) -> str:
    """Return a section of any level up to the next heading of that level or above, fenced blocks left out."""
    text = _FENCE.sub("", _text(page))
    start = re.search(rf"^(#+) {re.escape(heading)}$", text, re.MULTILINE)
    assert start, f"{_name(page)} has no section {heading!r}"
    rest = text[start.end() :]
    end = re.search(rf"^#{{1,{len(start[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def _table(text: str, header: str) -> list[list[str]]:
    """Return the rows of the first table whose first column is called ``header``, without Markdown code marks."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(f"| {header} |"):
            break
    else:
        raise AssertionError(f"no table with the first column {header!r}")
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
        rows.append([cell.replace("`", "").strip() for cell in cells])
    return rows


def _default(field: Any) -> str:
    return "required" if field.is_required() else str(field.default)


def _sources() -> str:
    return "\n".join(
        _text(path)
        for room in ("lynx", "strategies", "adapters", "kernels")
        for path in sorted((ROOT / room).rglob("*.py"))
    )


@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page, "python")], ids=_name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(f"docs_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LYNX_CONFIG", raising=False)
    for block in _blocks(page, "python"):
        # blank lines, so that a traceback names the line of the page
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec", dont_inherit=True)
        exec(code, module.__dict__)


def test_blocks_that_are_not_run_are_few() -> None:
    counts = {_name(page): len(_blocks(page, "python {.no-run}")) for page in PAGES}
    assert {page: count for page, count in counts.items() if count} == NOT_RUN


def test_fences_are_of_known_kinds() -> None:
    kinds = {match["info"].strip() for page in PAGES for match in _FENCE.finditer(_text(page))}
    assert kinds <= {"python", "python {.no-run}", "yaml", "bash", "toml", "text"}


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(block.code, id=f"{_name(page)}:{block.line}")
        for page in PAGES
        for block in _blocks(page, "yaml")
        if "strategy" in (yaml.safe_load(block.code) or {})
    ],
)
def test_yaml_blocks_load(source: str, tmp_path: Path) -> None:
    path = tmp_path / "lynx.yaml"
    path.write_text(source, encoding="utf-8")
    config = lynx.load_config(path)
    assert lynx.load_config(config.dump()) == config


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_has_page_and_rows(name: str) -> None:
    page = DOCS / "strategies" / f"{name}.md"
    assert _text(page).startswith(f"# {name}\n")
    for heading in ("Options", "When to use it", "Example", "Source"):
        _section(page, heading)
    assert any(name in str(block.code) for block in _blocks(page, "python"))
    assert any(name in str(block.code) for block in _blocks(page, "yaml"))
    rows = [row[0] for row in _table(_text(DOCS / "strategies" / "index.md"), "name")]
    assert f"[{name}]({name}.md)" in rows
    assert f"- [{name}](docs/strategies/{name}.md): " in _text(ROOT / "README.md")
    assert f"strategies/{name}.md" in _text(ROOT / "mkdocs.yml")


@pytest.mark.parametrize("name", STRATEGIES)
def test_options_of_strategies(name: str) -> None:
    rows = _table(_section(DOCS / "strategies" / f"{name}.md", "Options"), "option")
    options = {option: _default(field) for option, field in STRATEGIES[name].model_fields.items() if option != "name"}
    assert {row[0]: row[1] for row in rows} == options


@pytest.mark.parametrize("name", STRATEGIES)
def test_knobs_of_strategies(name: str) -> None:
    (row,) = (row for row in _table(_text(DOCS / "strategies" / "index.md"), "name") if row[0].startswith(f"[{name}]"))
    knob = STRATEGIES[name].knob
    if knob is None:
        assert row[3] in ("none", "that of its strategies")
    else:
        ends = [end if isinstance(end, str) else f"{end:g}" for end in (knob.fewest, knob.full)]
        assert row[3].split(", ")[0] == f"{knob.option}: {' … '.join(ends)}"


def test_example_batch_keeps_what_the_page_says() -> None:
    page = DOCS / "strategies" / "index.md"
    space: dict[str, Any] = {}
    for block in _blocks(page, "python"):
        exec(compile(block.code, str(page), "exec", dont_inherit=True), space)
    for setting, kept in _table(_section(page, "One batch, every strategy"), "setting"):
        name, *options = setting.split()
        values = {key: yaml.safe_load(value) for key, value in (option.split("=") for option in options)}
        assert space["kept"](name, **values) == [int(expert) for expert in kept.split()], setting


def test_hooks_are_documented_with_their_arguments() -> None:
    manager = pluggy.PluginManager(hookspecs.GROUP)
    manager.add_hookspecs(hookspecs)
    hooks = {name: getattr(hookspecs, name) for name in vars(manager.hook) if not name.startswith("_")}
    assert hooks
    headings = re.findall(r"^## (lynx_.*)$", _text(DOCS / "reference" / "hooks.md"), re.MULTILINE)
    expected = [f"{name}({', '.join(inspect.signature(hook).parameters)})" for name, hook in hooks.items()]
    assert sorted(headings) == sorted(expected)
    for name in hooks:
        assert f"::: lynx.hookspecs.{name}\n" in _text(DOCS / "reference" / "hooks.md")


@pytest.mark.parametrize(
    ("header", "interface"), [("method of the adapter", Adapter), ("method of the installation", Installation)]
)
def test_interfaces_of_adapters_are_documented_with_their_arguments(header: str, interface: type) -> None:
    methods = {
        name: member for name, member in vars(interface).items() if inspect.isfunction(member) and name[0] != "_"
    }
    expected = [f"{name}({', '.join([*inspect.signature(method).parameters][1:])})" for name, method in methods.items()]
    assert [row[0] for row in _table(_text(DOCS / "write-an-adapter.md"), header)] == expected


def test_environment_variables_are_documented() -> None:
    rows = _table(_section(DOCS / "configuration.md", "Environment variables"), "variable")
    assert {row[0] for row in rows} == set(re.findall(r"\bLYNX_[A-Z_]+\b", _sources()))


def test_configuration_keys_are_documented() -> None:
    rows = _table(_section(DOCS / "configuration.md", "Keys"), "key")
    assert {row[0]: row[1] for row in rows} == {key: _default(field) for key, field in lynx.Config.model_fields.items()}


def test_log_events_are_documented() -> None:
    events = set(re.findall(r'logger\.\w+\(\s*"(lynx\.[a-z_]+)"', _sources()))
    assert events
    assert {row[0] for row in _table(_section(DOCS / "configuration.md", "Logging"), "event")} == events


def test_commands_and_options_are_documented() -> None:
    page = DOCS / "command-line.md"
    program: Any = typer.main.get_command(app)
    assert {f"lynx {name}" for name in program.commands} == set(
        re.findall(r"^## (lynx .*)$", _text(page), re.MULTILINE)
    )
    for name, command in program.commands.items():
        rows = _table(_section(page, f"lynx {name}"), "option" if name in ("demo", "doctor") else "argument or option")
        asked = {row[0].split()[0] for row in rows}
        given = {
            parameter.opts[0] if parameter.param_type_name == "option" else str(parameter.name).upper()
            for parameter in command.params
            if "--help" not in parameter.opts
        }
        assert asked == given, name
    assert "--debug" in {row[0] for row in _table(_text(page), "option")}


def test_public_names_are_in_the_reference() -> None:
    listed = set(re.findall(r"^::: lynx\.(\w+)$", "\n".join(_text(p) for p in DOCS.rglob("*.md")), re.MULTILINE))
    errors = {name for name in lynx.__all__ if getattr(lynx, name) in vars(sys.modules["lynx.errors"]).values()}
    assert "errors" in listed
    assert set(lynx.__all__) - errors - {"__version__", "hookimpl"} <= listed


def test_types_are_documented() -> None:
    page = DOCS / "how-it-works.md"
    assert [row[0] for row in _table(_text(page), "field")] == [
        field.name for field in fields(lynx.Routing) if not field.name.startswith("_")
    ]
    assert [row[0] for row in _table(_text(page), "role")] == [role.name for role in lynx.Role]
    for row in _table(_text(DOCS / "write-a-strategy.md"), "property"):
        for name in row[0].split(", "):
            assert hasattr(lynx.Routing, name.split("(")[0]), name


def test_families_are_those_that_are_tested() -> None:
    spec = importlib.util.spec_from_file_location("families", ROOT / "tests" / "adapters" / "families.py")
    assert spec is not None
    assert spec.loader is not None
    families = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = families
    try:
        spec.loader.exec_module(families)
    finally:
        del sys.modules[spec.name]
    rows = _table(_section(DOCS / "transformers.md", "Families"), "family")
    assert {row[1]: row[3].startswith("yes") for row in rows} == {
        name: family.repick for name, family in families.FAMILIES.items()
    }


def test_invariants_are_documented() -> None:
    names = {invariant.__name__.replace("_", "-") for invariant in INVARIANTS}
    assert {row[0] for row in _table(_text(DOCS / "write-a-strategy.md"), "invariant")} == names


def test_columns_of_the_demo_are_documented() -> None:
    rows = _table(_section(DOCS / "measuring.md", "What `lynx demo` prints"), "column")
    assert [row[0] for row in rows] == list(_COLUMNS)


def test_links_of_files_outside_the_site_exist() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", _text(page)):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{_name(page)}: {target}"
