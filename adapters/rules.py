"""A router's rules, found by holding known ones against what it answers; the same for every host.

Rules are found by behaviour and not by class name, so a new model needs no new code if its router is of a known kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isclose
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lynx.routing import Score, WeightRule

ChoiceScore = Score | Literal["logits"]

# Relative. Known rules agree to 2e-7 in float32, and to less where a kernel takes a rougher exponential.
# Wrong ones miss by 1e-2 and more.
_TOLERANCE = 1e-4
_SCORES: tuple[Score, ...] = ("softmax", "sigmoid", "sqrt_softplus")


@dataclass(frozen=True, slots=True)
class Answers:
    """What a router gave for random logits.

    Attributes:
        logits: ``(T, E)`` float32.
        weights: ``(T, k)`` float32.
        ids: ``(T, k)``.
        bias: What it adds to its scores for the choice alone, as far as its name tells, or None.
    """

    logits: Tensor
    weights: Tensor
    ids: Tensor
    bias: Tensor | None = None


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


def choice_rule(
    found: Answers, likely: ChoiceScore, bias_name: str | None, groups: int = 1, kept: int = 1
) -> ChoiceRule | None:
    """Return the first rule whose top-k is the router's own on every row of the answers.

    Args:
        found: The answers.
        likely: The score of the weights, which is tried first.
        bias_name: How the host finds the bias again.
        groups: Groups of experts that the router's configuration names.
        kept: Groups that a token may choose from.
    """
    candidates = [ChoiceRule()]
    kinds: tuple[ChoiceScore, ...] = (likely, *(kind for kind in _SCORES if kind != likely), "logits")
    for kind in kinds:
        candidates.append(ChoiceRule(kind, bias_name))
        if groups > 1 and found.logits.shape[-1] % groups == 0:
            candidates += [ChoiceRule(kind, bias_name, groups, kept, by) for by in ("top2-sum", "max")]
    own = found.ids.sort(-1).values
    for candidate in candidates:
        ranked = choice_scores(candidate, found.logits, found.bias if candidate.bias else None)
        if torch.equal(ranked.topk(own.shape[-1], dim=-1).indices.sort(-1).values, own):
            return candidate
    return None


def weight_rule(found: Answers) -> WeightRule | None:
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
