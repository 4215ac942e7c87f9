"""What is measured on the reference model: bits per byte, exact match, and how many experts a batch wakes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from data import SourceFile
from model import CONTEXT, EOS, PAD
from torch import Tensor
from transformers import PreTrainedModel

ANSWER = re.compile(rb"Answer: (\d+)")
MAX_NEW_BYTES = 128
DECODE_POSITIONS = 32


def wilson_interval(hits: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion."""
    share = hits / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def left_padded(texts: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of texts, padded on the left to the longest."""
    length = max(map(len, texts))
    ids = torch.full((len(texts), length), PAD)
    for row, text in enumerate(texts):
        ids[row, length - len(text) :] = torch.tensor(list(text))
    return ids, (ids != PAD).long()


@torch.inference_mode()
def bits_per_byte(model: PreTrainedModel, files: Sequence[SourceFile], batch_size: int = 16) -> dict[str, Any]:
    """Mean code length of the files' bytes, teacher-forced.

    The files are joined in path order with eos between them, as in training. Windows of CONTEXT input tokens follow one
    another without overlap and each predicts the byte after every input, so a byte is predicted once, from 1 to CONTEXT
    tokens of context. Predictions of eos are not counted.
    """
    stream = np.concatenate([np.append(np.frombuffer(f.content, np.uint8).astype(np.int64), EOS) for f in files])
    count = (len(stream) - 1) // CONTEXT
    inputs = torch.from_numpy(stream[: count * CONTEXT].reshape(count, CONTEXT))
    targets = torch.from_numpy(stream[1 : count * CONTEXT + 1].reshape(count, CONTEXT))
    bits, predicted = 0.0, 0
    for start in range(0, count, batch_size):
        logits = model(input_ids=inputs[start : start + batch_size], use_cache=False).logits
        expected = targets[start : start + batch_size]
        losses = F.cross_entropy(logits.float().flatten(0, 1), expected.flatten(), reduction="none")
        counted = expected.flatten() != EOS
        bits += losses[counted].double().sum().item() / math.log(2)
        predicted += int(counted.sum())
    return {
        "bits_per_byte": bits / predicted,
        "bytes": predicted,
        "files": len(files),
        "how": f"teacher-forced, non-overlapping windows of {CONTEXT} input tokens over the held-out library files",
    }


@torch.inference_mode()
def exact_match(model: PreTrainedModel, problems: Sequence[dict[str, str]], batch_size: int = 25) -> dict[str, Any]:
    """Greedy decoding until eos or MAX_NEW_BYTES; a hit when the final `Answer: N` holds the true number."""
    hits: dict[str, list[bool]] = {}
    missed = []
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        ids, mask = left_padded([problem["prompt"].encode() for problem in batch])
        new = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=MAX_NEW_BYTES, pad_token_id=PAD
        )[:, ids.shape[1] :]
        for problem, row in zip(batch, new.tolist(), strict=True):
            written = bytes(token for token in (row[: row.index(EOS)] if EOS in row else row) if token < 256)
            found = ANSWER.findall(written)
            hit = bool(found) and found[-1].decode() == problem["answer"]
            hits.setdefault(problem["kind"], []).append(hit)
            if not hit:
                missed.append({**problem, "written": written.decode("ascii", "replace")})

    def summary(flags: list[bool]) -> dict[str, Any]:
        low, high = wilson_interval(sum(flags), len(flags))
        return {"exact_match": sum(flags) / len(flags), "n": len(flags), "wilson_95": [low, high]}

    total = summary([flag for flags in hits.values() for flag in flags])
    by_kind = {kind: summary(flags) for kind, flags in sorted(hits.items())}
    how = f"greedy, left-padded batches of {batch_size}, until eos or {MAX_NEW_BYTES} new bytes"
    return {**total, "by_kind": by_kind, "how": how, "missed": missed}


@torch.inference_mode()
def awake_experts(
    model: PreTrainedModel, problems: Sequence[dict[str, str]], code: Sequence[dict[str, str]], batch_size: int = 16
) -> dict[str, Any]:
    """Distinct experts that one decode step of a batch routes to, per layer, for mixed, code and problem batches.

    Rows are left-padded so that their prompts end at the same position; the following DECODE_POSITIONS positions, with
    the true text as input, are the decode steps averaged over.
    """
    solved = [p for p in problems if len(p["solution"]) >= DECODE_POSITIONS]
    half = batch_size // 2
    rounds = min(len(solved), len(code)) // batch_size
    kinds: dict[str, list[Tensor]] = {"mixed": [], "code": [], "problems": []}
    for i in range(rounds):
        code_rows = [(c["prompt"], c["continuation"]) for c in code[i * batch_size : (i + 1) * batch_size]]
        problem_rows = [(p["prompt"], p["solution"]) for p in solved[i * batch_size : (i + 1) * batch_size]]
        batches = {"mixed": code_rows[:half] + problem_rows[:half], "code": code_rows, "problems": problem_rows}
        for kind, rows in batches.items():
            texts = [(prompt + following[: DECODE_POSITIONS - 1]).encode() for prompt, following in rows]
            ids, mask = left_padded(texts)
            output = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True)
            per_layer = []
            for logits in output.router_logits:
                logits = logits.view(len(rows), ids.shape[1], -1)[:, -DECODE_POSITIONS:]
                chosen = logits.topk(model.config.num_experts_per_tok, dim=-1).indices
                used = F.one_hot(chosen, logits.shape[-1]).sum((0, 2)) > 0
                per_layer.append(used.sum(-1).float().mean())
            kinds[kind].append(torch.stack(per_layer))
    return {
        "experts": model.config.num_experts,
        "batch_size": batch_size,
        "decode_steps": rounds * DECODE_POSITIONS,
        "per_layer": {kind: torch.stack(values).mean(0).tolist() for kind, values in kinds.items()},
        "how": "distinct experts per layer in one decode step, mean over steps; mixed is half code, half problems",
    }
