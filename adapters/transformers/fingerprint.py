"""What is known of a router module of transformers, found by asking it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isclose

from torch import nn

from lynx.adapters.rules import Answers, ChoiceRule, choice_rule, weight_rule
from lynx.adapters.transformers.probe import Probe, RouterOutput, probe
from lynx.routing import WeightRule


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


def fingerprint(router: nn.Module) -> Fingerprint:
    """Find out what a router computes; does not change it.

    Raises:
        UnknownRouter: It cannot be called, or its output has no logits, weights and ids.
    """
    found = probe(router)
    rule = weight_rule(_answers(found))
    if rule is not None and rule.scale != 1.0 and not _alike(rule, weight_rule(_answers(probe(router, seed=1)))):
        rule = None  # a factor that was drawn for the probe: the router has learned it, and it is not known here
    groups = int(getattr(router, "num_group", None) or getattr(router, "n_group", None) or 1)
    kept = int(getattr(router, "topk_group", None) or 1)
    likely = rule.score if rule is not None else "softmax"
    choice = choice_rule(_answers(found), likely, found.bias_name, groups, kept)
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


def _answers(found: Probe) -> Answers:
    return Answers(found.logits, found.weights, found.ids, found.bias)


def _alike(rule: WeightRule, other: WeightRule | None) -> bool:
    """Whether two probes found one rule; a scale that is no round number is measured, and so not to the last bit."""
    return (
        other is not None
        and rule == replace(other, scale=rule.scale)
        and isclose(rule.scale, other.scale, rel_tol=1e-6)
    )
