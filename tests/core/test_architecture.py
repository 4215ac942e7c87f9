"""The house as architecture.md draws it: who imports whom, what is packaged, what is public."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lynx
import lynx.testing

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent  # not the checkout, whose folder `lynx` would be found before the installed one
ROOMS = {"lynx": "lynx", "lynx.strategies": "strategies", "lynx.kernels": "kernels", "lynx.adapters": "adapters"}
ON_TOP = {
    "lynx.calibration",
    "lynx.cli",
    "lynx.demo",
    "lynx.measuring",
    "lynx.tuning",
    "lynx.testing",
    "lynx.reference_model",
}
CORE_TYPES = {"lynx.config", "lynx.errors", "lynx.hookspecs", "lynx.keep", "lynx.routing", "lynx.strategy"}


def python_files(folder):
    """Every Python file below, without following the symlinks to the rooms."""
    for path, folders, files in os.walk(ROOT / folder):
        folders[:] = [
            f for f in folders if f not in ("__pycache__", "build", ".venv") and not (Path(path) / f).is_symlink()
        ]
        yield from (Path(path) / file for file in files if file.endswith(".py"))


def modules():
    """Every module of the library, by its name."""
    found = {}
    for package, folder in ROOMS.items():
        for file in python_files(folder):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = file
    return found


MODULES = modules()


def imports(module, at_import_only=False):
    """The modules that a module imports, by ast; optionally only those that importing it imports."""
    found = set()

    def visit(nodes):
        for node in nodes:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} has a relative import"
                # `from lynx.a import b` may name the module lynx.a.b
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found.update(name if name in MODULES else node.module for name in names)
            elif at_import_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            elif at_import_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                visit(node.orelse)
            else:
                visit(ast.iter_child_nodes(node))

    visit(ast.parse(MODULES[module].read_text(encoding="utf-8")).body)
    return found


def in_package(name, packages):
    return any(name == package or name.startswith(package + ".") for package in packages)


def room_of(module):
    return next((room for room in ROOMS if room != "lynx" and in_package(module, [room])), "lynx")


def of_lynx(names):
    return {name for name in names if in_package(name, ["lynx"])}


def outside(names):
    return {name.split(".")[0] for name in names if not in_package(name, ["lynx"])} - sys.stdlib_module_names


def test_every_room_is_looked_at():
    assert {room_of(module) for module in MODULES} == set(ROOMS)
    assert {
        "lynx.routing",
        "lynx.strategies.batch_union",
        "lynx.kernels.experts",
        "lynx.adapters.transformers.adapter",
    } <= set(MODULES)
    assert "lynx.strategy" in imports("lynx.strategies.batch_union")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_who_imports_whom(module):
    names = imports(module)
    if room_of(module) == "lynx.kernels":
        assert outside(names) <= {"torch", "triton"}
        assert all(in_package(name, ["lynx.kernels"]) for name in of_lynx(names))
    elif room_of(module) == "lynx.strategies":
        assert outside(names) <= {"torch", "pydantic"}
        assert all(name in CORE_TYPES or in_package(name, ["lynx.strategies"]) for name in of_lynx(names))
    elif room_of(module) == "lynx.adapters":
        assert not {name for name in of_lynx(names) if in_package(name, {"lynx.strategies", *ON_TOP})}
    else:
        # strategies and adapters only through the plugin registry, which knows them as strings
        assert not {name for name in of_lynx(names) if in_package(name, {"lynx.strategies", "lynx.adapters"})}
        if not in_package(module, ON_TOP) and module not in ("lynx", "lynx.__main__"):
            assert not {name for name in of_lynx(names) if in_package(name, ON_TOP)}
            assert not outside(names) & {"transformers", "vllm", "sglang", "triton"}


def test_the_registry_knows_the_rooms_as_strings():
    strings = {
        node.value
        for node in ast.walk(ast.parse(MODULES["lynx.plugins"].read_text()))
        if isinstance(node, ast.Constant)
    }
    assert {"lynx.strategies", "lynx.adapters"} <= strings


def test_bare_room_names_are_imported_nowhere():
    for module in MODULES:
        assert not {name.split(".")[0] for name in imports(module)} & {"strategies", "kernels", "adapters"}, module


def test_no_circles():
    arrows = {module: of_lynx(imports(module, at_import_only=True)) - {module} for module in MODULES}
    done, path = set(), []

    def walk(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for other in arrows.get(module, ()):
            # a package's own modules import it only by standing in it
            if not module.startswith(other + "."):
                walk(other)
        path.pop()
        done.add(module)

    for module in MODULES:
        walk(module)
    assert done >= set(MODULES)


def test_packages_are_those_of_the_tree():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = {module for module, file in MODULES.items() if file.name == "__init__.py"}
    assert sorted(settings["packages"]) == sorted(packages)
    assert settings["package-dir"] == ROOMS
    for package, folder in ROOMS.items():
        if package != "lynx":
            link = ROOT / "lynx" / folder
            assert link.is_symlink()
            assert os.readlink(link) == f"../{folder}"


def test_no_file_is_long():
    for folder in ("lynx", "strategies", "kernels", "adapters", "tests", "examples", "benchmarks", "recipes"):
        for file in python_files(folder):
            lines = len(file.read_text(encoding="utf-8").splitlines())
            assert lines <= 400, f"{file.relative_to(ROOT)} has {lines} lines"


def test_one_public_class_per_strategy_file():
    for module, file in MODULES.items():
        if room_of(module) == "lynx.strategies" and file.name != "__init__.py":
            classes = [n.name for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef)]
            assert len([name for name in classes if not name.startswith("_")]) == 1, module


def test_importing_lynx_is_silent_and_loads_nothing_heavy():
    code = (
        "import sys, lynx\n"
        "heavy = {'torch', 'transformers', 'vllm', 'triton', 'numpy', 'pydantic', 'rich', 'typer', 'hypothesis'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert lynx.__version__ and 'attach' in dir(lynx)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=HERE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_strategy_needs_no_host():
    """The core and the strategies load torch, and no framework that hosts models."""
    code = (
        "import sys, lynx\n"
        "from lynx.strategies import BatchUnion\n"
        "lynx.Routing, lynx.SelectionStrategy\n"
        "assert not {'transformers', 'vllm', 'triton'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_public_names():
    assert lynx.__all__ == [
        "AttachError",
        "Config",
        "ConfigError",
        "Handle",
        "Keep",
        "Knob",
        "LayerFilter",
        "LayerInfo",
        "LynxError",
        "LynxWarning",
        "MeasureError",
        "MoELayer",
        "MoESpec",
        "Phase",
        "PluginError",
        "ReferenceModel",
        "Report",
        "Role",
        "Routing",
        "Selection",
        "SelectionStrategy",
        "StandIns",
        "StrategyError",
        "UnsupportedModelError",
        "WeightRule",
        "Wrapper",
        "__version__",
        "attach",
        "detach",
        "handle_of",
        "hookimpl",
        "load_config",
        "load_reference_model",
        "make_strategy",
        "prune",
        "select",
        "step",
    ]
    assert lynx.testing.__all__ == ["ContractViolation", "check_strategy", "make_routing"]
    assert set(lynx._HOME) == set(lynx.__all__) - {"__version__"}
    for name in lynx.__all__:
        assert getattr(lynx, name) is not None
    assert set(lynx.__all__) <= set(dir(lynx))
    with pytest.raises(AttributeError, match="module 'lynx' has no attribute 'prun'"):
        lynx.prun  # noqa: B018


def test_the_hooks_are_the_whole_extension_surface():
    from lynx import hookspecs

    hooks = [name for name in vars(hookspecs) if name.startswith("lynx_")]
    assert hooks == ["lynx_strategies", "lynx_adapters"]
