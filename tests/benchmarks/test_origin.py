"""Where the timed code comes from, and that kernels.py does not stand in the way of Hugging Face's package."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

FOLDER = Path(__file__).parents[2] / "benchmarks"
PROBE = """
import sys
sys.path.insert(0, {folder!r})
import origin, machine, cases
import transformers.integrations.moe
from transformers.utils import is_kernels_available
print(is_kernels_available(), getattr(sys.modules["kernels"], "__file__", None))
"""
PACKAGE = """
class Anything:
    pass

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything
"""


def probe(path: list[str]) -> str:
    code = f"import sys\nsys.path[1:1] = {path!r}\n{PROBE.format(folder=str(FOLDER))}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_transformers_finds_the_package_kernels(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(PACKAGE)
    (tmp_path / "kernels-0.18.2.dist-info").mkdir()
    (tmp_path / "kernels-0.18.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n"
    )
    # also before the checkout's own folder of that name
    _, _, found = probe([str(FOLDER.parent), str(tmp_path)]).partition(" ")
    assert found == str(tmp_path / "kernels" / "__init__.py")


def test_transformers_runs_no_file_of_ours_for_it(benchmarks: Any) -> None:
    if benchmarks.origin.installed("kernels"):
        pytest.skip("the package is installed here")
    assert probe([]) == "False None"


def test_untracked_files_are_changes_and_results_are_none(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = benchmarks.origin
    monkeypatch.setattr(origin, "ROOT", tmp_path)
    monkeypatch.setenv("LYNX_BENCHMARK_COMMIT", "said")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert origin.commit() == "said"

    def git(*words: str) -> None:
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *settings, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    clean = origin.commit()
    assert len(clean) == 40
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "new.json").write_text("{}")
    assert origin.commit() == clean
    (tmp_path / "benchmarks" / "new.py").write_text("")
    assert origin.commit() == clean + "+changes"


def test_the_installed_lynx_is_held_to_the_checkout(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = benchmarks.origin
    checkout, installed = tmp_path / "checkout", tmp_path / "installed"
    (checkout / "lynx").mkdir(parents=True)
    (checkout / "rooms").mkdir()
    (checkout / "lynx" / "__init__.py").write_text("one")
    (checkout / "lynx" / "room").symlink_to("../rooms")
    (checkout / "rooms" / "a.py").write_text("two")
    (checkout / "rooms" / "a.json").write_text("{}")
    names = '[tool.setuptools.package-dir]\n"lynx" = "lynx"\n"lynx.room" = "rooms"\n'
    (checkout / "pyproject.toml").write_text(names)
    shutil.copytree(checkout / "lynx", installed / "lynx")  # links become folders, as in a wheel
    monkeypatch.setattr(origin, "ROOT", checkout)

    def code(home: Path, other: bool = False, **options: Any) -> dict[str, str]:
        monkeypatch.setattr(origin.lynx, "__file__", str(home / "lynx" / "__init__.py"))
        return origin.code(other, **options)

    ours, same = code(checkout), code(installed)
    assert ours["lynx"] == "from the checkout"
    assert same["lynx"] == "installed, the same files as the checkout"
    assert ours["lynx_files"] == same["lynx_files"]

    (installed / "lynx" / "room" / "a.json").write_text("{1}")
    assert code(installed, suffixes=(".py",))["lynx"] == same["lynx"]
    with pytest.raises(typer.BadParameter, match=r"differs from this checkout in 1 files, lynx/room/a\.json first"):
        code(installed)
    other = code(installed, other=True)
    assert other["lynx"] == "installed, not the files of the checkout"
    assert other["lynx_files"] != same["lynx_files"]
    assert str(tmp_path) not in str(other)
