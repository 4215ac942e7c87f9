"""Put measured output into README and docs: every figure there is one that a command of this repository printed.

Runs the README's example and ``lynx demo --plot``, and reads the reference model's own figures:

    python docs/refresh.py
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    """Refresh everything."""
    readme = ROOT / "README.md"
    _put(readme, "report", _text_block(_example_output(readme)))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lynx-demo"
        printed = _demo(out)
        _put(readme, "demo", _text_block(printed))
        RESULTS.mkdir(parents=True, exist_ok=True)
        shutil.copy(out / "results.json", RESULTS / "demo.json")
        for image in ("demo.png", "demo.svg"):
            shutil.copy(out / image, ROOT / "docs" / "img" / image)
    _put(ROOT / "docs" / "reference-model.md", "figures", _model_figures())


def _example_output(readme: Path) -> str:
    """Run the README's first Python block and return what it prints."""
    block = re.search(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    if block is None:
        raise SystemExit("README.md has no Python block")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.group(1), str(readme), "exec"), {})
    return printed.getvalue()


def _demo(out: Path) -> str:
    command = [sys.executable, "-m", "lynx", "demo", "--plot", "--out", str(out)]
    finished = subprocess.run(
        command, env=os.environ | {"NO_COLOR": "1"}, stdout=subprocess.PIPE, text=True, check=True
    )
    printed, _, _ = finished.stdout.partition("Written: ")  # where it wrote is of no interest here
    return "$ lynx demo --plot\n" + printed


def _model_figures() -> str:
    """Lay out the figures that were measured when the reference model was made."""
    figures = json.loads((files("lynx.reference_model") / "figures.json").read_text(encoding="utf-8"))
    problems, code = figures["problems"], figures["code"]
    low, high = (100 * end for end in problems["wilson_95"])
    lines = [
        "| what | figure |",
        "|---|---|",
        f"| parameters | {figures['parameters']:,} |",
        f"| size in the package | {figures['safetensors_bytes']:,} bytes, bfloat16 |",
        f"| trained on | {figures['trained_bytes']:,} bytes, {figures['steps']:,} steps, torch {figures['torch']} |",
        f"| exact match, greedy | {100 * problems['exact_match']:.1f} % of {problems['n']} held-out problems "
        f"(95 % interval {low:.1f} to {high:.1f}) |",
    ]
    for kind, part in problems["by_kind"].items():
        low, high = (100 * end for end in part["wilson_95"])
        share = f"{100 * part['exact_match']:.1f} % of {part['n']} ({low:.1f} to {high:.1f})"
        lines.append(f"| … of which {kind} | {share} |")
    fresh = figures["fresh_problems"]
    low, high = (100 * end for end in fresh["wilson_95"])
    share = f"{100 * fresh['exact_match']:.1f} % of {fresh['n']} ({low:.1f} to {high:.1f})"
    lines.append(f"| exact match on fresh problems | {share} |")
    lines.append(
        f"| held-out code | {code['bits_per_byte']:.3f} bits per byte over {code['bytes']:,} bytes ({code['how']}) |"
    )
    return "\n".join([*lines, *_routing_rows(figures)])


def _routing_rows(figures: dict) -> list[str]:
    awake = figures["awake_experts"]
    return [
        f"| experts awake in layer {layer}, batch of {awake['batch_size']} mixed | {mean:.1f} of {awake['experts']} "
        f"({100 * mean / awake['experts']:.0f} %) |"
        for layer, mean in enumerate(awake["per_layer"]["mixed"])
    ]


def _text_block(text: str) -> str:
    return "```text\n" + "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + "\n```"


def _put(path: Path, marker: str, content: str) -> None:
    text = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {marker}:start -->\n).*?(<!-- {marker}:end -->)", re.DOTALL)
    changed, count = pattern.subn(lambda found: f"{found.group(1)}{content}\n{found.group(2)}", text)
    if count != 1:
        raise SystemExit(f"{path.name} needs one pair of <!-- {marker}:start --> and <!-- {marker}:end -->")
    path.write_text(changed, encoding="utf-8")


if __name__ == "__main__":
    main()
