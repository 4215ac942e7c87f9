"""transformers' own tests, from its source distribution, in a scratch folder."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

# Imported by the common tests and not in the distribution: they get an empty class of the name.
MISSING = {"generation/test_utils.py": "GenerationTesterMixin", "exporters/test_export.py": "ExportTesterMixin"}


def download(version: str, folder: Path) -> Path:
    """Fetch the distribution of one release from the package index."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), f"transformers=={version}"], check=True)
    return next(folder.glob("transformers-*.tar.gz"))


def unpack(distribution: Path, scratch: Path) -> list[str]:
    """Put the tests into `scratch/tests`, with stand-ins for what they import and do not come with.

    Returns:
        The names of the classes that are stand-ins.
    """
    tests = scratch / "tests"
    tests.mkdir(parents=True)
    with tarfile.open(distribution) as archive:
        for member in archive:
            parts = Path(member.name).parts
            if member.isfile() and parts[1:2] == ("tests",) and len(parts) == 3 and member.name.endswith(".py"):
                content = archive.extractfile(member)
                assert content is not None
                (tests / parts[2]).write_bytes(content.read())
    if not (tests / "test_modeling_common.py").exists():
        raise SystemExit(f"{distribution.name} does not carry tests/test_modeling_common.py")
    made = []
    for name, class_name in MISSING.items():
        path = tests / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"class {class_name}:\n    pass\n", encoding="utf-8")
            made.append(class_name)
    return made
