"""The example plugin as its reader would use it: built, installed, and found through its entry point."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from lynx.strategies import lynx_strategies

SOURCE = Path(__file__).parents[1] / "examples" / "lynx-coin"

USE = """
import json
import lynx
from lynx.plugins import registry

def refused(**options):
    try:
        lynx.make_strategy("coin", **options)
    except lynx.ConfigError as error:
        return str(error)

coin = lynx.make_strategy("coin", heads=3)
config = lynx.load_config({"strategy": {"name": "phase-aware", "decode": {"name": "coin", "heads": 5}}})
found = registry().strategies["coin"]
print(json.dumps({
    "package": found.package,
    "module": found.cls.__module__,
    "broken": [plugin.reason for plugin in registry().broken],
    "built-ins": sum(other.package == "lynx-moe" for other in registry().strategies.values()),
    "options": coin.model_dump(),
    "default": lynx.make_strategy("coin").heads,
    "nested": config.strategy.decode.heads,
    "round trip": lynx.load_config(config.dump()) == config,
    "too few": refused(heads=0),
    "unknown": refused(head=3),
}))
"""

CHECK = """
import lynx
from lynx.plugins import registry
from lynx.testing import check_strategy
check_strategy(registry().strategy("coin"))
check_strategy(lynx.make_strategy("coin", heads=3, refill="none"))
print("kept the contract")
"""

SELECT = """
import lynx
from lynx.selection import LayerSelection
from lynx.testing import make_routing
routing = make_routing(tokens=8, experts=16, top_k=4)
layer = lynx.LayerInfo("layer", 0, 16, 4, routing.rule)
active = LayerSelection(layer, lynx.make_strategy("coin", heads=4))(routing).ids.unique().tolist()
count = routing.own.sum(0)
best = set(routing.logits.argmax(-1).tolist())
assert active == sorted({e for e in range(16) if count[e] >= 4} | best), active
assert len(active) < len(routing.ids.unique())
print("selected")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the example in a copy of its folder."""
    folder = tmp_path_factory.mktemp("example")
    source = shutil.copytree(SOURCE, folder / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    command = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("lynx_coin-*.whl")
    return wheel


@pytest.fixture(scope="module")
def run(wheel):
    """Install the wheel beside this environment and return a function that runs code there."""
    target = wheel.parent / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    command = [*pip, "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    def run(code):
        path = os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "LYNX_STRICT_PLUGINS": "1"}
        command = [sys.executable, "-c", code]
        # not in the checkout: the folder `lynx` there would be found before the installed one
        done = subprocess.run(command, capture_output=True, text=True, cwd=target, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_it_is_a_distribution_of_its_own(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "lynx_coin.py" in names
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert zipfile.ZipFile(wheel).read(entry_points).decode().split() == ["[lynx]", "coin", "=", "lynx_coin"]
    assert not any(name.startswith("lynx/") for name in names)


def test_it_is_small():
    lines = [line for line in (SOURCE / "lynx_coin.py").read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(lines) < 30
    tree = ast.parse((SOURCE / "lynx_coin.py").read_text(encoding="utf-8"))
    assert len([node for node in tree.body if isinstance(node, ast.ClassDef)]) == 1
    assert "lynx-moe" in tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]["dependencies"][0]


def test_it_is_found_and_used_by_name(run):
    told = json.loads(run(USE))
    assert told["package"] == "lynx-coin"
    assert told["module"] == "lynx_coin"
    assert told["broken"] == []
    assert told["built-ins"] == len(lynx_strategies())
    assert told["options"] == {"name": "coin", "protect": 1, "refill": "re-pick", "floor": 0.0, "heads": 3}
    assert told["default"] == 2
    assert told["nested"] == 5
    assert told["round trip"] is True
    assert told["too few"].startswith("strategy 'coin': heads: Input should be greater than or equal to 1")
    assert "no option 'head'. Did you mean 'heads'?" in told["unknown"]


def test_it_selects(run):
    assert run(SELECT) == "selected\n"


def test_it_keeps_the_contract(run):
    assert run(CHECK) == "kept the contract\n"


def test_without_it_the_name_is_unknown():
    code = "import lynx\ntry: lynx.make_strategy('coin')\nexcept lynx.ConfigError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SOURCE.parent)
    assert done.stdout.startswith("unknown strategy 'coin'.")
