"""Will it help here: what measured times and the structure of a model say, rule by rule, in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lynx.measuring.observed import THRESHOLDS, Observed, Thresholds

Weight = Literal["stops", "limits", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule found.

    Attributes:
        rule: Its name.
        weight: Whether it stops a gain, limits it, or has only to be known.
        text: It in words, with the figures.
    """

    rule: str
    weight: Weight
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether selection helps at one batch size.

    Attributes:
        helps: Whether it does.
        summary: The answer in a sentence.
        findings: What it rests on.
    """

    helps: bool
    summary: str
    findings: tuple[Finding, ...]


def judge(observed: Observed, thresholds: Thresholds = THRESHOLDS) -> Verdict:
    """Apply all rules."""
    findings = tuple(finding for rule in RULES if (finding := rule(observed, thresholds)) is not None)
    stopped = [finding for finding in findings if finding.weight == "stops"]
    helps = not stopped and observed.ratio_at_half <= 1 - thresholds.gain
    at_half = (
        f"with half the active experts a step would take {observed.ratio_at_half:.2f} of the model's own time, and "
        f"{observed.half / observed.attached:.2f} of its time under Lynx with every expert kept"
    )
    if helps:
        limits = any(finding.weight == "limits" for finding in findings)
        summary = f"it can help, within limits: {at_half}" if limits else f"it can help: {at_half}"
    elif stopped:
        summary = f"it will not help: {stopped[0].rule}"
    else:
        summary = f"it will hardly help: {at_half}"
    return Verdict(helps, summary, findings)


def bypassed(seen: Observed, limit: Thresholds) -> Finding | None:
    """Say that routers were not asked."""
    if not seen.silent:
        return None
    weight: Weight = "stops" if seen.silent == seen.layers else "limits"
    text = (
        f"the routers of {seen.silent} of {seen.layers} MoE layers did not decide: a fused kernel goes past them, and "
    )
    return Finding("routers are bypassed", weight, text + "nothing is selected there. Load the model without it.")


def nothing_to_share(seen: Observed, limit: Thresholds) -> Finding | None:
    """Say that a batch wakes hardly more experts than a token does."""
    if seen.active > limit.sharing * seen.top_k:
        return None
    text = f"a batch of {seen.batch} wakes {seen.active:.1f} experts per layer, and a single token {seen.top_k:g}: "
    if seen.batch == 1:
        return Finding("the batch is too small", "stops", text + "there is nothing to share. Decode more together.")
    return Finding("tokens share their experts already", "stops", text + "there is nothing left to share.")


def saturated(seen: Observed, limit: Thresholds) -> Finding | None:
    """Say that there are few large experts, all of them awake."""
    if seen.active < limit.saturated * seen.num_experts or seen.num_experts >= limit.per_slot * seen.top_k:
        return None
    text = (
        f"{seen.active:.1f} of {seen.num_experts:g} experts are awake and a token takes {seen.top_k:g}: each matters "
        "to someone, so that quality falls fast with every expert that is cut. Measure it: lynx eval."
    )
    return Finding("there are few experts per token", "limits", text)


def host_bound(seen: Observed, limit: Thresholds) -> Finding | None:
    """Say that a GPU waits for the host."""
    if seen.host is None or seen.host < limit.host_share:
        return None
    text = f"for {seen.host:.0%} of a step the host was still issuing work, and the GPU waits for it: fewer experts "
    return Finding("the host is the bottleneck", "stops", text + "change nothing. Capture or compile the step first.")


def gathers(seen: Observed, limit: Thresholds) -> Finding | None:
    """Say that the experts implementation does as much whatever is active."""
    if not seen.experts.endswith("batched_mm") or seen.expert_share >= limit.expert_share:
        return None
    text = (
        f"only {seen.expert_share:.0%} of a step depends on the active experts, as the model's batched_mm gathers "
        "weights for every token and slot. Use --experts lynx."
    )
    return Finding("the experts implementation does not profit", "stops", text)


def flat(seen: Observed, limit: Thresholds) -> Finding | None:
    """Say that the step barely depends on the active experts, where no other rule knows why."""
    if seen.expert_share >= limit.expert_share or host_bound(seen, limit) or gathers(seen, limit):
        return None
    text = (
        f"only {seen.expert_share:.0%} of a step depends on the active experts. The rest goes into attention, "
        "arithmetic, launches, selection or the host."
    )
    return Finding("a step barely depends on the active experts", "stops", text)


def overhead(seen: Observed, limit: Thresholds) -> Finding | None:
    """Say what Lynx costs before it saves."""
    ratio = seen.attached / seen.alone
    if ratio <= limit.overhead:
        return None
    text = f"with every expert kept, a step under Lynx takes {ratio:.2f} of the model's own time ({seen.experts}); "
    if seen.break_even < limit.break_even:
        where = f"fewer than {seen.break_even:.0%} of the active experts" if seen.break_even > 0 else "no cut"
        return Finding("the overhead eats the gain", "stops", f"{text}{where} would win that back.")
    text += f"it is won back at {seen.break_even:.0%} of the active experts."
    return Finding("Lynx costs before it saves", "limits", text)


def bad_fit(seen: Observed, limit: Thresholds) -> Finding | None:
    """Say that predictions have no ground."""
    if seen.r_squared >= limit.r_squared:
        return None
    text = f"a line explains as little as {seen.r_squared:.0%} of a layer's time: predictions are guesses. "
    return Finding("the fit is bad", "limits", text + "Take more rounds, on a machine that does nothing else.")


def busy(seen: Observed, limit: Thresholds) -> Finding | None:
    """Say that the machine did something else meanwhile."""
    if seen.own is None or seen.own >= limit.own:
        return None
    text = f"this thread had its core for {seen.own:.0%} of a step only, and times hold what came between. "
    return Finding("the machine is busy", "note", text + "--clock thread leaves that out.")


def in_cache(seen: Observed, limit: Thresholds) -> Finding | None:
    """Say that a processor's cache holds the experts."""
    if not 0 < seen.expert_bytes <= seen.cache_bytes:
        return None
    text = (
        f"all experts are {seen.expert_bytes / 1e6:.0f} MB and lie in the processor's cache of "
        f"{seen.cache_bytes / 1e6:.0f} MB, where reading them costs little: times of larger models look different."
    )
    return Finding("the model lies in the cache", "note", text)


def no_text(seen: Observed, limit: Thresholds) -> Finding | None:
    """Say that tokens were random."""
    if not seen.random_tokens:
        return None
    text = "tokens were random: they spread over more experts than text does, which flatters. Give --data."
    return Finding("there was no text", "note", text)


def decode_only(seen: Observed, limit: Thresholds) -> Finding | None:
    """Say what was not timed."""
    text = "prompts are left exact and were not timed: where they are long and answers short, a request gains less."
    return Finding("only decode was timed", "note", text)


RULES: tuple[Callable[[Observed, Thresholds], Finding | None], ...] = (
    bypassed,
    nothing_to_share,
    host_bound,
    gathers,
    flat,
    overhead,
    saturated,
    bad_fit,
    busy,
    in_cache,
    no_text,
    decode_only,
)
