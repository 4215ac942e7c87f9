"""docs/families.md says what every MoE family of transformers does under Lynx; here each is tried again."""

import importlib.util
import re
import warnings
from pathlib import Path

import pytest
import transformers
import zoo
import zoo_checks
from zoo_options import CLASSES, DENOISING, NO_DECODE, NOT_MOE, OPTIONS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")


def _script():
    spec = importlib.util.spec_from_file_location("families_page", ROOT / "docs" / "families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = _script()
OF_THIS_VERSION = script.described(PAGE) == transformers.__version__
ROWS = {}


def _row(family):
    if family not in ROWS:
        ROWS[family] = zoo_checks.check(family)
    return ROWS[family]


@pytest.mark.parametrize("family", zoo.families())
def test_family(family):
    """Under another version than the page's, what cannot be built from these sizes is said and does not fail."""
    try:
        row = _row(family)
    except Exception as error:
        if OF_THIS_VERSION:
            raise
        warnings.warn(f"not classified: {family} of transformers {transformers.__version__}: {error}", stacklevel=1)
        return
    if row.refused:
        reason = re.match(r"\w+: .*: |\w+: it has experts and no router", row.refused)
        assert reason or not OF_THIS_VERSION, f"it is said what was found, and not what is wrong with it: {row.refused}"
    else:
        assert row.exact
        assert row.selects
        assert row.layers > 0
        assert row.lynx == "equal" or "does not go through transformers' experts registry" in row.lynx
    if f"| `{family}` |" not in PAGE:
        assert not OF_THIS_VERSION, "run: python docs/families.py"
        warnings.warn(f"{family} of transformers {transformers.__version__} is not in docs/families.md", stacklevel=1)


@pytest.mark.skipif(not OF_THIS_VERSION, reason="the page is of another version of transformers")
def test_page_is_what_the_script_makes():
    rows = [_row(family) for family in zoo.families()]
    assert script.filled(PAGE, rows) == PAGE, "run: python docs/families.py"
    for path in script.PLACES:
        text = path.read_text(encoding="utf-8")
        assert script.counted(text, rows) == text, "run: python docs/families.py"
    assert sum(not row.refused for row in rows) >= 60


@pytest.mark.skipif(not OF_THIS_VERSION, reason="the page is of another version of transformers")
def test_options_are_of_families_that_exist():
    assert (set(OPTIONS) | set(CLASSES) | NO_DECODE | DENOISING) <= set(zoo.families())
    assert not set(NOT_MOE) & set(zoo.families())
    assert all((zoo.MODELS / family).is_dir() for family in NOT_MOE)


def test_families_are_found_by_structure():
    """What transformers itself says of its models: whoever records a router's logits is a family."""
    recording = {
        path.parent.name
        for path in zoo.MODELS.glob("*/modeling_*.py")
        if re.search(r'"router_logits": (OutputRecorder\(|\[|\w+Router)', path.read_text(encoding="utf-8"))
    }
    assert len(recording) > 30
    assert recording - set(NOT_MOE) <= set(zoo.families())
    registered = {
        path.parent.name
        for path in zoo.MODELS.glob("*/modeling_*.py")
        if "@use_experts_implementation" in path.read_text(encoding="utf-8")
    }
    assert registered <= set(zoo.families())
    assert {"mixtral", "llama4", "dbrx"} <= set(zoo.families())


def test_models_are_tiny():
    for family in ("mixtral", "qwen3_vl_moe", "nemotron_h"):
        if family in zoo.families():
            assert sum(parameter.numel() for parameter in zoo.build(family).parameters()) < 2e6
