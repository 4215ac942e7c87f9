"""What a setting costs: teacher-forced decode batches for the distribution, real generation for the answers."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lynx.attachment import attach
from lynx.demo.batches import PromptBatch
from lynx.demo.cache import as_argument
from lynx.demo.settings import Setting, config_of
from lynx.measuring.batches import ForcedBatch
from lynx.measuring.intervals import wilson
from lynx.reference_model import ReferenceModel
from lynx.report import PhaseReport


@dataclass(frozen=True, slots=True)
class Forced:
    """Distribution under a policy, on given tokens with the prompt exact.

    Attributes:
        active_before: Mean active experts per layer and decode step, as the model routes.
        active_after: The same under the policy.
        kept_mass_mean: Mean share of a token's own weight that was kept.
        kept_mass_worst: The worst token's share.
        bits_per_byte: Cross-entropy of the continuation in bits.
        bits_per_byte_rise: Its rise over exact routing.
        kl: Mean KL(exact || policy) in nats per byte.
        top1_agreement: Share of places where both find the same byte likeliest.
        bytes_scored: Places measured.
        expert_bytes: Mean bytes of the active experts' weights per decode step, over all layers.
    """

    active_before: float
    active_after: float
    kept_mass_mean: float
    kept_mass_worst: float
    bits_per_byte: float
    bits_per_byte_rise: float
    kl: float
    top1_agreement: float
    bytes_scored: int
    expert_bytes: float


@dataclass(frozen=True, slots=True)
class Answers:
    """Greedy answers to held-out problems.

    Attributes:
        right: Problems answered exactly.
        asked: Problems asked.
    """

    right: int
    asked: int

    def __add__(self, other: Answers) -> Answers:
        return Answers(self.right + other.right, self.asked + other.asked)

    @property
    def share(self) -> float:
        """Share of problems answered exactly."""
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        estimate = wilson(self.right, self.asked)
        return estimate.low, estimate.high


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A batch whose prompt the model alone has read.

    Attributes:
        batch: The batch.
        cache: What the prompt left in the cache.
        exact: ``(N, V)`` log-probabilities at the scored places, of the model alone.
    """

    batch: ForcedBatch
    cache: Any
    exact: Tensor


@torch.inference_mode()
def prefill(model: Any, batches: Sequence[ForcedBatch]) -> list[Prefilled]:
    """Read the prompts once for all settings, and the continuations with exact routing."""
    # imported here: transformers is loaded where there is a model of it, and only there
    from transformers import DynamicCache

    prefilled = []
    for batch in batches:
        prompt = slice(batch.prompt_columns)
        ids, mask, positions = batch.ids[:, prompt], batch.mask[:, prompt], batch.positions[:, prompt]
        cache = DynamicCache(config=model.config)
        model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            **as_argument(cache, model),
            use_cache=True,
            logits_to_keep=1,
        )
        prefilled.append(Prefilled(batch, cache, _log_probs(model, batch, cache)))
    return prefilled


@torch.inference_mode()
def forced_quality(model: Any, setting: Setting, prefilled: Sequence[Prefilled]) -> Forced:
    """Run the continuations with every column as one decode step."""
    nll = nll_exact = kl = agree = 0.0
    count = 0
    with attach(model, config_of(setting)) as handle, handle.teacher_forced(prompt_columns=0):
        for part in prefilled:
            batch, reference = part.batch, part.exact
            policy = _log_probs(model, batch, part.cache)
            targets = batch.ids[:, 1:][batch.scored].unsqueeze(-1)
            nll -= policy.gather(-1, targets).sum().item()
            nll_exact -= reference.gather(-1, targets).sum().item()
            kl += (reference.exp() * (reference - policy)).sum().item()
            agree += (policy.argmax(-1) == reference.argmax(-1)).sum().item()
            count += len(targets)
        decode = handle.report().total["decode"]
    bits = nll / count / math.log(2)
    return Forced(
        active_before=decode.active_before,
        active_after=decode.active_after,
        kept_mass_mean=_known(decode, "kept_mass_mean"),
        kept_mass_worst=_known(decode, "kept_mass_worst"),
        bits_per_byte=bits,
        bits_per_byte_rise=bits - nll_exact / count / math.log(2),
        kl=kl / count,
        top1_agreement=agree / count,
        bytes_scored=count,
        expert_bytes=decode.expert_bytes_after,
    )


@torch.inference_mode()
def answers(
    reference: ReferenceModel, setting: Setting, batches: Sequence[PromptBatch], max_new_tokens: int
) -> Answers:
    """Generate greedily in batches and count the problems that end on the right answer."""
    right = asked = 0
    with attach(reference.model, config_of(setting)):
        for batch in batches:
            inputs = reference.encode(batch.texts)
            tokens = reference.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            texts = reference.decode(tokens[:, inputs["input_ids"].shape[1] :])
            right += sum(problem.solved_by(texts[row]) for row, problem in batch.problems.items())
            asked += len(batch.problems)
    return Answers(right, asked)


def _log_probs(model: Any, batch: ForcedBatch, cache: Any) -> Tensor:
    rest = slice(batch.prompt_columns, None)
    logits = model(
        input_ids=batch.ids[:, rest],
        attention_mask=batch.mask,
        position_ids=batch.positions[:, rest],
        **as_argument(copy.deepcopy(cache), model),  # the next setting starts from the same prompt
        use_cache=True,
    ).logits
    return torch.log_softmax(logits[:, :-1][batch.scored[:, rest]].float(), dim=-1)


def _known(phase: PhaseReport, field: str) -> float:
    value = getattr(phase, field)
    return float("nan") if value is None else float(value)
