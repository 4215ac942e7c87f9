"""Find a router's rules by holding known ones against what it answers.

Rules are found by behaviour and not by class name, so a new model needs no new code if its router is of a known kind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isclose
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lynx.adapters.transformers.probe import Probe, RouterOutput, probe
from lynx.routing import Score, WeightRule

ChoiceScore = Score | Literal["logits"]

_TOLERANCE = 2e-6  # relative, in float32; known rules agree to 2e-7, wrong ones miss by 1e-2 and more
_SCORES: tuple[Score, ...] = ("softmax", "sigmoid", "sqrt_softplus")


@dataclass(frozen=True, slots=True)
class ChoiceRule:
    """What a router ranks experts by.

    Attributes:
        score: Ranking is by this score plus bias; ``logits`` where there are neither biases nor groups, as every
            score then ranks alike.
        bias: Path of the bias in the router, ``"argument"`` if it is passed to forward, or None.
        groups: Number of expert groups, 1 for none.
        kept_groups: Groups a token may choose from.
        group_score: How a group is ranked: by its best expert, or by the sum of its best two.
    """

    score: ChoiceScore = "logits"
    bias: str | None = None
    groups: int = 1
    kept_groups: int = 1
    group_score: Literal["max", "top2-sum"] = "max"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """All that is known of a router.

    Attributes:
        output: Places in the output tuple.
        num_experts: ``E``.
        top_k: ``k``.
        weights: The weight rule; ``repick`` is False where no known rule fits.
        choice: The choice rule.
        notes: What a user should know.
    """

    output: RouterOutput
    num_experts: int
    top_k: int
    weights: WeightRule
    choice: ChoiceRule
    notes: tuple[str, ...] = ()


def score(kind: str, logits: Tensor) -> Tensor:
    """Turn logits ``(T, E)`` into scores."""
    if kind == "softmax":
        return torch.softmax(logits, dim=-1)
    if kind == "sigmoid":
        return torch.sigmoid(logits)
    if kind == "sqrt_softplus":
        return F.softplus(logits).sqrt()
    return logits


def choice_scores(rule: ChoiceRule, logits: Tensor, bias: Tensor | None) -> Tensor:
    """Rebuild what the router ranks by: ``(T, E)`` float32, ``-inf`` for experts outside the kept groups."""
    choice = score(rule.score, logits)
    if bias is not None:
        choice = choice + bias.float()
    if rule.groups > 1:
        grouped = choice.unflatten(-1, (rule.groups, -1))
        strength = grouped.amax(-1) if rule.group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(strength, dtype=torch.bool)
        kept = kept.scatter(-1, strength.topk(rule.kept_groups, dim=-1).indices, True)
        choice = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
    return choice


def fingerprint(router: nn.Module) -> Fingerprint:
    """Find out what a router computes; does not change it.

    Raises:
        UnknownRouter: It cannot be called, or its output has no logits, weights and ids.
    """
    found = probe(router)
    rule = _weight_rule(found)
    if rule is not None and rule.scale != 1.0 and not _alike(rule, _weight_rule(probe(router, seed=1))):
        rule = None  # a factor that was drawn for the probe: the router has learned it, and it is not known here
    choice = _choice_rule(router, found, rule.score if rule is not None else "softmax")
    notes = []
    if choice is None:
        notes.append("what the router ranks experts by is not known; tokens only keep or lose their own experts")
    if rule is None:
        notes.append("no known weight rule fits (sparsemixer?); tokens only keep or lose their own experts")
    return Fingerprint(
        output=found.output,
        num_experts=found.logits.shape[-1],
        top_k=found.ids.shape[-1],
        weights=replace(rule or WeightRule(renormalise=False), repick=not notes),
        choice=choice or ChoiceRule(),
        notes=tuple(notes),
    )


def _choice_rule(router: nn.Module, found: Probe, likely: ChoiceScore) -> ChoiceRule | None:
    """Return the first rule whose top-k is the router's own on every probe row; weights' score is tried first."""
    groups = int(getattr(router, "num_group", None) or getattr(router, "n_group", None) or 1)
    kept = int(getattr(router, "topk_group", None) or 1)
    candidates = [ChoiceRule()]
    kinds: tuple[ChoiceScore, ...] = (likely, *(kind for kind in _SCORES if kind != likely), "logits")
    for kind in kinds:
        candidates.append(ChoiceRule(kind, found.bias_name))
        if groups > 1 and found.logits.shape[-1] % groups == 0:
            candidates += [ChoiceRule(kind, found.bias_name, groups, kept, by) for by in ("top2-sum", "max")]
    own = found.ids.sort(-1).values
    for candidate in candidates:
        ranked = choice_scores(candidate, found.logits, found.bias if candidate.bias else None)
        if torch.equal(ranked.topk(own.shape[-1], dim=-1).indices.sort(-1).values, own):
            return candidate
    return None


def _weight_rule(found: Probe) -> WeightRule | None:
    """Return the rule that reproduces the weights up to one constant factor."""
    for kind in _SCORES:
        chosen = score(kind, found.logits).gather(-1, found.ids.long())
        for renormalise in (True, False):
            expected = chosen / chosen.sum(-1, keepdim=True) if renormalise else chosen
            scale = float((found.weights.double().sum() / expected.double().sum()).item())
            if torch.allclose(found.weights, expected * scale, rtol=_TOLERANCE, atol=1e-8):
                near = round(scale, 4)  # a scaling factor is a number that somebody wrote down
                return WeightRule(kind, renormalise, near if isclose(near, scale, rel_tol=1e-6) else scale)
    return None


def _alike(rule: WeightRule, other: WeightRule | None) -> bool:
    """Whether two probes found one rule; a scale that is no round number is measured, and so not to the last bit."""
    return (
        other is not None
        and rule == replace(other, scale=rule.scale)
        and isclose(rule.scale, other.scale, rel_tol=1e-6)
    )
