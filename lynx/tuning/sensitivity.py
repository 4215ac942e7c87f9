"""Each layer alone under each candidate; kept in a file, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lynx.errors import ConfigError
from lynx.measuring.batches import ForcedBatch
from lynx.measuring.quality import measure
from lynx.standins import StandIns
from lynx.tuning.candidates import Strategy, answered, only_in
from lynx.tuning.curves import Curve, Point, curve


class Measured(BaseModel):
    """One layer, measured.

    Attributes:
        before: Mean active experts of the model per decode step.
        points: ``(strategy, active, loss)`` of every candidate.
    """

    before: float
    points: list[tuple[dict[str, Any], float, float]]

    @property
    def curve(self) -> Curve:
        """The candidates worth having."""
        return curve([Point(*point) for point in self.points], self.before)


class Progress(BaseModel):
    """What was measured so far.

    Attributes:
        of: What it depends on: model, data, protocol, candidates.
        layers: By index.
    """

    of: dict[str, Any]
    layers: dict[int, Measured] = {}

    @classmethod
    def read(cls, path: Path, of: dict[str, Any]) -> Progress:
        """Read a file, if it is there and measured the same thing.

        Raises:
            ConfigError: It is of something else, or not such a file.
        """
        if not path.exists():
            return cls(of=of)
        try:
            found = cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            raise ConfigError(f"cannot go on from {str(path)!r}: {error}; delete it, or give another --out.") from error
        asked = json.loads(json.dumps(of))
        differs = [key for key in {**asked, **found.of} if found.of.get(key) != asked.get(key)]
        if differs:
            raise ConfigError(
                f"{str(path)!r} was measured with another {', '.join(differs)}; delete it, or give another --out."
            )
        return found

    def write(self, path: Path) -> None:
        """Write beside the file first: an interruption loses nothing."""
        beside = path.with_name(path.name + ".part")
        beside.write_text(self.model_dump_json(), encoding="utf-8")
        os.replace(beside, path)


def sensitivities(
    model: Any,
    layers: int,
    candidates: Sequence[Strategy],
    batches: Sequence[ForcedBatch],
    progress: Progress,
    path: Path | None,
    advance: Callable[[], None],
    standins: StandIns | None = None,
) -> list[Curve]:
    """Measure what each layer loses under each candidate while all others are exact.

    Args:
        model: The model, not attached.
        layers: How many MoE layers it has.
        candidates: For a layer.
        batches: The text.
        progress: What was measured before; layers in it are not measured again.
        path: Where it is kept; None for nowhere.
        advance: Called after each batch and candidate.
        standins: What answers for lost slots.
    """
    for layer in range(layers):
        if layer in progress.layers:
            for _ in range(len(candidates) * len(batches)):
                advance()
            continue
        alone = [answered(only_in(layer, candidate), standins) for candidate in candidates]
        measured = measure(model, batches, alone, advance)
        points = [(c, q.active()[layer], q.kl_value) for c, q in zip(candidates, measured, strict=True)]
        progress.layers[layer] = Measured(before=measured[0].active("before")[layer], points=points)
        if path is not None:
            progress.write(path)
    return [progress.layers[layer].curve for layer in range(layers)]
