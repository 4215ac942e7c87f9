"""Where attached models fare differently from plain ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from session import Outcome

Outcomes = dict[str, Outcome]


@dataclass
class Comparison:
    """Plain and attached outcomes of one family.

    Attributes:
        different: Tests with another outcome, each with both in words.
        expected: Tests with another outcome that must have one.
        missing: Tests that must have another outcome and have not.
        flaky: Tests that came out differently once, and the same when both were run again.
    """

    plain: Outcomes
    attached: Outcomes
    different: dict[str, str] = field(default_factory=dict)
    expected: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    flaky: list[str] = field(default_factory=list)

    @property
    def counted(self) -> Counter[str]:
        """Models that were attached, and steps in which a selection acted, by phase."""
        total: Counter[str] = Counter()
        for outcome in self.attached.values():
            total.update({key: outcome.lynx.get(key, 0) for key in ("attached", "prefill", "decode")})
        return total

    @property
    def refused(self) -> list[str]:
        """Models that Lynx did not take."""
        return sorted({refusal for outcome in self.attached.values() for refusal in outcome.lynx.get("refused", ())})

    @property
    def faults(self) -> list[str]:
        """Everything that must not be."""
        faults = [f"{test}: {words}" for test, words in self.different.items()]
        faults += [f"{test}: was to come out differently, and did not" for test in self.missing]
        faults += [f"not attached: {refusal}" for refusal in self.refused]
        faults += [f"nothing was counted: {key}" for key in ("attached", "prefill", "decode") if not self.counted[key]]
        return faults


def compare(
    plain: Outcomes,
    attached: Outcomes,
    expected: Iterable[str],
    again: Callable[[list[str]], tuple[Outcomes, Outcomes]],
) -> Comparison:
    """Compare test by test; what differs is run again, and differs if it does so again.

    Args:
        plain: By name of the test.
        attached: The same.
        expected: Beginnings of the names of tests that must differ.
        again: Runs tests once more, plain and attached.
    """
    found = Comparison(plain, attached)
    for test in differing(plain, attached):
        if _expected(test, expected):
            found.expected.append(test)
        else:
            found.different[test] = f"plain {_words(plain.get(test))}, attached {_words(attached.get(test))}"
    passed = [test for test, outcome in plain.items() if outcome.result == "passed"]
    found.missing = [test for test in passed if _expected(test, expected) and test not in found.expected]
    if found.different:
        tests = sorted({test.partition(" ")[0] for test in found.different})
        persistent = {test.partition(" ")[0] for test in differing(*again(tests))}
        found.flaky = [test for test in found.different if test.partition(" ")[0] not in persistent]
        for test in found.flaky:
            del found.different[test]
    return found


def differing(plain: Outcomes, attached: Outcomes) -> list[str]:
    """Names of the tests that are in one alone, or came out differently."""
    return [
        test
        for test in sorted(plain.keys() | attached.keys())
        if test not in plain or test not in attached or plain[test].compared != attached[test].compared
    ]


def results(outcomes: Outcomes) -> Counter[str]:
    """Count tests by result; subtests are not counted apart."""
    return Counter(outcome.result for test, outcome in outcomes.items() if " " not in test)


def _expected(test: str, expected: Iterable[str]) -> bool:
    return test.partition("::")[2].startswith(tuple(expected))


def _words(outcome: Outcome | None) -> str:
    if outcome is None:
        return "not there"
    reason = f" ({outcome.reason})" if outcome.reason else ""
    return f"{outcome.result}{reason}" + (f" with tokens {outcome.tokens}" if outcome.tokens else "")
