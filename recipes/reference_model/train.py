"""Trains the reference model on one CPU core. Run `python train.py --help` in this folder.

The schedule is warm-up, constant, then linear decay to zero. A checkpoint holds weights, optimizer state and the step;
the data are a function of the counters in it, so a resumed run continues exactly. `--steps`, `--decay-steps`,
`--code-share`, the learning rates and the balancing coefficient may be changed when resuming.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from data import TrainingBatches, corpus_hash, read_standard_library
from model import CONTEXT, build_model, reference_config
from optim import build_optimizers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor


def learning_rate_scale(step: int, steps: int, warmup_steps: int, decay_steps: int) -> float:
    """The share of the peak learning rate used at a step."""
    return max(0.0, min(1.0, (step + 1) / warmup_steps, (steps - step) / decay_steps))


def balancing_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Mean over layers of the load-balancing loss; it is one where every expert is used equally.

    transformers pools all layers before comparing shares with probabilities, which lets one layer's excess hide
    another's; here every layer has to be balanced by itself.
    """
    total = router_logits[0].new_zeros(())
    for logits in router_logits:
        experts = logits.shape[-1]
        probs = logits.float().softmax(-1)
        chosen = probs.detach().topk(top_k, dim=-1).indices
        share = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
        total = total + experts * (share * probs.mean(0)).sum()
    return total / len(router_logits)


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes the checkpoint beside its final place first, so that an interrupted write loses nothing."""
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint.pt and log.jsonl; resumed from when it has one.")],
    steps: Annotated[int, typer.Option(help="Planned steps.")] = 3400,
    decay_steps: Annotated[int, typer.Option(help="Final steps over which the learning rate falls to zero.")] = 1250,
    warmup_steps: int = 100,
    batch_size: Annotated[int, typer.Option(help="Windows per step.")] = 16,
    context: Annotated[int, typer.Option(help="Bytes per window.")] = CONTEXT,
    code_share: Annotated[float, typer.Option(help="Share of the windows that are code.")] = 0.3125,
    drill_share: Annotated[
        float, typer.Option(help="Share of the windows that are arithmetic without stories.")
    ] = 0.1875,
    muon_lr: float = 0.02,
    adam_lr: float = 3e-3,
    balance: Annotated[float, typer.Option(help="Coefficient of the load-balancing loss.")] = 0.02,
    experts: Annotated[int, typer.Option(help="Experts of a layer.")] = 32,
    top_k: Annotated[int, typer.Option(help="Experts that a token is sent to.")] = 4,
    width: Annotated[int, typer.Option(help="Width of an expert.")] = 72,
    seed: int = 0,
    threads: int = 1,
    save_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 4.0,
    stop_step: Annotated[int | None, typer.Option(help="Stop here, before the planned end.")] = None,
) -> None:
    """Trains, or continues training, the reference model."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "checkpoint.pt"
    shape = {"experts": experts, "top_k": top_k, "width": width}
    model = build_model(reference_config(**shape), seed)
    optimizers = build_optimizers(model, muon_lr, adam_lr)
    files = read_standard_library()
    data = TrainingBatches(files, seed, context, batch_size, code_share, drill_share)
    run: dict[str, Any] = {
        "corpus_sha256": corpus_hash(files),
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "seed": seed,
        "shape": shape,
        "batch_size": batch_size,
        "context": context,
        "commands": [],
        "trained_bytes": 0,
        "windows": 0,
        "code_windows": 0,
        "drill_windows": 0,
        "seconds": 0.0,
    }
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved["run"]["corpus_sha256"] != run["corpus_sha256"]:
            raise typer.BadParameter("the checkpoint was trained on another standard library")
        if saved["run"].get("shape", shape) != shape:
            raise typer.BadParameter(f"the checkpoint is of another shape: {saved['run']['shape']}")
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first, run = saved["step"], saved["run"]
    run["commands"].append(
        {"from_step": first, "arguments": " ".join(a for a in sys.argv[1:] if a not in ("--out", str(out)))}
    )
    # Peak rates come from this command's options, not from the checkpoint.
    peaks = (muon_lr, adam_lr)

    def checkpoint(step: int) -> None:
        states = [optimizer.state_dict() for optimizer in optimizers]
        save_checkpoint(path, {"model": model.state_dict(), "optimizers": states, "step": step, "run": run})

    last = min(steps, stop_step or steps)
    terminal = sys.stderr.isatty()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True), disable=not terminal)
    saved_at = time.monotonic()
    code_rows = data.code_windows
    with progress, (out / "log.jsonl").open("a") as log:
        task = progress.add_task("training", total=last, completed=first)
        for step in range(first, last):
            began = time.monotonic()
            tokens = data.batch(step, run["code_windows"])
            with torch.autocast("cpu", torch.bfloat16):
                output = model.model(tokens[:, :-1], use_cache=False, output_router_logits=True)
                logits = model.lm_head(output.last_hidden_state)
            losses = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            losses = losses.view(tokens.shape[0], -1)
            balance_value = balancing_loss(output.router_logits, top_k)
            (losses.mean() + balance * balance_value).backward()
            scale = learning_rate_scale(step, steps, warmup_steps, decay_steps)
            torch.nn.utils.clip_grad_norm_(optimizers[1].param_groups[0]["params"], 1.0)
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = peak * scale
                optimizer.step()
                optimizer.zero_grad()
            seconds = time.monotonic() - began
            run["seconds"] += seconds
            run["trained_bytes"] += tokens[:, 1:].numel()
            run["windows"] += batch_size
            run["code_windows"] += code_rows
            run["drill_windows"] += data.drill_windows
            rows = (code_rows, data.drill_windows, batch_size - code_rows - data.drill_windows)
            parts = [part.mean().item() / math.log(2) for part in losses.split(rows)]
            code, drill, problems = parts
            text = f"code {code:.2f} drill {drill:.2f} problems {problems:.2f} bits per byte"
            progress.update(task, advance=1, description=text)
            if step % 20 == 0 or step + 1 == last:
                line = {
                    "step": step,
                    "code": code,
                    "drill": drill,
                    "problems": problems,
                    "balance": balance_value.item(),
                }
                log.write(json.dumps(line | {"lr": scale, "seconds": seconds}) + "\n")
                log.flush()
                if not terminal:
                    print(f"step {step}/{steps} {progress.tasks[0].description} balance {line['balance']:.3f} "
                          f"{seconds:.2f} s", file=sys.stderr, flush=True)  # fmt: skip
            if time.monotonic() - saved_at > 60 * save_minutes:
                checkpoint(step + 1)
                saved_at = time.monotonic()
        checkpoint(last)


if __name__ == "__main__":
    typer.run(main)
