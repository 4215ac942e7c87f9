"""Strategies and cores that are wrong in one way each, and the invariants that may say so."""

from dataclasses import replace
from typing import ClassVar, Literal

import torch

from lynx.keep import ByDemand, ByMass, ByRank, most_wanted
from lynx.rerouting import Rerouted, reroute
from lynx.routing import Role
from lynx.strategy import Keep, Knob, SelectionStrategy
from lynx.testing.contract import INVARIANTS


class VotesWithPadding(SelectionStrategy):
    name: Literal["votes-with-padding"] = "votes-with-padding"

    def select(self, routing):
        return routing.spread(routing.slot_rank < 1).any(-2)


class PrefersTheFirstToken(SelectionStrategy):
    name: Literal["prefers-the-first-token"] = "prefers-the-first-token"

    def select(self, routing):
        return routing.own[..., 0, :]


class CountsPositions(SelectionStrategy):
    """Later tokens have more say."""

    name: Literal["counts-positions"] = "counts-positions"
    budget: int = 4

    def select(self, routing):
        say = 2.0 ** torch.arange(routing.role.shape[-1]).unsqueeze(-1)
        return most_wanted(routing, (routing.mass * say).sum(-2), self.budget)


class KeepsEvenIds(SelectionStrategy):
    name: Literal["keeps-even-ids"] = "keeps-even-ids"

    def select(self, routing):
        return routing.wanted & (torch.arange(routing.num_experts) % 2 == 0)


class KeepsHighIds(SelectionStrategy):
    """Ties are broken by the highest id."""

    name: Literal["keeps-high-ids"] = "keeps-high-ids"
    budget: int = 3

    def select(self, routing):
        score = routing.demand("count") + torch.arange(routing.num_experts) / 1000.0
        return most_wanted(routing, score, self.budget)


class WritesToItsInput(SelectionStrategy):
    name: Literal["writes-to-its-input"] = "writes-to-its-input"

    def select(self, routing):
        routing.logits.sub_(1.0)
        return routing.wanted


class WritesToTheMass(SelectionStrategy):
    name: Literal["writes-to-the-mass"] = "writes-to-the-mass"

    def select(self, routing):
        routing.slot_mass.clamp_(0.1, 0.2)
        return routing.wanted


class Rolls(SelectionStrategy):
    name: Literal["rolls"] = "rolls"

    def select(self, routing):
        return routing.wanted & (torch.rand(routing.num_experts) < 0.5)


class Remembers(SelectionStrategy):
    """Keeps what it kept in an earlier batch."""

    name: Literal["remembers"] = "remembers"

    def bind(self, layer):
        memory = torch.zeros(layer.num_experts, dtype=torch.bool)

        class Bound:
            def keep(_, routing):
                top = ByRank(1).keep(routing)
                memory.logical_or_(top if top.ndim == 1 else top.any(0))
                return self.secured(routing, memory & routing.wanted | top)

        return Bound()

    def select(self, routing):
        return ByRank(1).keep(routing)


class TurnsTheKnobTheOtherWay(SelectionStrategy):
    name: Literal["turns-the-knob-the-other-way"] = "turns-the-knob-the-other-way"
    top: int = 1
    knob: ClassVar[Knob] = Knob("top", fewest="k", full=1)

    def rule(self):
        return ByRank(self.top)


class FullIsNotAll(SelectionStrategy):
    """Off by one."""

    name: Literal["full-is-not-all"] = "full-is-not-all"
    top: int = 1
    knob: ClassVar[Knob] = Knob("top", fewest=1, full="k")

    def rule(self):
        return ByRank(self.top - 1)


class TurnsBackHalfway(SelectionStrategy):
    """More and more, but for one step in between; full is full."""

    name: Literal["turns-back-halfway"] = "turns-back-halfway"
    share: float = 1.0
    knob: ClassVar[Knob] = Knob("share", fewest=0.0, full=1.0)

    def rule(self):
        return ByDemand(budget=[1, 99, 2, 99][round(3 * self.share)])


class ExceedsItsBudget(SelectionStrategy):
    name: Literal["exceeds-its-budget"] = "exceeds-its-budget"
    budget: int = 2

    def rule(self):
        return ByDemand(budget=self.budget + 1)


