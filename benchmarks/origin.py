"""Where the code that is timed comes from: the checkout's commit, and whether the lynx that is imported is of it.

Every script imports this before transformers. transformers looks for Hugging Face's package `kernels`, and would find
kernels.py in this folder, or the folder of `lynx.kernels` in the root of the checkout. So both folders are looked into
last. That changes nothing for lynx, which is imported here first.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer

import lynx

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
WRITTEN = ("benchmarks/results", "docs/performance.md")  # by the benchmarks and from them
CODE = (".py", ".json")  # modules, and the kernels' launch settings
OTHER_CODE = typer.Option(False, "--other-code", help="Time the installed lynx although it is not the checkout's.")


def installed(package: str) -> str:
    """Return the version of a package; empty if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


sys.path.sort(key=lambda entry: Path(entry).resolve() in (FOLDER, ROOT))
if not installed("kernels"):
    # Python's way to say that there is none: else transformers would run what it finds in these folders.
    sys.modules["kernels"] = None  # type: ignore[assignment]


def commit() -> str:
    """Return the commit of the checkout, marked where files differ from it or are not in it.

    What the benchmarks themselves write does not count. `LYNX_BENCHMARK_COMMIT` says the commit where the tree was
    copied without its history.
    """

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "HEAD")
    if not head:
        return os.environ.get("LYNX_BENCHMARK_COMMIT", "unknown")
    others = [f":(exclude){path}" for path in WRITTEN]
    return head + ("+changes" if git("status", "--porcelain", "--untracked-files=normal", "--", ".", *others) else "")


def code(other: bool, suffixes: tuple[str, ...] = CODE) -> dict[str, str]:
    """Say in words where lynx was imported from, and give a digest of its files.

    Args:
        other: Take a lynx that differs from the checkout's.
        suffixes: The files that are looked at.

    Raises:
        typer.BadParameter: It differs: the commit would say nothing of what is timed.
    """
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    checkout = _files({package: ROOT / folder for package, folder in setup["package-dir"].items()}, suffixes)
    home = Path(lynx.__file__).resolve().parent
    if home == ROOT / "lynx":
        return {"lynx": "from the checkout", "lynx_files": _digest(checkout)}
    here = _files({"lynx": home}, suffixes)
    different = sorted(name for name in here.keys() | checkout.keys() if here.get(name) != checkout.get(name))
    if different and not other:
        raise typer.BadParameter(
            f"the lynx that is installed differs from this checkout in {len(different)} files, {different[0]} first. "
            "Run `make install`, or set PYTHONPATH=. to time the checkout; --other-code times it all the same."
        )
    words = "installed, " + ("not the files of the checkout" if different else "the same files as the checkout")
    return {"lynx": words, "lynx_files": _digest(here)}


def _files(folders: dict[str, Path], suffixes: tuple[str, ...]) -> dict[str, bytes]:
    """Read all files of packages by their names below the top package; the checkout's links to rooms are no files."""
    return {
        f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for package, folder in folders.items()
        for path in folder.rglob("*")
        if path.suffix in suffixes
    }


def _digest(files: dict[str, bytes]) -> str:
    whole = hashlib.sha256()
    for name in sorted(files):
        whole.update(f"{name} {len(files[name])}\n".encode() + files[name])
    return whole.hexdigest()[:12]
