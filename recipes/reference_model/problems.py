"""Generated arithmetic word problems with worked answers, split by the arithmetic they contain.

A problem is a short story over one quantity that one to three steps change. A *step* is an operation with its two
operands; one step in sixteen, chosen by a hash, is held out. Training problems contain no held-out step, and every
held-out problem contains at least one, so that the two sets never share a problem under different wording.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import cache

from words import BOXES, NAMES, OBJECTS, PLACES, QUESTIONS, STARTS, STEPS, TIMES

HELD_OUT_SHARE = 16
KINDS = ("single", "chain-2", "chain-3")
LARGEST = 999
DRILL_LINES = 12


@dataclass(frozen=True)
class Step:
    """One operation on the running quantity."""

    op: str
    a: int
    b: int

    @property
    def result(self) -> int:
        """The quantity after the step."""
        results = {"add": self.a + self.b, "sub": self.a - self.b, "mul": self.a * self.b, "div": self.a // self.b}
        return results[self.op]

    def worked(self) -> str:
        """The step's line of the worked answer, place by place.

        Digits are written from the left, where every carry has to be known in advance; the places by themselves first
        turn one hard number into a few lookups.
        """
        a, b, result = self.a, self.b, self.result
        if self.op in ("add", "sub"):
            sign = 1 if self.op == "add" else -1
            places = [10**i for i in reversed(range(len(str(max(a, b)))))]
            parts = [(a // place % 10 + sign * (b // place % 10)) * place for place in places]
            places_apart = str(parts[0]) + "".join(f" {'-' if part < 0 else '+'} {abs(part)}" for part in parts[1:])
            equation = f"{a} {'+' if sign > 0 else '-'} {b} = "
            return f"{equation}{places_apart} = {result}" if len(parts) > 1 else f"{equation}{result}"
        factor = a if self.op == "mul" else result
        tens, units = factor - factor % 10, factor % 10
        split = tens > 0 and units > 0
        if self.op == "mul":
            return f"{a} * {b} = {tens * b} + {units * b} = {result}" if split else f"{a} * {b} = {result}"
        if not split:
            return f"{a} / {b} = {result}"
        return f"{a} / {b} = ({tens * b} + {units * b}) / {b} = {tens} + {units} = {result}"


@dataclass(frozen=True)
class Problem:
    """A problem text up to the worked answer, the worked answer, and the final number."""

    prompt: str
    solution: str
    answer: str
    kind: str
    steps: tuple[Step, ...]

    @property
    def text(self) -> str:
        """The whole document."""
        return self.prompt + self.solution


@cache
def is_held_out(op: str, a: int, b: int) -> bool:
    """Whether a step belongs to the held-out arithmetic; addition counts as the same in both orders."""
    if op == "add":
        a, b = min(a, b), max(a, b)
    digest = hashlib.sha256(f"{op} {a} {b}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0


def _first_step(rng: random.Random) -> Step:
    op = rng.choice(("add", "sub", "mul", "div"))
    if op == "add":
        return Step(op, rng.randint(5, 500), rng.randint(2, 400))
    if op == "sub":
        a = rng.randint(20, 600)
        return Step(op, a, rng.randint(2, a - 2))
    factor, b = rng.randint(10, 99), rng.randint(2, 9)
    return Step(op, factor, b) if op == "mul" else Step(op, factor * b, b)


def _next_step(state: int, rng: random.Random) -> Step:
    choices = []
    if state + 2 <= LARGEST:
        choices.append(Step("add", state, rng.randint(2, min(400, LARGEST - state))))
    if state >= 5:
        choices.append(Step("sub", state, rng.randint(2, state - 2)))
    if 10 <= state <= 99:
        choices.append(Step("mul", state, rng.randint(2, 9)))
    divisors = [b for b in range(2, 10) if state % b == 0 and 2 <= state // b <= 99]
    if divisors:
        choices.append(Step("div", state, rng.choice(divisors)))
    return rng.choice(choices)


def generate_problem(rng: random.Random, held_out: bool, kind: str | None = None) -> Problem:
    """Draws one problem from the training or the held-out arithmetic."""
    kind = kind or rng.choice(KINDS)
    while True:
        steps = [_first_step(rng)]
        while len(steps) <= KINDS.index(kind):
            steps.append(_next_step(steps[-1].result, rng))
        if any(is_held_out(s.op, s.a, s.b) for s in steps) == held_out:
            break
    words = {"name": rng.choice(NAMES), "obj": rng.choice(OBJECTS)}

    def fill(template: str, **numbers: int) -> str:
        extra = {"place": rng.choice(PLACES), "box": rng.choice(BOXES), "time": rng.choice(TIMES)}
        return template.format(**words, **extra, **numbers)

    story = [fill(rng.choice(STARTS), a=steps[0].a)]
    story += [fill(rng.choice(STEPS[step.op]), b=step.b) for step in steps]
    story.append(fill(rng.choice(QUESTIONS)))
    answer = str(steps[-1].result)
    solution = "".join(f"{step.worked()}\n" for step in steps) + f"Answer: {answer}\n"
    return Problem(f"Problem: {' '.join(story)}\nSolution:\n", solution, answer, kind, tuple(steps))


def _division_with_rest(rng: random.Random) -> str:
    """A worked line like those of exact divisions, with a rest.

    There are few exact divisions, and the last digit of the dividend nearly gives the quotient away, so that a model
    learns them by heart. With a rest it has to subtract.
    """
    b = rng.randint(2, 9)
    tens, units, rest = 10 * rng.randint(0, 9), rng.randint(1, 9), rng.randint(1, b - 1)
    a = (tens + units) * b + rest
    if tens == 0:
        return f"{a} / {b} = {units} rest {rest}"
    return f"{a} / {b} = ({tens * b} + {a - tens * b}) / {b} = {tens} + {units} = {tens + units} rest {rest}"


def generate_drill(rng: random.Random) -> str:
    """Draws a document of worked lines without stories: the same bytes hold four times as much arithmetic."""
    lines: list[str] = []
    while len(lines) < DRILL_LINES:
        step, draw = _first_step(rng), rng.random()
        if draw < 0.3:
            a = rng.randint(10, rng.choice((99, 500, LARGEST)))
            if rng.random() < 0.5:
                step = Step("sub", a, rng.randint(2, a - 2))
            else:
                b = rng.randint(2, rng.choice((99, 400)))
                step = Step("add", a, b) if a + b <= LARGEST else Step("add", b, a // 2)
        elif draw < 0.5:
            divisor = rng.randint(2, 9)
            step = Step("div", rng.randint(2, 99) * divisor, divisor)
        elif draw < 0.8:
            lines.append(_division_with_rest(rng))
            continue
        if not is_held_out(step.op, step.a, step.b):
            lines.append(step.worked())
    return "Practice:\n" + "\n".join(lines) + "\n"