class LeavesBudgetUnused(SelectionStrategy):
    """Spends some on experts that are there for free."""

    name: Literal["leaves-budget-unused"] = "leaves-budget-unused"
    budget: int = 3

    def select(self, routing):
        order = torch.sort(routing.demand(), dim=-1, descending=True, stable=True).indices
        return routing.wanted & (order.argsort(-1) < self.budget)


class WakesTheUnwanted(SelectionStrategy):
    """Fills its budget from all experts."""

    name: Literal["wakes-the-unwanted"] = "wakes-the-unwanted"
    budget: int = 3

    def select(self, routing):
        score = routing.logits.masked_fill(~routing.open_rows.unsqueeze(-1), 0.0).sum(-2)
        return torch.sort(score, dim=-1, descending=True, stable=True).indices.argsort(-1) < self.budget


class ComparesRawLogits(SelectionStrategy):
    """An absolute threshold on logits, whose zero means nothing under a softmax."""

    name: Literal["compares-raw-logits"] = "compares-raw-logits"

    def select(self, routing):
        return ((routing.logits > 1.0) & routing.own).any(-2)


class OneBatchOnly(SelectionStrategy):
    """Takes the first dimension for the tokens."""

    name: Literal["one-batch-only"] = "one-batch-only"

    def select(self, routing):
        kept = (routing.rank < 1).any(0)
        return kept if kept.ndim == 1 else kept.any(0).expand(routing.choice.shape)


class Raises(SelectionStrategy):
    name: Literal["raises"] = "raises"

    def select(self, routing):
        return routing.wanted & torch.ones(7, dtype=torch.bool)


class ReturnsScores(SelectionStrategy):
    name: Literal["returns-scores"] = "returns-scores"

    def select(self, routing):
        return routing.demand()


class FitsNoLayer(SelectionStrategy):
    name: Literal["fits-no-layer"] = "fits-no-layer"

    def bind(self, layer):
        self.check_at_most("protect", "k", replace(layer, top_k=0))
        return self


STRATEGIES = {
    VotesWithPadding: {"padding-is-silent"},
    PrefersTheFirstToken: {"order-of-tokens"},
    CountsPositions: {"order-of-tokens"},
    KeepsEvenIds: {"numbering-of-experts"},
    KeepsHighIds: {"numbering-of-experts"},
    WritesToItsInput: {"inputs-not-changed"},
    WritesToTheMass: {"inputs-not-changed"},
    # what fails first is a matter of chance, as its answers are
    Rolls: {invariant.__name__.replace("_", "-") for invariant in INVARIANTS},
    Remembers: {"same-batch-same-answer", "numbering-of-experts", "leading-dimensions", "padding-is-silent"},
    TurnsTheKnobTheOtherWay: {"full-setting-changes-nothing"},
    FullIsNotAll: {"full-setting-changes-nothing"},
    TurnsBackHalfway: {"knob-towards-more-never-activates-fewer"},
    ExceedsItsBudget: {"budget-is-respected-and-used"},
    LeavesBudgetUnused: {"budget-is-respected-and-used"},
    WakesTheUnwanted: {"budget-is-respected-and-used"},
    ComparesRawLogits: {"shift-of-logits"},
    OneBatchOnly: {"leading-dimensions"},
    Raises: {"runs"},
    ReturnsScores: {"runs"},
    FitsNoLayer: {"binds"},
}


def unprotected(strategy, routing, active):
    """A stand-in for `SelectionStrategy.secured` that forgets `protect`."""
    return Keep((active | ByMass(strategy.floor).keep(routing)).unsqueeze(-2), True)


def floorless(strategy, routing, active):
    """A stand-in for `SelectionStrategy.secured` that forgets `floor`."""
    return Keep((active | routing.protected(strategy.protect).any(-2)).unsqueeze(-2), True)


# Cores: stand-ins for `lynx.rerouting.reroute`.


def drops_the_best(routing, keep):
    """Takes every token's best expert away where there is another."""
    best = routing.spread((routing.slot_rank < 1) & routing.open_rows.unsqueeze(-1)).any(-2)
    return reroute(routing, replace(keep, active=keep.active & ~best.unsqueeze(-2)))


