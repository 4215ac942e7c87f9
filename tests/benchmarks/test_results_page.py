"""docs/results.md says what benchmarks/results/tuned*.json say."""

import copy
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page() -> ModuleType:
    return load_page("results")


def load_page(name: str) -> ModuleType:
    """Load a script that makes a page; it finds what it shares with others beside it."""
    spec = importlib.util.spec_from_file_location(f"{name}_page", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def standins() -> ModuleType:
    return load_page("standins")


def test_the_page_of_stand_ins_is_made_from_the_results(standins: ModuleType) -> None:
    found = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in standins.RESULTS.items()}
    assert all("+changes" not in result["commit"] for result in found.values())
    text = standins.PAGE.read_text(encoding="utf-8")
    assert standins.filled(text, found) == text
    worse = copy.deepcopy(found)
    worse["reference"]["strategies"][0]["change"] = {"value": 0.5, "low": 0.4, "high": 0.6}
    label = worse["reference"]["strategies"][0]["label"]
    assert f"`{label}` by 0.5" in standins.filled(text, worse)


@pytest.fixture
def result() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / "tuned.json").read_text(encoding="utf-8"))


def test_the_page_is_made_from_the_results(page: ModuleType) -> None:
    found = PAGE
    for prefix, name in page.FILES.items():
        path = ROOT / "benchmarks" / "results" / name
        # one model ships, the other may not have been measured
        if prefix and not path.exists():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["complete"]
        assert "+changes" not in result["commit"]
        found = page.filled(found, result, prefix)
    assert found == PAGE


def test_another_result_makes_another_page(page: ModuleType, result: dict[str, Any]) -> None:
    worse = copy.deepcopy(result)
    worse["rows"][0]["promise"] = {
        "chosen": {},
        "verified": {"value": 0.0005, "low": 0.0004, "high": 0.0009, "share": 0.6},
        "judged": {"value": 0.5, "low": 0.4, "high": 0.6, "share": 0.6},
    }
    found = page.filled(PAGE, worse)
    seed = worse["rows"][0]["seed"]
    assert f"| {seed} | 60.0% | 0.0005 (0.0004 to 0.0009) | 0.5 (0.4 to 0.6) | no |" in found
    assert "and was contradicted 1 times" in found
    worse["rows"][0]["promise"]["judged"] |= {"value": 0.0011, "low": 0.0009}
    assert "| 0.0011 (0.0009 to 0.6) | not contradicted |" in page.filled(PAGE, worse)
    worse["rows"][0]["promise"] = {"chosen": None}
    assert "none was verified" in page.filled(PAGE, worse)


def test_places_are_not_lost(page: ModuleType, result: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="0 places for 'equal'"):
        page.filled("# Results", result)
