"""What can be verified of a response: pure functions from texts to values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from .._extras import install
from ..errors import ConfigurationError
from . import patterns
from .config import Exact, JsonSchema, Length, Numeric, Regex, Term

_NUMBER = re.compile(
    r"(?:(?<![\w.])[-+\u2212])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?(?:/\d+)?", re.ASCII
)
_HUGE = re.compile(r"[eE][-+]?\d{4,}|.{1001,}", re.DOTALL)
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_LIGHT = re.compile(r"\\[,;!: ]|\\text\{[^{}]*\}|\\left|\\right|\\[%$]|[$%\s]")
_JSON_BLOCK = re.compile(r"```(?:json)?[^\S\n]*\n(.*?)```", re.DOTALL)


class TermError(Exception):
    """A term that has no value for an item: `code` and message."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def value_of(term: Term, response: str, reference: Any, tokens: int | None = None) -> float:
    """The value of a term that needs nothing but texts. Raises TermError."""
    try:
        return _value_of(term, response, reference, tokens)
    except TimeoutError:
        raise TermError("pattern_timeout", f"{term.name}: its pattern has no end on this response") from None


def _value_of(term: Term, response: str, reference: Any, tokens: int | None) -> float:
    match term:
        case Exact():
            return exact(term, response, _needed(term, reference))
        case Numeric():
            return numeric(term, response, _needed(term, reference))
        case Regex():
            return float(patterns.found(term.pattern, response, whole=term.whole))
        case JsonSchema():
            return json_schema(term, response)
        case Length():
            return length(term, response, tokens)
    raise TypeError(f"{type(term).__name__} needs more than texts")


def exact(term: Exact, response: str, reference: Any) -> float:
    """Whether the answer is the reference, or one of them. No match of `extract` is no right answer."""
    wanted = reference if isinstance(reference, list) else [reference]
    if not wanted or not all(isinstance(one, (str, int, float)) for one in wanted):
        raise TermError("bad_reference", f"{term.name}: the reference must be a text, or a list of texts")
    if term.extract is not None:
        found = patterns.last(term.extract, response)
        if found is None:
            return 0.0
        response = found
    return float(_even(response, term.case) in {_even(str(one), term.case) for one in wanted})


def numeric(term: Numeric, response: str, reference: Any) -> float:
    """Whether the response's number is the reference's, in exact arithmetic: 0.1 is a tenth."""
    wanted = number_in(str(reference)) if isinstance(reference, (str, int, float)) else None
    if wanted is None or isinstance(reference, bool):
        raise TermError("bad_reference", f"{term.name}: the reference holds no number")
    found = number_in(response)
    if found is None:
        return 0.0
    allowed = max(Fraction(str(term.tolerance)), Fraction(str(term.relative)) * abs(wanted))
    return float(abs(found - wanted) <= allowed)


def number_in(text: str) -> Fraction | None:
    """The number in the last `\\boxed{}`, which may hold `\\text{}` and signs of money and percent beside it
    (50% is 50), or, without one, the last number of the text: 1,234.5, -3, 2/3, 6.02e23, \\frac{1}{2}. None too for
    one of more than a thousand digits."""
    boxed = _last_boxed(text)
    if boxed is None:
        found = [match[0] for match in _NUMBER.finditer(text)]
        return _number(found[-1]) if found else None
    plain = _LIGHT.sub("", boxed.replace("{,}", ","))
    plain = _FRACTION.sub(r"\1/\2", plain)
    return _number(plain) if _NUMBER.fullmatch(plain) else None


def json_schema(term: JsonSchema, response: str) -> float:
    """Whether the response is JSON that fits. References to other documents are never fetched."""
    blocks = _JSON_BLOCK.findall(response)
    try:
        value = json.loads(blocks[-1] if blocks else response, parse_constant=_refuse)
        return float(schema_validator(term).is_valid(value))
    except (ValueError, RecursionError):
        return 0.0


def schema_validator(term: JsonSchema) -> Any:
    """The validator of a term's schema. Raises ConfigurationError if it is none."""
    try:
        from jsonschema import Draft202012Validator, SchemaError, ValidationError, validators
        from referencing import Registry
    except ImportError:
        raise ConfigurationError(f"a json_schema term needs jsonschema: {install('rewards')}") from None
    try:
        Draft202012Validator.check_schema(term.schema)
        schema = patterns.bounded(term.schema)
    except (SchemaError, ValueError) as error:
        raise ConfigurationError(
            f"term {term.name!r}: the schema is none: {getattr(error, 'message', error)}"
        ) from None

    def pattern(validator: Any, wanted: str, text: Any, _schema: Any) -> Iterator[Any]:
        if validator.is_type(text, "string") and not patterns.found(wanted, text):
            yield ValidationError("does not match")

    return validators.extend(Draft202012Validator, {"pattern": pattern})(schema, registry=Registry())


def length(term: Length, response: str, tokens: int | None) -> float:
    """Minus what is beyond the limit."""
    if term.unit == "tokens":
        if tokens is None:
            raise TermError("scoring_failed", f"{term.name}: {term.of} did not say how many tokens the item has")
        size = tokens
    else:
        size = len(response) if term.unit == "characters" else len(response.split())
    return -float(max(0, size - term.limit))


def reference_of(term: Term, reference: Any) -> Any:
    """The term's part of an item's reference; None if there is none. Raises TermError."""
    if term.reference_field is None:
        return reference
    if reference is not None and not isinstance(reference, dict):
        raise TermError("bad_reference", f"{term.name}: the reference must be an object with {term.reference_field!r}")
    return (reference or {}).get(term.reference_field)


def _needed(term: Term, reference: Any) -> Any:
    own = reference_of(term, reference)
    if own is None or own == "":
        raise TermError("missing_reference", f"{term.name}: the item has no reference (`labels` in /get_reward)")
    return own


def _even(text: str, case: bool) -> str:
    words = " ".join(text.split())
    return words if case else words.casefold()


def _last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...}, braces balanced; None if there is none, or it is not closed."""
    place = text.rfind("\\boxed{")
    if place < 0:
        return None
    depth, start = 0, place + len("\\boxed")
    for end, character in enumerate(text[start:], start=start):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start + 1 : end]
    return None


def _number(text: str) -> Fraction | None:
    """A number as it is written."""
    if _HUGE.search(text):
        return None
    above, _, below = text.replace(",", "").replace("\u2212", "-").partition("/")
    try:
        return Fraction(above.replace(".e", "e").replace(".E", "E").removesuffix(".")) / Fraction(below or "1")
    except (ValueError, ZeroDivisionError):
        return None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
