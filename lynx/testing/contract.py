"""The contract of a strategy: properties that must hold for every batch, tried on many by Hypothesis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from lynx.errors import ConfigError
from lynx.rerouting import Rerouted
from lynx.routing import Role, Routing
from lynx.selection import LayerSelection
from lynx.strategy import BaseStrategy, LayerInfo
from lynx.testing import guarantees, symmetries
from lynx.testing.case import Case
from lynx.testing.errors import ContractViolation
from lynx.testing.routings import LARGE_SHAPES, SHAPES, RoutingSpec, specs
from lynx.testing.transforms import same_bits

_STEPS = 4


def knob_towards_more_never_activates_fewer(case: Case) -> Iterator[str]:
    """Along the declared knob, from ``fewest`` to ``full``, the number of experts in use never falls."""
    knob = case.strategy.knob
    if knob is None or getattr(case.strategy, knob.option) is None:
        return
    before, value_before = -1, 0.0
    for value in knob.steps(case.layer, _STEPS):
        result = case.run(case.routing, case.bind(case.with_option(knob.option, value)))
        active = _in_use(case.routing, result)
        if active < before:
            yield f"{knob.option}={value_before} activates {before} experts, {knob.option}={value} only {active}"
        before, value_before = active, value


def full_setting_changes_nothing(case: Case) -> Iterator[str]:
    """At the knob's ``full``, every row comes back bit for bit."""
    knob = case.strategy.knob
    if knob is None or getattr(case.strategy, knob.option) is None:
        return
    value = knob.steps(case.layer, _STEPS)[-1]
    result = case.run(case.routing, case.bind(case.with_option(knob.option, value)))
    for name in ("ids", "weights"):
        got, wanted = getattr(result, name), getattr(case.routing, name)
        if not same_bits(got, wanted):
            yield f"with {knob.option}={value} {name} are {got.tolist()}, were {wanted.tolist()}"


def budget_is_respected_and_used(case: Case) -> Iterator[str]:
    """An option called ``budget`` counts the experts of OPEN rows' own top-k that stay; EXACT rows' are outside it."""
    budget = getattr(case.strategy, "budget", None)
    if not isinstance(budget, int):
        return
    rows = case.open_rows
    wanted = {e for row in rows for e in row.ids} - case.woken
    protected = {e for row in rows for e in row.ranked[: case.protect]} - case.woken
    # a row that had nothing left holds on to its own best expert, which is in nobody's budget
    used = {e for row in rows for e in row.used & row.active} - case.woken
    if not used <= wanted:
        yield f"in use are {sorted(used - wanted)}, which no OPEN row wanted"
    due = min(max(budget, len(protected)), len(wanted))
    if len(used) < due or (len(used) > due and not case.floor):  # a floor may take more
        yield f"budget={budget}, {len(protected)} protected, {len(wanted)} wanted: {len(used)} in use, not {due}"


INVARIANTS: tuple[Callable[[Case], Iterator[str]], ...] = (
    symmetries.inputs_not_changed,
    symmetries.same_batch_same_answer,
    guarantees.shapes_and_dtypes_unchanged,
    guarantees.ids_in_range,
    guarantees.no_expert_twice,
    guarantees.exact_and_padding_rows_untouched,
    guarantees.rows_that_lose_nothing_come_back_verbatim,
    guarantees.protected_experts_stay,
    guarantees.re_picks_are_the_best_active_experts,
    guarantees.empty_slots_repeat_the_best_kept_expert,
    guarantees.weights_follow_the_models_rule,
    guarantees.losses_are_told,
    guarantees.floor_is_kept,
    symmetries.order_of_tokens,
    symmetries.numbering_of_experts,
    symmetries.padding_is_silent,
    symmetries.rows_that_are_not_finite_stay_exact,
    symmetries.shift_of_logits,
    symmetries.leading_dimensions,
    full_setting_changes_nothing,
    knob_towards_more_never_activates_fewer,
    budget_is_respected_and_used,
)


def check_strategy(strategy: type[BaseStrategy] | BaseStrategy, *, max_examples: int = 60) -> None:
    """Hold a strategy to the contract, in one line of a test.

    Batches of every kind of router are made up, with rows of every role and both phases; the examples are the same on
    every run. A failing one is shrunk and printed as the ``make_routing(...)`` call that makes it.

    Args:
        strategy: A class, which is checked at its ``example()`` and at steps of its knob; or an instance, which is
            checked as it is.
        max_examples: How many batches to try.

    Raises:
        ContractViolation: Names the first invariant that does not hold, and what was violated.
    """
    given_class = isinstance(strategy, type)
    example = strategy.example() if isinstance(strategy, type) else strategy
    shapes = _fitting_shapes(example)

    @settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(spec=specs(shapes), layer_index=st.integers(0, 1), step=st.integers(0, _STEPS if given_class else 0))
    def contract(spec: RoutingSpec, layer_index: int, step: int) -> None:
        layer = _layer(spec, layer_index)
        case = Case(example, layer, spec)
        knob = example.knob
        if step and knob is not None:
            values = knob.steps(layer, _STEPS)
            case = replace(case, strategy=case.with_option(knob.option, values[min(step, len(values)) - 1]))
        for invariant in broken or INVARIANTS:
            try:
                complaint = next(invariant(case), None)
            except ContractViolation as error:
                raise ContractViolation(error.invariant, error.detail, repr(case.strategy)) from error.__cause__
            if complaint is not None:
                broken[:] = [invariant]
                raise ContractViolation(invariant.__name__.replace("_", "-"), complaint, repr(case.strategy))

    # once one is found to be broken, its example is shrunk and not that of another
    broken: list[Callable[[Case], Iterator[str]]] = []
    try:
        contract()
    except Flaky as error:
        detail = "an example that broke the contract did not break it when it was tried again"
        raise ContractViolation("same-batch-same-answer", detail, repr(example)) from error


def _layer(spec: RoutingSpec, index: int = 0) -> LayerInfo:
    rule = spec.build().rule
    return LayerInfo(f"layers.{index}.router", index, spec.experts, spec.top_k, rule, 0, num_layers=4)


def _fitting_shapes(strategy: BaseStrategy) -> list[tuple[int, int]]:
    """Return the pairs of ``E`` and ``k`` that the strategy's options fit."""
    fitting: list[tuple[int, int]] = []
    reasons: list[str] = []
    for experts, top_k in (*SHAPES, *LARGE_SHAPES):
        if fitting and (experts, top_k) in LARGE_SHAPES:
            break
        try:
            for index in (0, 1):
                LayerSelection(_layer(RoutingSpec(experts=experts, top_k=top_k, tokens=1), index), strategy)
            fitting.append((experts, top_k))
        except ConfigError as error:
            reasons.append(str(error))
    if not fitting:
        raise ContractViolation("binds", f"its options fit no layer that was tried: {reasons[-1]}", repr(strategy))
    return fitting


def _in_use(routing: Routing, result: Rerouted) -> int:
    """Count distinct experts with non-zero weight over all rows but padding."""
    used = (result.weights != 0) & (routing.role != Role.PADDING).unsqueeze(-1)
    return len(result.ids[used].unique())
