"""A file of `kernels/configs` under way: the lists, and how they were made."""

from __future__ import annotations

import datetime
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import typer
from machine import hardware
from points import Settings

from lynx.kernels import tune

DRY = "interpreter (a dry run: of no use)"
TUNED = re.compile(r"(\w+) \(loads up to ([^)]*)\)")


class ConfigFile:
    """A file of `kernels/configs` under way: it starts as it lies there, or else as its generation's.

    `made` grows by a sentence with each run, so that it tells the origin of every list and load.

    Args:
        path: Where it goes.
        generation: Whose lists are the start where there is no file yet.
        device: What it is measured on; a CPU for a dry run, which is no measurement.

    Raises:
        typer.BadParameter: A dry run would go over what was measured, or the other way round.
    """

    def __init__(self, path: Path, generation: str, device: torch.device) -> None:
        start: dict[str, Any] = tune.table(generation)
        if path.exists():
            start = json.loads(path.read_text(encoding="utf-8"))
        self._path, self._measured, self._before = path, device.type == "cuda", start["made"]
        if start["measured"] if not self._measured else DRY in self._before:
            raise typer.BadParameter(f"{path} was measured on a card or made by a dry run, and this run is the other.")
        self.lists: dict[str, list[Settings]] = {name: [dict(row) for row in start[name]] for name in tune.KERNELS}
        self.now: dict[str, list[str]] = {}
        card = hardware(device)["gpu"]["name"] if self._measured else DRY
        day = datetime.date.today().isoformat()
        self._how = f"Then by `{shlex.join(sys.argv)}` on one {card}, {day}, torch {torch.__version__}"

    @property
    def tuned(self) -> set[tuple[str, int]]:
        """Kernels and loads that earlier runs have been through, by what `made` says."""
        named = [(kernel, load) for kernel, loads in TUNED.findall(self._before) for load in loads.split(", ")]
        return {(kernel, int(load)) for kernel, load in named if load.isdecimal()}

    def settle(self, kernel: str, row: Settings, found: Settings, whole: bool) -> None:
        """Put what was found for a load into its row, and write the file.

        Args:
            kernel: Whose list.
            row: Of that list.
            found: The best settings.
            whole: Whether the search came to its end; if not, it goes on from them another time.
        """
        row |= found
        self.now.setdefault(kernel, []).append(f"{row['up_to']}" if whole else f"{row['up_to']} broken off")
        loads = ", ".join(f"{name} (loads up to {', '.join(ends)})" for name, ends in self.now.items())
        made = f"{self._before} {self._how}: {loads}."
        lines = [f'  "made": {json.dumps(made)}', f'  "measured": {json.dumps(self._measured)}']
        for name, rows in self.lists.items():
            body = ",\n".join(f"    {json.dumps(each)}" for each in rows)
            lines.append(f'  "{name}": [\n{body}\n  ]')
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
