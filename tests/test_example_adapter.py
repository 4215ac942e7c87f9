"""The example adapter as its reader would use it: built, installed, and found through its entry point."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "examples" / "lynx-tally"

BUILD = """
import gc, pickle, weakref
import torch
import lynx

torch.set_grad_enabled(False)
torch.manual_seed(0)

def engine():
    import tally
    made = tally.Engine().eval()
    for layer in made.layers:
        torch.nn.init.normal_(layer.router.weight, std=0.5)
    for slot in range(6):
        made.read(slot, torch.randint(100, (4,)))
    return made

tokens, prompt = torch.randint(100, (8,)), torch.randint(100, (5,))
"""

SELECTS = """
made = engine()
alone, read = made.step(tokens), made.read(0, prompt)
with lynx.attach(made, "exact") as handle:
    assert handle.adapter == "tally"
    assert torch.equal(made.step(tokens), alone) and torch.equal(made.read(0, prompt), read)
with lynx.attach(made, "batch-union", top=1) as handle:
    pruned = made.step(tokens)
    total = handle.report().total["decode"]
    assert total.open_rows == 6 and total.padding_rows == 2, total
    assert total.open_active_after < total.open_active_before
    assert not torch.equal(pruned[:6], alone[:6]) and torch.equal(made.read(0, prompt), read)
    other = tokens.clone()
    other[6:] = 99 - other[6:]
    torch.testing.assert_close(made.step(other)[:6], pruned[:6])
    with handle.paused():
        assert torch.equal(made.step(tokens), alone)
    assert pickle.loads(pickle.dumps(made)).layers[0].on_route.selection.info == made.layers[0].on_route.selection.info
    handle.reset()
    called = []
    for expert in made.layers[0].experts:
        expert.register_forward_hook(lambda module, given, output: called.append(len(given[0])))
    made.busy.fill_(True)
    made.step(tokens)
    assert sum(rows > 0 for rows in called) == handle.report().layers[0].phases["decode"].active_after
    again = lynx.attach(made, "static-top", top=1)
    assert not handle.attached and again.attached
assert again.attached
again.detach()
assert torch.equal(made.step(tokens), alone)
assert all(layer.on_route is None for layer in made.layers)
print("selected")
"""

REFUSES = """
made = engine()
def refused(*arguments, **options):
    try:
        lynx.attach(made, *arguments, **options)
    except lynx.LynxError as error:
        return str(error)
assert "not for tally" in refused("exact", experts="lynx")
made.layers[1].on_route = print
assert "layers.1 has something at its seam on_route" in refused("exact")
assert "tally, vllm, sglang, transformers, pytorch" in refused.__globals__["refused_plain"]()
"""

PLAIN = """
def refused_plain():
    try:
        lynx.attach(torch.nn.Linear(2, 2), "exact")
    except lynx.UnsupportedModelError as error:
        return str(error)
"""

FORGETS = """
made = engine()
gone = weakref.ref(made)
lynx.attach(made, "exact")
del made
gc.collect()
assert gone() is None
print("forgotten")
"""

UNLOADED = """
import sys
import lynx
assert lynx.attach(lynx.load_reference_model().model, "exact").adapter == "transformers"
assert "lynx_tally" in sys.modules and "tally" not in sys.modules
print("not loaded")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Build and install the example beside this environment; return a function that runs code there."""
    folder = tmp_path_factory.mktemp("example")
    source = shutil.copytree(SOURCE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    target = folder / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*pip, "--no-build-isolation", "--target", str(target), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr

    def run(code):
        path = os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "LYNX_STRICT_PLUGINS": "1"}
        # not in the checkout: the folder `lynx` there would be found before the installed one
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=target, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_it_selects(run):
    assert run(BUILD + SELECTS) == "selected\n"


def test_it_loads_no_framework_that_is_not_used_refuses_and_keeps_nothing_alive(run):
    assert run(UNLOADED + BUILD + PLAIN + REFUSES + FORGETS) == "not loaded\nforgotten\n"
