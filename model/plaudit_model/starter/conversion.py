"""Unit conversion. Wrong answers use the wrong factor, the wrong unit, or are off by a little."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from .family import Family
from .text import closeness, number_before, stated_number
from .wording import dressed, opened


@dataclass(frozen=True, slots=True)
class Unit:
    singular: str
    plural: str

    @property
    def pattern(self) -> str:
        return f"{self.plural}|{self.singular}"


def _unit(singular: str, plural: str | None = None) -> Unit:
    return Unit(singular, plural or singular + "s")


_FACTORS = (
    (_unit("hour"), _unit("minute"), 60),
    (_unit("minute"), _unit("second"), 60),
    (_unit("day"), _unit("hour"), 24),
    (_unit("week"), _unit("day"), 7),
    (_unit("year"), _unit("month"), 12),
    (_unit("kilometre"), _unit("metre"), 1000),
    (_unit("metre"), _unit("centimetre"), 100),
    (_unit("kilogram"), _unit("gram"), 1000),
    (_unit("yard"), _unit("foot", "feet"), 3),
    (_unit("dozen"), _unit("egg"), 12),
)
_ANY_UNIT = "|".join(unit.pattern for source, target, _ in _FACTORS for unit in (source, target))
# fmt: off
_ASKED = (
    "How many {to} are {n} {source}?", "Convert {n} {source} to {to}.", "{n} {source} in {to}?",
    "What is {n} {source} in {to}?", "Express {n} {source} in {to}.", "How many {to} do {n} {source} have?",
    "I have {n} {source}. How many {to} is that?",
)
_ANSWERED = (
    "{value} {to}", "{value} {to}.", "That is {value} {to}.", "{n} {source} are {value} {to}.",
    "It makes {value} {to}.", "In {n} {source} there are {value} {to}.", "You get {value} {to}.",
)
_EVASIONS = (
    "That depends on the {source}.", "It is a lot of {to}.", "You should measure the {source} first.",
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Conversion:
    """`amount` of `source` is `value` of `target`."""

    amount: int
    source: Unit
    target: Unit
    value: int


def draw(rng: Random) -> tuple[str, Conversion]:
    source, target, factor = rng.choice(_FACTORS)
    amount = rng.randint(2, 5)
    prompt = rng.choice(_ASKED).format(n=amount, source=source.plural, to=target.plural)
    return opened(rng, prompt), Conversion(amount, source, target, amount * factor)


def quality(task: Conversion, response: str) -> float:
    """1 for the right number with its unit or with none, 0.5 if it comes with another unit, at most 0.1 for a
    wrong number, 0 for none."""
    with_unit = number_before(response, task.target.pattern)
    if with_unit is not None:
        return closeness(with_unit, task.value)
    score = closeness(stated_number(response, (task.amount,)), task.value)
    wrong_unit = number_before(response, _ANY_UNIT) == task.value
    return min(score, 0.5) if wrong_unit else score


def candidates(task: Conversion, rng: Random) -> list[str]:
    other = rng.choice([f for _, _, f in _FACTORS if f * task.amount != task.value])
    near = task.value + rng.choice((-2, 2, 10, 100, task.value))
    swapped = Conversion(task.amount, task.target, task.source, task.value)
    answers = [_answer(rng, task, value) for value in (task.value, task.value, task.amount * other, near)]
    evasion = rng.choice(_EVASIONS).format(source=task.source.plural, to=task.target.plural)
    return [*answers, _answer(rng, swapped, task.value), dressed(rng, evasion)]


def _answer(rng: Random, task: Conversion, value: int) -> str:
    units = {"source": task.source.plural, "to": task.target.plural}
    return dressed(rng, rng.choice(_ANSWERED).format(value=value, n=task.amount, **units))


FAMILY = Family(draw, quality, candidates)
