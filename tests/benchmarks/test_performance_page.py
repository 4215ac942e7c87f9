"""docs/performance.md says what the results say."""

import copy
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = sorted(path for name in ("kernels", "decode") for path in (ROOT / "benchmarks" / "results").glob(f"{name}_*"))
# What the page's own words may count: parts of the active set, bytes of a copy.
WORDS = {"3/4", "1/2", "1/4", "2n"}


@pytest.fixture(scope="module")
def performance() -> ModuleType:
    spec = importlib.util.spec_from_file_location("performance_page", ROOT / "docs" / "performance.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bare(performance: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page without results."""
    return performance.filled(PAGE.read_text(encoding="utf-8"), tmp_path_factory.mktemp("nothing"))


def figures(text: str) -> set[str]:
    """The words with digits in them, outside of code."""
    plain = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    return set(re.findall(r"[\w/.,%]*\d[\w/.,%]*", plain))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_are_complete(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["complete"]
    assert result["cases"]["missing"] == 0
    assert len(result["commit"].partition("+")[0]) == 40
    if result["device"] == "cpu":
        assert {row.get("route_run_by", "torch") for row in result["rows"]} == {"torch"}


def test_page_is_what_the_script_makes(performance: ModuleType) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert performance.filled(page) == page, "run: python docs/performance.py"


def test_page_says_whether_it_knows_a_gpu(performance: ModuleType) -> None:
    measured = (ROOT / "benchmarks" / "results" / "kernels_cuda.json").exists()
    assert (performance.STILL_TO_COME in PAGE.read_text(encoding="utf-8")) == (not measured)


def test_page_holds_no_figures_of_its_own(bare: str) -> None:
    """Without results the page has no figure left: none was written by hand."""
    assert "---:" not in bare
    assert {word.strip(".,") for word in figures(bare)} <= WORDS


@pytest.mark.parametrize("claim", ["1.3x", "a third faster, 30%", "| 8 | 2.0 |", "12 GB/s", "in 4 ms"])
def test_a_figure_written_by_hand_is_seen(bare: str, claim: str) -> None:
    assert not {word.strip(".,") for word in figures(bare.replace("## GPU", f"{claim}\n\n## GPU"))} <= WORDS


def test_page_of_a_cpu(performance: ModuleType, toys: Path) -> None:
    page = performance.filled(PAGE.read_text(encoding="utf-8"), toys)
    cpu = page.partition("<!-- cpu:start -->")[2].partition("<!-- cpu:end -->")[0]
    assert performance.STILL_TO_COME in page
    assert "not complete" not in cpu
    assert "nothing protected: for time only, not a setting to use" in cpu
    assert "8 copies). Experts run by `loop`; route by torch." in cpu
    assert "- `vllm_fused`: not available here: vllm is not installed, in 4 rows." in cpu
    assert "| 4 | plain | " in cpu
    assert "plain with `eager`, `grouped_mm`, `batched_mm`" in cpu
    assert "`top-budget protect=1`, budget of half the active" in cpu
    assert "A ratio without quartiles" not in cpu


def test_page_of_a_gpu(performance: ModuleType, toys: Path, tmp_path: Path) -> None:
    """The GPU part is filled from files of the same form as a CPU's; the figures here are made up and stay here."""
    for name, change in (("kernels", kernels_of_gpu), ("decode", decode_of_gpu)):
        made = json.loads((toys / f"{name}_cpu.json").read_text(encoding="utf-8")) | {"device": "cuda"}
        for part in made["parts"]:
            part["hardware"]["gpu"] = {"name": "no card", "memory_gib": 1, "driver": "0"}
        change(made)
        (tmp_path / f"{name}_cuda.json").write_text(json.dumps(made), encoding="utf-8")
    page = performance.filled(PAGE.read_text(encoding="utf-8"), tmp_path)
    assert performance.STILL_TO_COME not in page
    gpu = page.partition("<!-- gpu:start -->")[2].partition("<!-- gpu:end -->")[0]
    assert "layer / floor" in gpu
    assert "Targets, which are for an H200-class card and graph replay; here on one no card:" in gpu
    assert "| a limit | 1.15 | 3 of 4, 1 not replayed | 2.00 (X, skewed, T = 8) |" in gpu
    assert gpu.count("Measured on: no card") == 2
    assert "This run is not complete: 2 of 6 cases were not timed. Failed: Mixtral: no memory." in gpu
    assert "route by one launch (T = 8), two launches (T = 128)" in gpu
    # one row lost a peer, two launched one, and a star stands at the times that this gave
    assert "- `batched_mm`: left out for being slow, in 1 row." in gpu
    assert "- `grouped_mm`: launches; capturing failed: it waits, in 5 rows." in gpu
    assert re.search(r"\| [\d.]+\\\* \(`grouped_mm`\)", gpu)
    assert "| 4 | plain, graph | " in gpu
    assert re.search(r"\| 0\.50, \d+ of \d+, graph \|", gpu)  # without quartiles: stock was fastest in another mode
    assert "A ratio without quartiles is one of medians" in gpu
    assert "- `eager` in mode graph: it cannot be captured, in 1 row." in gpu
    assert "**gone**" not in gpu  # a model without times has no table


def kernels_of_gpu(result: dict[str, Any]) -> None:
    worst = {"value": 2.0, "shape": "X", "routing": "skewed", "T": 8, "fraction": 1.0}
    target = {"name": "a limit", "target": 1.15, "rows": 4, "reached": 3, "not_replayed": 1, "worst": worst}
    result |= {"targets": [target], "complete": False, "cases": {"asked": 6, "missing": 2}}
    result["failed"] = ["Mixtral: no memory"]
    for row in result["rows"]:
        row |= {"route_run_by": "one launch", "best_peer": "grouped_mm"}
        for name, figures in row["contenders"].items():
            if "us" in figures:
                figures["how"] = "launches; capturing failed: it waits" if name == "grouped_mm" else "graph"
    first = result["rows"][0]
    result["rows"].append(copy.deepcopy(first) | {"T": 128, "route_run_by": "two launches"})
    first["contenders"]["batched_mm"]["refused"] = "left out for being slow (5 times, after 2 rounds)"


def decode_of_gpu(result: dict[str, Any]) -> None:
    for row in copy.deepcopy(result["rows"]):
        row["mode"] = "graph"
        if row["setting"]:
            row |= {"ratio": {"median": 0.5}, "ms": dict.fromkeys(row["ms"], 0.001)}
        elif row["experts"] == "eager":
            row |= {"timed": False, "refused": "it cannot be captured"}
        row["fastest_stock"] = False
        result["rows"].append(row)
    result["rows"].append(copy.deepcopy(result["rows"][0]) | {"model": "gone", "timed": False, "refused": "it is gone"})
