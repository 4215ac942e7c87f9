"""Measures a checkpoint of the reference model and writes the folder that the wheel ships.

python evaluate.py measure RUN/checkpoint.pt --problems 100 --code-bytes 100000
python evaluate.py export RUN/checkpoint.pt FOLDER
python evaluate.py text FILE.jsonl
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from data import (
    HELD_OUT_PERCENT,
    SourceFile,
    corpus_hash,
    distinct_problems,
    held_out_code,
    read_standard_library,
    seen_code,
)
from measure import awake_experts, bits_per_byte, exact_match
from model import CONTEXT, EOS, PAD, reference_config
from problems import HELD_OUT_SHARE
from transformers import GenerationConfig, Qwen3MoeForCausalLM

PROMPT_SEED = 0
FRESH_SEED = 1  # problems that nobody looked at while choosing what to train on
TEXT_SEED = 2
PROBLEMS = 500
CODE_PROMPTS = 128
CODE_BYTES = 256  # of a code prompt, and again of its continuation
LARGEST_EXPORT = 12_000_000

LICENSE = """# Licence of the reference model

The weights, the configuration and the recipe that produced them are under the Apache License, Version 2.0.

The model is trained on generated arithmetic problems and on the source code of CPython's standard library. The code
prompts and continuations in `prompts.json` are excerpts from that library, each naming its file. The library is under
the PSF License Version 2, Copyright (c) 2001 Python Software Foundation; All Rights Reserved.
See https://docs.python.org/3/license.html for the text.
"""

app = typer.Typer(add_completion=False)


def code_prompts(files: list[SourceFile], count: int, seed: int) -> list[dict[str, str]]:
    """Draws excerpts of held-out files that start at a line start, are ASCII and do not overlap."""
    rng = random.Random(f"code {seed}")
    starts = []
    for file in files:
        lines = [0] + [i + 1 for i, byte in enumerate(file.content) if byte == 10]
        starts += [(file, start) for start in lines if start + 2 * CODE_BYTES <= len(file.content)]
    rng.shuffle(starts)
    taken: dict[str, list[int]] = {}
    prompts: list[dict[str, str]] = []
    for file, start in starts:
        excerpt = file.content[start : start + 2 * CODE_BYTES]
        near = any(abs(start - other) < 2 * CODE_BYTES for other in taken.get(file.path, []))
        if near or not excerpt.isascii():
            continue
        taken.setdefault(file.path, []).append(start)
        text = excerpt.decode("ascii")
        prompts.append({"prompt": text[:CODE_BYTES], "continuation": text[CODE_BYTES:], "source": file.path})
        if len(prompts) == count:
            return prompts
    raise ValueError(f"the held-out files hold only {len(prompts)} of {count} excerpts")


def problem_prompts(count: int, seed: int, seen: bool = False) -> list[dict[str, str]]:
    """Problems as the dictionaries that ship, held out unless they may be such as were trained on."""
    fields = ("prompt", "answer", "solution", "kind")
    return [{f: getattr(p, f) for f in fields} for p in distinct_problems(count, seed, held_out=not seen)]


def build_prompts(files: list[SourceFile]) -> dict[str, list[dict[str, str]]]:
    """The prompts that ship with the model, all from held-out data and fixed by PROMPT_SEED."""
    return {
        "problems": problem_prompts(PROBLEMS, PROMPT_SEED),
        "code": code_prompts(held_out_code(files), CODE_PROMPTS, PROMPT_SEED),
    }


def write_weights(checkpoint: dict[str, Any], folder: Path) -> None:
    """Writes the checkpoint's weights as bfloat16 with the keys that transformers uses."""
    config = reference_config(**checkpoint["run"].get("shape", {}))
    model = Qwen3MoeForCausalLM(config)
    model.load_state_dict(checkpoint["model"])
    model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS)
    model.bfloat16().save_pretrained(folder)


