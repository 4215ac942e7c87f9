"""What is known of a router module of transformers, found by asking it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isclose

from torch import nn

from lynx.adapters.rules import Answers, ChoiceRule, choice_rule, weight_rule
from lynx.adapters.transformers.block import probe_block
from lynx.adapters.transformers.probe import PROBE_ROWS, Probe, RouterOutput, UnknownRouter, probe
from lynx.routing import WeightRule


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """All that is known of a router.

    Attributes:
        output: Where the decision is.
        num_experts: ``E``, zero experts counted.
        top_k: ``k``.
        weights: The weight rule; ``repick`` is False where no known rule fits.
        choice: The choice rule.
        expert_scale: Path in the router of a factor ``(E,)`` that it has learned for each expert's weight, or None.
        zero_experts: How many of the experts, the last ones, have no weights: a token's slots there stay, and no token
            is moved there.
        notes: What a user should know.
    """

    output: RouterOutput
    num_experts: int
    top_k: int
    weights: WeightRule
    choice: ChoiceRule
    expert_scale: str | None = None
    zero_experts: int = 0
    notes: tuple[str, ...] = ()


def fingerprint(
    router: nn.Module, block: nn.Module | None = None, experts: nn.Module | None = None, real: int | None = None
) -> Fingerprint:
    """Find out what a router computes; does not change it.

    Args:
        router: The module.
        block: The module around it; asked where the router gives logits alone.
        experts: The experts beside it.
        real: How many of the experts there are weights for, None if all.

    Raises:
        UnknownRouter: It cannot be called, or its output has no logits, weights and ids.
    """
    found = _ask(router, block, experts, 0)
    zero = found.logits.shape[-1] - real if real is not None and real < found.logits.shape[-1] else 0
    rule, scale = _rule(found, zero)
    if rule is not None and rule.scale != 1.0 and not _alike(rule, _rule(_ask(router, block, experts, 1), zero)[0]):
        rule = None  # a factor that was drawn for the probe: the router has learned it, and it is not known here
    asked = block if found.output.by_block else router
    groups = int(getattr(asked, "num_group", None) or getattr(asked, "n_group", None) or 1)
    kept = int(getattr(asked, "topk_group", None) or 1)
    likely = rule.score if rule is not None else "softmax"
    choice = choice_rule(_answers(found, zero), likely, found.bias_name, groups, kept)
    notes = []
    if zero:
        notes.append(f"{zero} of {found.logits.shape[-1]} experts have no weights; a token's slots there stay")
    if choice is None:
        notes.append("what the router ranks experts by is not known; tokens only keep or lose their own experts")
    if rule is None:
        notes.append("no known weight rule fits; tokens only keep or lose their own experts")
    repick = choice is not None and rule is not None
    return Fingerprint(
        output=found.output,
        num_experts=found.logits.shape[-1],
        top_k=found.ids.shape[-1],
        weights=replace(rule or WeightRule(renormalise=False), repick=repick),
        choice=choice or ChoiceRule(),
        expert_scale=scale,
        zero_experts=zero,
        notes=tuple(notes),
    )


def _ask(router: nn.Module, block: nn.Module | None, experts: nn.Module | None, seed: int) -> Probe:
    """Ask the router, or its block where the router alone does not decide."""
    try:
        return probe(router, seed)
    except UnknownRouter as error:
        if block is None or experts is None:
            raise
        try:
            return probe_block(block, router, experts, seed)
        except UnknownRouter as further:
            raise UnknownRouter(f"{error}, and {further}") from further


def _rule(found: Probe, zero_experts: int) -> tuple[WeightRule | None, str | None]:
    """Find the weight rule, and the path of the factor for each expert that comes on top of it."""
    answers = _answers(found, zero_experts)
    rule = weight_rule(answers)
    if rule is None:
        for name, factor in found.per_expert.items():
            weights = answers.weights / factor[answers.ids.long()]
            if (rule := weight_rule(replace(answers, weights=weights))) is not None:
                return rule, name
    return rule, None


def _answers(found: Probe, zero_experts: int) -> Answers:
    """Take a probe's rows; where there are zero experts, those rows alone whose slots all say what they are."""
    logits, weights, ids = found.logits, found.weights, found.ids
    if zero_experts:
        rows = (weights != 0).all(-1)
        if int(rows.sum()) >= PROBE_ROWS // 4:
            logits, weights, ids = logits[rows], weights[rows], ids[rows]
    return Answers(logits, weights, ids, found.bias)


def _alike(rule: WeightRule, other: WeightRule | None) -> bool:
    """Whether two probes found one rule; a scale that is no round number is measured, and so not to the last bit."""
    return (
        other is not None
        and rule == replace(other, scale=rule.scale)
        and isclose(rule.scale, other.scale, rel_tol=1e-6)
    )
