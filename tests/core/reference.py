"""The oracle: selection and re-routing as the specification words them, in plain Python loops and float64.

Nothing here is imported from lynx but the names of the roles; nothing is vectorised; nothing is fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

PADDING, EXACT, OPEN = 0, 1, 2


class Ambiguous(Exception):
    """Two scores are so close that float32 may order them otherwise than float64."""


@dataclass
class Batch:
    """One batch as nested lists."""

    choice: list[list[float]]
    logits: list[list[float]]
    ids: list[list[int]]
    weights: list[list[float]]
    role: list[int]
    phase: list[int]
    priority: list[float]
    score: str
    renormalise: bool
    scale: float
    repick: bool
    experts: int = field(init=False)

    def __post_init__(self):
        self.experts = len(self.choice[0]) if self.choice else 0

    @classmethod
    def of(cls, routing):
        rule = routing.rule
        priority = [1.0] * len(routing.role) if routing.priority is None else routing.priority.tolist()
        lists = (routing.choice, routing.logits, routing.ids, routing.weights, routing.role, routing.phase)
        lists = [tensor.double().tolist() if tensor.is_floating_point() else tensor.tolist() for tensor in lists]
        return cls(*lists, priority, rule.score, rule.renormalise, rule.scale, rule.repick)

    def rows(self, *roles):
        return [t for t, role in enumerate(self.role) if role in roles]

    def own(self, t):
        """The row's own experts, best first: by choice, then by lowest id."""
        own = [e for e in self.ids[t] if 0 <= e < self.experts]
        return sorted(own, key=lambda e: (-self.choice[t][e], e))

    def weight(self, t, expert):
        return self.weights[t][self.ids[t].index(expert)]

    def mass(self, t, expert):
        return self.weight(t, expert) / sum(self.weight(t, e) for e in self.own(t))

    def certainty(self, t):
        """What the row's own experts hold of the scores of all that it may choose."""
        of = math.exp if self.score.startswith("softmax") else lambda logit: _score(self.score, logit)
        largest = max(self.logits[t]) if self.score.startswith("softmax") else 0.0
        allowed = [e for e in range(self.experts) if self.choice[t][e] > -math.inf]
        scores = {e: of(self.logits[t][e] - largest) for e in allowed}
        total = sum(scores.values())
        return sum(scores[e] for e in self.own(t) if e in scores) / total if total else 0.0

    def wanted(self):
        return {e for t in self.rows(OPEN) for e in self.own(t)}

    def woken(self):
        return {e for t in self.rows(EXACT) for e in self.own(t)}

    def protected(self, protect):
        return {e for t in self.rows(OPEN) for e in self.own(t)[:protect]}

    def acting_on(self, *phases):
        """The same batch, in which open rows of other phases must not change."""
        role = [EXACT if r == OPEN and p not in phases else r for r, p in zip(self.role, self.phase, strict=True)]
        return replace(self, role=role)

    def only(self, phase):
        """What one phase sees of the batch: the other phase's open rows are not there."""
        role = [PADDING if r == OPEN and p != phase else r for r, p in zip(self.role, self.phase, strict=True)]
        return replace(self, role=role)


# What each token wants of its own top-k: {token: experts}.


def wants_by_rank(batch, top):
    return {t: set(batch.own(t)[:top]) for t in batch.rows(OPEN)}


def wants_by_ratio(batch, ratio):
    wants = {}
    for t in batch.rows(OPEN):
        best = max(batch.mass(t, e) for e in batch.own(t))
        wants[t] = set()
        for e in batch.own(t):
            gap = batch.mass(t, e) - ratio * best
            if 0 < abs(gap) < 1e-6:
                raise Ambiguous
            if gap >= 0:
                wants[t].add(e)
    return wants


def wants_by_mass(batch, mass):
    wants = {}
    for t in batch.rows(OPEN):
        wants[t], covered = set(), 0.0
        for e in batch.own(t):
            if abs(covered - mass) < 1e-6:
                raise Ambiguous
            if covered < mass:
                wants[t].add(e)
            covered += batch.mass(t, e)
    return wants


def union(wants):
    return set().union(*wants.values())


# What the batch wants: a set of experts.


def pooled(batch, least, power, certainty):
    """Those whose masses, as a norm over open tokens, reach `least`; of tokens that are less sure, less of it."""
    kept = set()
    for e in batch.wanted():
        rows = [t for t in batch.rows(OPEN) if e in batch.own(t)]
        mass = {t: batch.mass(t, e) * batch.certainty(t) ** certainty for t in rows}
        total = sum(min(mass[t] / least, 1.0) ** power * batch.priority[t] for t in rows) if least else 1.0
        if least and abs(total - 1.0) < 1e-5:
            raise Ambiguous
        if total >= 1.0:
            kept.add(e)
    return kept


def demand(batch, utility):
    total = [0.0] * batch.experts
    for t in batch.rows(OPEN):
        for e in batch.own(t):
            vote = {"count": 1.0, "own-mass": batch.weight(t, e), "normalised-own-mass": batch.mass(t, e)}[utility]
            total[e] += vote * batch.priority[t]
    return total


def binned_affinity(batch, alpha, beta):
    base = max(len(batch.rows(OPEN)), 1)
    total = [0.0] * batch.experts
    for t in batch.rows(OPEN):
        best = max(batch.logits[t][e] for e in batch.own(t))
        for e in batch.own(t):
            bin_ = min(max(math.floor(alpha * (batch.logits[t][e] - best)), -beta), 0)
            total[e] += batch.priority[t] * base**bin_
    return total