def load_exported(folder: Path) -> Qwen3MoeForCausalLM:
    """Loads an exported folder the way it is used on a CPU: bfloat16 on disk, float32 in memory."""
    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def measure_all(
    model: Qwen3MoeForCausalLM, files: list[SourceFile], problems: int = PROBLEMS, code_bytes: int | None = None
) -> dict[str, Any]:
    """Every figure of the model, with the problems it missed under `missed`."""
    prompts = build_prompts(files)
    code = held_out_code(files)
    if code_bytes is not None:
        joined = b"".join(file.content for file in code)
        middle = max(0, (len(joined) - code_bytes) // 2)
        code = [SourceFile("middle", joined[middle : middle + code_bytes], False, True)]
    return {
        "code": bits_per_byte(model, code),
        "problems": exact_match(model, prompts["problems"][:problems]),
        "awake_experts": awake_experts(model, prompts["problems"], prompts["code"]),
    }


@app.command()
def measure(
    checkpoint: Path,
    problems: Annotated[int, typer.Option(help="Held-out problems to solve.")] = 100,
    code_bytes: Annotated[int | None, typer.Option(help="Held-out code to use; all of it by default.")] = None,
    threads: int = 1,
    show_missed: int = 5,
) -> None:
    """Prints the figures of a checkpoint, computed from its weights rounded to bfloat16."""
    torch.set_num_threads(threads)
    saved = torch.load(checkpoint, weights_only=True)
    with tempfile.TemporaryDirectory() as folder:
        write_weights(saved, Path(folder))
        figures = measure_all(load_exported(Path(folder)), read_standard_library(), problems, code_bytes)
    missed = figures["problems"].pop("missed")
    print(json.dumps({"step": saved["step"], **figures}, indent=1))
    for problem in missed[:show_missed]:
        print(problem["prompt"] + problem["solution"] + "-- written:\n" + problem["written"] + "\n")


@app.command()
def export(
    checkpoint: Path,
    folder: Path,
    problems: Annotated[int, typer.Option(help="Held-out problems to solve for the figures.")] = PROBLEMS,
    code_bytes: Annotated[int | None, typer.Option(help="Held-out code for the figures; all of it by default.")] = None,
    threads: int = 1,
) -> None:
    """Writes weights, configuration, prompts, figures and licence note; each file is replaced in one step."""
    torch.set_num_threads(threads)
    saved = torch.load(checkpoint, weights_only=True)
    files = read_standard_library()
    if corpus_hash(files) != saved["run"]["corpus_sha256"]:
        raise typer.BadParameter("this interpreter's standard library is not the one the model was trained on")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as name:
        staged = Path(name)
        write_weights(saved, staged)
        model = load_exported(staged)
        size = (staged / "model.safetensors").stat().st_size
        if size > LARGEST_EXPORT:
            raise ValueError(f"model.safetensors has {size} bytes, more than {LARGEST_EXPORT}")
        measured = measure_all(model, files, problems, code_bytes)
        known = {problem["prompt"] for problem in problem_prompts(PROBLEMS, PROMPT_SEED)}
        fresh = [problem for problem in problem_prompts(2 * PROBLEMS, FRESH_SEED) if problem["prompt"] not in known]
        measured["fresh_problems"] = exact_match(model, fresh[:problems])
        for part in ("problems", "fresh_problems"):
            measured[part].pop("missed")
        run = saved["run"]
        figures = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "safetensors_bytes": size,
            "trained_bytes": run["trained_bytes"],
            "training_seconds": round(run["seconds"]),
            "steps": saved["step"],
            "data": {
                "corpus_sha256": run["corpus_sha256"],
                "python": run["python"],
                "held_out_files_percent": HELD_OUT_PERCENT,
                "held_out_steps": f"1 in {HELD_OUT_SHARE}",
                "code_share": run["code_windows"] / run["windows"],
                "drill_share": run["drill_windows"] / run["windows"],
            },
            "seeds": {"training": run["seed"], "prompts": PROMPT_SEED, "fresh_problems": FRESH_SEED},
            "commands": [f"python train.py {c['arguments']}  # from step {c['from_step']}" for c in run["commands"]],
            "torch": run["torch"],
            "context": CONTEXT,
            **measured,
        }
        (staged / "prompts.json").write_text(json.dumps(build_prompts(files), indent=0) + "\n")
        (staged / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
        (staged / "LICENSE.md").write_text(LICENSE)
        for path in sorted(staged.iterdir()):
            path.chmod(0o644)
            os.replace(path, folder / path.name)
    print(json.dumps(figures, indent=2))


@app.command()
def text(
    file: Path,
    count: Annotated[int, typer.Option(help="Excerpts of code, and as many problems.")] = 640,
    seed: int = TEXT_SEED,
    least: Annotated[int, typer.Option(help="Shortest continuation, in bytes.")] = 64,
    seen: Annotated[bool, typer.Option("--seen", help="Of what the model was trained on, to calibrate on.")] = False,
) -> None:
    """Writes more text than ships with the model, held out or not, as the JSONL that `lynx eval` and others read."""
    files = read_standard_library()
    code = code_prompts(seen_code(files) if seen else held_out_code(files), count, seed)
    long = [item for item in problem_prompts(4 * count, seed, seen) if len(item["solution"]) >= least]
    if len(long) < count:
        raise typer.BadParameter(f"only {len(long)} of {4 * count} problems go on for {least} bytes")
    keys = ("prompt", "solution", "answer")
    lines = [{key: item[key] for key in ("prompt", "continuation")} | {"domain": "code"} for item in code]
    lines += [{key: item[key] for key in keys} | {"domain": "problems"} for item in long[:count]]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    app()
