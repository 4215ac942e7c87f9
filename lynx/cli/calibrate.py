"""``lynx calibrate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lynx.errors import ConfigError

if TYPE_CHECKING:
    from lynx.standins_file import StandInFile


def calibrate(
    model: Annotated[str, typer.Argument(help="A folder, a name in transformers' local cache, or `reference`.")],
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Text like that served: .jsonl with one example a line, or plain text."),
    ] = None,
    rank: Annotated[
        str, typer.Option("--rank", help="Rank of the stand-ins; several, as 4,8,16, to choose from by layer.")
    ] = "16",
    out: Annotated[Path, typer.Option("--out", "-o", help="The file of stand-ins.")] = Path("standins.safetensors"),
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences that are read in one pass.")] = 8,
    least: Annotated[
        int, typer.Option("--least", min=1, help="Experts that saw fewer slots of equal weight get no stand-in.")
    ] = 32,
    memory: Annotated[float, typer.Option("--memory", help="GiB for what is kept of experts while reading.")] = 4.0,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda or cuda:N; a GPU where there is one.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16, float32 or auto.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output instead of a table.")] = False,
) -> None:
    """Make stand-ins: low-rank maps that answer for experts that were left out."""
    from lynx.calibration.calibrate import Effort, readings
    from lynx.calibration.text import calibrate_on, passages
    from lynx.cli.evaluate import examples_of
    from lynx.cli.progress import progress_bar
    from lynx.measuring.subject import load_subject

    effort = Effort(ranks=_ranks(rank), least=least, memory=memory)
    effort.check()
    subject = load_subject(model, True, device, dtype)
    examples = examples_of(data, subject)
    with progress_bar(readings(subject.model, passages(subject, examples, batch), effort)) as advance:
        made = calibrate_on(subject, examples, out, effort, batch=batch, advance=lambda: advance("reading"))
    print(json.dumps(_plain(made, out), indent=2)) if as_json else _show(made, out)


def _ranks(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise ConfigError(f"--rank is a whole number, or several as 4,8,16; got {text!r}.") from error


def _plain(made: StandInFile, out: Path) -> dict[str, Any]:
    layers = [
        {
            "name": layer.name,
            "rank": layer.rank,
            "experts": layer.num_experts,
            "missing": made.missing.get(layer.name, []),
            "unexplained": layer.unexplained,
            "bytes": layer.num_bytes,
        }
        for layer in made.layers.values()
    ]
    return {"standins": str(out), "bytes": out.stat().st_size, "layers": layers, "conditions": made.conditions}


def _show(made: StandInFile, out: Path) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("layer", "rank", "stand-ins", "missed by the mean", "missed"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for layer in made.layers.values():
        shares = f"{layer.unexplained[0]:.1%}", f"{layer.unexplained[-1]:.1%}"
        table.add_row(layer.name, str(layer.rank), f"{int(layer.known.sum())} of {layer.num_experts}", *shares)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    console.print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, from {made.conditions['tokens']} tokens")
    for name, experts in made.missing.items():
        console.print(f"{name}: too little was seen of experts {', '.join(map(str, experts))}; they are re-picked.")
