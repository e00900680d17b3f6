"""Small sums. Wrong answers are off by a little or by a lot."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from .family import Family
from .text import closeness, stated_number, words
from .wording import dressed, opened

_RAMBLING_WORDS = 60
# fmt: off
_ASKED = (
    "What is {sum}?", "Compute {sum}.", "Work out {sum}.", "{sum} = ?", "How much is {sum}?",
    "Tell me {sum}.", "Can you calculate {sum}?", "What does {sum} come to?", "Give me the result of {sum}.",
    "Solve {sum} for me.",
)
_ANSWERED = (
    "{n}", "{n}.", "The answer is {n}.", "It is {n}.", "{sum} = {n}", "{sum} = {n}.", "That makes {n}.",
    "The result is {n}.", "If you work it out, {sum} comes to {n}.",
)
_EVASIONS = (
    "A nice sum.", "It depends.", "Use a calculator.", "Good sums need time.", "I would have to think.",
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Sum:
    """`left operator right` and its value."""

    left: int
    operator: str
    right: int
    value: int

    @property
    def text(self) -> str:
        return f"{self.left} {self.operator} {self.right}"


def draw(rng: Random) -> tuple[str, Sum]:
    left, right, operator = rng.randint(2, 9), rng.randint(2, 9), rng.choice("+-*")
    if operator == "-":
        left, right = left + right, rng.choice((left, right))
    value = {"+": left + right, "-": left - right, "*": left * right}[operator]
    task = Sum(left, operator, right, value)
    return opened(rng, rng.choice(_ASKED).format(sum=task.text)), task


def quality(task: Sum, response: str) -> float:
    """1 for the right number, at most 0.1 for a wrong one, 0 for none; a fifth less for rambling."""
    score = closeness(stated_number(response, (task.left, task.right)), task.value)
    return score * (0.8 if len(words(response)) > _RAMBLING_WORDS else 1.0)


def candidates(task: Sum, rng: Random) -> list[str]:
    near = task.value + rng.choice((-3, -2, -1, 1, 2, 3))
    far = rng.choice((task.value * 10, task.value + 50, 0 if task.value > 12 else 99))
    answers = [_answer(rng, task, number) for number in (task.value, task.value, near, far)]
    return [*answers, dressed(rng, rng.choice(_EVASIONS))]


def _answer(rng: Random, task: Sum, number: int) -> str:
    return dressed(rng, rng.choice(_ANSWERED).format(n=number, sum=task.text))


FAMILY = Family(draw, quality, candidates)
