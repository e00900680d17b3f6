"""Reading numbers, words and sentences out of any text. Nothing here raises, whatever the text holds."""

from __future__ import annotations

import re
from collections.abc import Collection

# Of bounded length: a longer one is no answer to a small question, Python refuses to convert huge ones, and the
# search stays linear.
_NUMBER = r"(?:(?<![\w.])-)?(?<![0-9.])[0-9]{1,12}(?:,[0-9]{3}){0,4}(?:\.[0-9]{1,6})?(?![0-9])"
_NUMBERS = re.compile(_NUMBER)
_MARKED = re.compile(rf"(?:=|equals|answer is|answer:|result is|makes|gives|comes to)\s*({_NUMBER})", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")

# fmt: off
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on
_SPELLED = {
    **{word: n for n, word in enumerate(_ONES)},
    **{word: 10 * n for n, word in enumerate(_TENS, 2)},
    **{f"{ten}-{_ONES[one]}": 10 * n + one for n, ten in enumerate(_TENS, 2) for one in range(1, 10)},
}
_SPELLED_WORD = re.compile(rf"\b({'|'.join(sorted(_SPELLED, key=len, reverse=True))})\b", re.IGNORECASE)


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return [word.lower() for word in _WORD.findall(text)]


def sentences(text: str) -> int:
    """How many sentences a text has; an unfinished last one counts."""
    pieces = [piece for piece in _SENTENCE_END.split(text) if words(piece)]
    return len(pieces)


def mentions(text: str, phrase: str) -> bool:
    """Whether the phrase occurs as whole words, case aside."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


def in_digits(text: str) -> str:
    """The text with the typographic minus as a hyphen and, if it has no digits at all, with spelled numbers
    up to ninety-nine as digits (in "that one is 8", "one" is not a number)."""
    if _NUMBERS.search(text):
        return text.replace("\u2212", "-")
    return _SPELLED_WORD.sub(lambda found: str(_SPELLED[found[0].lower()]), text)


def number_before(text: str, unit: str) -> float | None:
    """The last number that stands right before the unit (a regular expression), or None."""
    found = re.findall(rf"({_NUMBER})\s*(?:{unit})\b", in_digits(text), re.IGNORECASE)
    return _value(found[-1]) if found else None


def stated_number(text: str, given: Collection[float]) -> float | None:
    """The number that a text gives as its answer, or None when it gives none or several.

    A marked number ("= 8", "the answer is 8") wins, the last one if there are several. Otherwise it must be the
    only number that is not among those `given` in the question, so that listing many numbers earns nothing.
    A given number counts only when there is no other.
    """
    digits = in_digits(text)
    marked = [_value(number) for number in _MARKED.findall(digits)]
    if own_marked := [value for value in marked if value not in given]:
        return own_marked[-1]
    found = {_value(number) for number in _NUMBERS.findall(digits)}
    own = found - set(given) or set(marked[-1:]) or found
    return own.pop() if len(own) == 1 else None


def closeness(value: float | None, target: float) -> float:
    """1 for the target, at most 0.1 for another number, less the further it is off; 0 for none."""
    if value is None:
        return 0.0
    if value == target:
        return 1.0
    return max(0.0, 0.1 * (1 - abs(value - target) / max(10.0, abs(target))))


def _value(number: str) -> float:
    return float(number.replace(",", ""))
