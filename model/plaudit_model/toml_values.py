"""Values of a configuration in TOML: checked against a type on the way in, and as text on the way out."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class BadValue(ValueError):
    """A value is not of its type; the message names its key."""


def text(value: Any) -> str:
    """A number, a string, a truth value or a list of them, as TOML."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(text, value)) + "]"
    if isinstance(value, str):  # JSON's escapes are TOML's, but for DEL, which JSON leaves as it is
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def converted(kind: Any, value: Any, path: str) -> Any:
    """The value as `kind`: int, float, str, bool, Literal, tuple[X, ...], dict[str, X], X | None or a dataclass of
    them, whose absent fields have their defaults. Raises BadValue."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else converted(arguments[0], value, path)
    if origin is Literal:
        return _expect(value in arguments, value, path, f"one of {', '.join(arguments)}")
    if origin is tuple:
        _expect(isinstance(value, (list, tuple)), value, path, "a list")
        return tuple(converted(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        _expect(isinstance(value, dict), value, path, "a table")
        return {key: converted(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return table(kind, _expect(isinstance(value, dict), value, path, "a table"), f"{path}.")
    return _scalar(kind, value, path)


def table(kind: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A dataclass from the values of its fields. Raises BadValue, for a key that is not a field too."""
    hints = get_type_hints(kind)
    if unknown := sorted(set(values) - set(hints)):
        raise BadValue(f"unknown key {prefix}{unknown[0]}; known keys: {', '.join(hints)}")
    return kind(**{name: converted(hints[name], value, f"{prefix}{name}") for name, value in values.items()})


def _scalar(kind: Any, value: Any, path: str) -> Any:
    if kind is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(_expect(is_number and math.isfinite(value), value, path, "a finite number"))
    is_plain = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    return _expect(is_plain, value, path, {int: "an integer", str: "a string", bool: "true or false"}[kind])


def _expect(condition: bool, value: Any, path: str, what: str) -> Any:
    if not condition:
        raise BadValue(f"{path}: expected {what}, got {value!r}")
    return value