def most_wanted(batch, score, budget=None, drop=0, protect=1):
    """The budget counts experts that OPEN rows want and no EXACT row has woken; protected ones come first."""
    candidates = batch.wanted() - batch.woken()
    protected = batch.protected(protect) & candidates
    rest = sorted(candidates - protected, key=lambda e: (-score[e], e))
    limit = len(candidates) - drop if budget is None else budget
    free = max(limit - len(protected), 0)
    if 0 < free < len(rest) and 0 < abs(score[rest[free - 1]] - score[rest[free]]) < 1e-6:
        raise Ambiguous
    return protected | set(rest[:free])


def covering(batch, score, share, protect=1):
    """The fewest by score that cover a share of it all; what EXACT rows have woken is covered already."""
    candidates = batch.wanted() - batch.woken()
    protected = batch.protected(protect) & candidates
    total, covered = sum(score), sum(score[e] for e in batch.woken())
    kept = set(protected)
    previous = None
    for e in sorted(candidates, key=lambda e: (e not in protected, -score[e], e)):
        if abs(covered - share * total) < 1e-6 and share < 1:
            raise Ambiguous
        if previous is not None and e not in protected and 0 < abs(score[e] - score[previous]) < 1e-6:
            raise Ambiguous
        if covered < share * total or share >= 1:
            kept.add(e)
        covered += score[e]
        previous = e
    return kept


@dataclass
class Expected:
    """One row after re-routing."""

    ids: list[int]
    weights: list[float]
    lost: list[bool]
    lost_ids: list[int]
    lost_weights: list[float]

    @property
    def changed(self):
        return any(self.lost)


def reroute(batch, active, refill=True, protect=1):
    """Re-route every row.

    Args:
        batch: The batch.
        active: A set of experts shared by the batch, or a set for each row.
        refill: Whether lost slots get the next best active experts.
        protect: Each OPEN row's best experts that stay, and with a shared set stay for everybody.
    """
    if isinstance(active, set):
        active = [active | batch.protected(protect)] * len(batch.role)
    else:
        active = [active[t] | set(batch.own(t)[:protect]) for t in range(len(batch.role))]
    woken = batch.woken()
    return [_row(batch, t, active[t] | woken, refill) for t in range(len(batch.role))]


def _row(batch, t, active, refill):
    ids, weights = batch.ids[t], batch.weights[t]
    untouched = Expected(ids, weights, [False] * len(ids), [0] * len(ids), [0.0] * len(ids))
    if batch.role[t] != OPEN:
        return untouched
    own = batch.own(t)
    lost = {e for e in own if e not in active}
    choice = batch.choice[t]
    spare = [e for e in active if e not in own and choice[e] > -math.inf] if refill and batch.repick else []
    spare.sort(key=lambda e: (-choice[e], e))
    if len(lost) == len(own) and not spare:
        lost.discard(own[0]) if own else None  # at least one expert
    if not lost:
        return untouched
    kept = [e for e in own if e not in lost]
    picked = spare[: len(lost)]
    # the best by the model's ranking; own experts rank before all others
    best = (kept or picked)[0]
    new_ids, queue, empty = [], list(picked), []
    for slot, e in enumerate(ids):
        if e not in lost:
            new_ids.append(e)
        elif queue:
            new_ids.append(queue.pop(0))
        else:
            new_ids.append(best)
            empty.append(slot)
    chosen = [e for slot, e in enumerate(new_ids) if 0 <= e < batch.experts and slot not in empty]
    new_weights = []
    for slot, e in enumerate(new_ids):
        if not 0 <= e < batch.experts:
            new_weights.append(weights[slot])  # the host's own slot
        elif slot in empty:
            new_weights.append(0.0)
        else:
            new_weights.append(_weight(batch, t, e, chosen))
    gone = [e in lost for e in ids]
    lost_ids = [e if e in lost else 0 for e in ids]
    lost_weights = [w if e in lost else 0.0 for e, w in zip(ids, weights, strict=True)]
    return Expected(new_ids, new_weights, gone, lost_ids, lost_weights)


def _weight(batch, t, expert, chosen):
    """The model's own rule. Where it cannot be derived for other experts, own ones keep what they had."""
    logits = batch.logits[t]
    if not batch.repick:
        weight = batch.weight(t, expert)
        if not batch.renormalise and batch.score != "softmax_over_chosen":
            return weight
        return weight / sum(batch.weight(t, e) for e in chosen) * batch.scale
    if batch.score == "softmax_over_chosen":
        return _softmax(logits, chosen, expert) * batch.scale
    if batch.score == "softmax":
        among = chosen if batch.renormalise else range(batch.experts)
        return _softmax(logits, among, expert) * batch.scale
    if not batch.renormalise:
        return _score(batch.score, logits[expert]) * batch.scale
    return _score(batch.score, logits[expert]) / sum(_score(batch.score, logits[e]) for e in chosen) * batch.scale


def _softmax(logits, among, expert):
    return 1.0 / sum(math.exp(logits[e] - logits[expert]) for e in among)


def _score(score, logit):
    if score == "sigmoid":
        return 1.0 / (1.0 + math.exp(-logit))
    return math.sqrt(math.log1p(math.exp(logit)))