def re_routes_every_row(routing, keep):
    """Takes EXACT rows for OPEN ones."""
    role = torch.where(routing.role == int(Role.EXACT), torch.full_like(routing.role, int(Role.OPEN)), routing.role)
    return reroute(routing.with_role(role), keep)


def does_not_wake(routing, keep):
    """Ignores what EXACT rows have woken."""
    role = torch.where(routing.role == int(Role.EXACT), torch.full_like(routing.role, int(Role.PADDING)), routing.role)
    return reroute(routing.with_role(role), keep)


def picks_the_forbidden(routing, keep):
    """Ranks by logits, which know of no group masks."""
    return reroute(replace(routing, choice=routing.logits), keep)


def always_renormalises(routing, keep):
    """Also where the model does not."""
    result = reroute(routing, keep)
    weights = result.weights / result.weights.sum(-1, keepdim=True) * routing.rule.scale
    return replace(result, weights=torch.where(result.lost.any(-1, keepdim=True), weights, result.weights))


def rounds_unchanged_rows(routing, keep):
    """Works out the weights of all rows anew."""
    result = reroute(routing, keep)
    opened = routing.open_rows.unsqueeze(-1)
    return replace(result, weights=torch.where(opened, result.weights * 1.001, result.weights))


def forgets_the_scale(routing, keep):
    return reroute(replace(routing, rule=replace(routing.rule, scale=1.0)), keep)


def fills_with_a_sentinel(routing, keep):
    """Marks empty slots with id -1."""
    result = reroute(routing, keep)
    return replace(result, ids=result.ids.masked_fill(result.lost & (result.weights == 0), -1))


def fills_with_the_worst(routing, keep):
    """Repeats the id that was lost in empty slots."""
    result = reroute(routing, keep)
    empty = result.lost & (result.weights == 0)
    return replace(result, ids=torch.where(empty, result.lost_ids, result.ids))


def changes_the_type(routing, keep):
    result = reroute(routing, keep)
    return replace(result, weights=result.weights.double())


def repeats_an_expert(routing, keep):
    """Every lost slot gets the best expert again, at full weight."""
    result = reroute(routing, keep)
    best = result.ids.gather(-1, result.weights.argmax(-1, keepdim=True))
    return replace(result, ids=torch.where(result.lost & (result.weights != 0), best, result.ids))


def forgets_losses(routing, keep):
    result = reroute(routing, keep)
    return replace(result, own_weights=torch.zeros_like(result.own_weights))


def leaves_rows_empty(routing, keep):
    """All weights 0 in a row that lost something."""
    result = reroute(routing, keep)
    return replace(result, weights=result.weights.masked_fill(result.lost.any(-1, keepdim=True), 0.0))


def overwrites_padding(routing, keep):
    """Tidies padding rows up."""
    result: Rerouted = reroute(routing, keep)
    padding = (routing.role == int(Role.PADDING)).unsqueeze(-1)
    return replace(result, ids=result.ids.masked_fill(padding, 0))


CORES = {
    drops_the_best: {
        "rows-that-lose-nothing-come-back-verbatim",
        "full-setting-changes-nothing",
        "floor-is-kept",
    },
    re_routes_every_row: {"exact-and-padding-rows-untouched", "rows-that-are-not-finite-stay-exact"},
    does_not_wake: {"rows-that-lose-nothing-come-back-verbatim", "re-picks-are-the-best-active-experts"},
    picks_the_forbidden: {"re-picks-are-the-best-active-experts", "empty-slots-repeat-the-best-kept-expert"},
    always_renormalises: {"weights-follow-the-models-rule"},
    rounds_unchanged_rows: {"rows-that-lose-nothing-come-back-verbatim", "weights-follow-the-models-rule"},
    forgets_the_scale: {"weights-follow-the-models-rule"},
    fills_with_a_sentinel: {"ids-in-range"},
    fills_with_the_worst: {"re-picks-are-the-best-active-experts", "empty-slots-repeat-the-best-kept-expert"},
    changes_the_type: {"shapes-and-dtypes-unchanged"},
    repeats_an_expert: {"no-expert-twice"},
    forgets_losses: {"losses-are-told"},
    leaves_rows_empty: {"no-expert-twice"},
    overwrites_padding: {"exact-and-padding-rows-untouched", "padding-is-silent", "no-expert-twice"},
}
