"""Values of an answer, checked. Each function gives the value or raises ResponseInvalid, saying `where` it stood."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NoReturn, TypeGuard

from .errors import ResponseInvalid

LARGEST = sys.float_info.max


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number that a float can hold; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


def finite(value: Any, where: str) -> float:
    """The number as a float."""
    if not is_number(value):
        invalid(f"{where} must be a finite number, got {value!r}")
    return float(value)


def probability(value: Any, where: str) -> float:
    """A number between 0 and 1."""
    number = finite(value, where)
    if not 0 <= number <= 1:
        invalid(f"{where} must lie between 0 and 1, got {value!r}")
    return number


def count(value: Any, where: str) -> int:
    """An integer that is not negative."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        invalid(f"{where} must be a count, got {value!r}")
    return value


def positive(value: Any, where: str) -> int:
    """An integer of at least 1."""
    number = count(value, where)
    if number < 1:
        invalid(f"{where} must be at least 1, got 0")
    return number


def text(values: Mapping[str, Any], name: str) -> str:
    """A text, by its name in an object."""
    if not isinstance(values.get(name), str):
        invalid(f"{name!r} must be a text, got {values.get(name)!r}")
    return str(values[name])


def optional_text(value: Any) -> str | None:
    """A text that is not empty, else None. Never raises."""
    return value if isinstance(value, str) and value else None


def object_of(value: Any, where: str) -> Mapping[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        invalid(f"{where} must be a JSON object, got {type(value).__name__}")
    return value


def list_of(answer: Mapping[str, Any], name: str) -> list[Any]:
    """A list, by its name in an object."""
    if not isinstance(answer.get(name), list):
        invalid(f"{name!r} must be a list, got {type(answer.get(name)).__name__}")
    return list(answer[name])


def invalid(what: str) -> NoReturn:
    """Raise ResponseInvalid."""
    raise ResponseInvalid(f"the server's answer cannot be used: {what}")
