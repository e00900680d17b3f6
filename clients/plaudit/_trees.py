"""Settings as trees of frozen dataclasses: made from the plain values of TOML, checked against the types of their
fields, and as plain values and TOML again. A value has a dotted path, as in `optim.learning_rate`."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import tomllib
import types
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import ConfigurationError

T = TypeVar("T")


def option(default: Any, help: str, *, low: float = -math.inf, high: float = math.inf, changes: bool = False) -> Any:
    """A field with its default, the sentence that explains it, the range of its numbers, and whether it may change
    when a run is resumed (what decides about results may not)."""
    about = {"help": help, "low": low, "high": high, "changes": changes}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=about)
    return dataclasses.field(default=default, metadata=about)


def leaves(kind: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Dotted path, field and type of every value, in the order of declaration."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaves(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field, hints[field.name]


def get(tree: Any, path: str) -> Any:
    """The value at a dotted path."""
    return attrgetter(path)(tree)


def flatten(tree: Any) -> dict[str, Any]:
    """Every value under its dotted path, in the order of declaration."""
    return {path: get(tree, path) for path, *_ in leaves(type(tree))}


def check_ranges(tree: Any) -> None:
    """Raise ConfigurationError for a number out of the range that its `option` gives."""
    for path, field, _ in leaves(type(tree)):
        value, low, high = get(tree, path), field.metadata["low"], field.metadata["high"]
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not low <= value <= high:
            raise ConfigurationError(f"{path} must lie in {low:g}..{high:g}, got {value}")


def read(path: Path, kind: type[T]) -> T:
    """The tree in a TOML file. Raises ConfigurationError, naming the file and the key."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read the configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from error
    try:
        return table(kind, data)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None


def table(kind: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """A tree from parsed TOML; what is absent has its default. Raises ConfigurationError for a value that is not of its
    type, and for a key that is not a field."""
    hints = get_type_hints(kind)
    if unknown := sorted(set(values) - set(hints)):
        raise ConfigurationError(f"unknown key {prefix}{unknown[0]}; known keys: {', '.join(hints)}")
    return kind(**{name: converted(hints[name], value, f"{prefix}{name}") for name, value in values.items()})


def changed(tree: T, changes: Mapping[str, Any]) -> T:
    """The tree with the values at dotted paths replaced; one path further, `data.columns.prompt`, is a key of a mapping
    that keeps its others. Raises ConfigurationError for an unknown path or a value that is not of its type."""
    known, changes = {path: hint for path, _, hint in leaves(type(tree))}, dict(changes)
    for path in [path for path in changes if get_origin(known.get(path.rpartition(".")[0])) is dict]:
        outer, key = path.rsplit(".", 1)
        changes[outer] = {**changes.get(outer, get(tree, outer)), key: changes.pop(path)}
    if unknown := sorted(changes.keys() - known):
        raise ConfigurationError(f"unknown key {unknown[0]}; known keys: {', '.join(known)}")
    given = {path: converted(known[path], value, path) for path, value in changes.items()}
    made: T = _made(type(tree), flatten(tree) | given)
    return made


def _made(kind: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    hints = get_type_hints(kind).items()
    inside = {n: _made(hint, values, f"{prefix}{n}.") for n, hint in hints if dataclasses.is_dataclass(hint)}
    return kind(**{n: inside[n] if n in inside else values[prefix + n] for n, _ in hints})


def converted(kind: Any, value: Any, path: str) -> Any:
    """The value as `kind`: int, float, str, bool, Literal, tuple[X, ...], dict[str, X], X | None or a dataclass of
    them. Raises ConfigurationError."""
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
        return table(kind, _expect(isinstance(value, dict), value, path, "a table"), f"{path}.")  # type: ignore[arg-type]
    if kind is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(_expect(is_number and abs(value) <= sys.float_info.max, value, path, "a finite number"))
    if isinstance(value, str):  # a name of a file that is not UTF-8 has surrogates
        _expect(not any("\ud800" <= letter <= "\udfff" for letter in value), value, path, "text that UTF-8 can hold")
    is_plain = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    return _expect(is_plain, value, path, {int: "an integer", str: "a string", bool: "true or false"}[kind])


def _expect(condition: bool, value: Any, path: str, what: str) -> Any:
    if not condition:
        raise ConfigurationError(f"{path}: expected {what}, got {value!r}")
    return value


def plain(tree: Any) -> dict[str, Any]:
    """Plain values in tables, without those that are None: TOML has no null."""
    values = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    return {
        name: plain(value) if dataclasses.is_dataclass(value) else list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if value is not None
    }


def toml(tree: Any) -> str:
    """The tree as TOML text; `read` gives the same tree back."""
    return "\n".join(_lines(plain(tree), ())).lstrip("\n") + "\n"


def _lines(data: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    plain = [f"{_key(key)} = {_text(value)}" for key, value in data.items() if not isinstance(value, dict)]
    lines = ["", f"[{'.'.join(map(_key, path))}]", *plain] if path and plain else plain
    for key, value in data.items():
        if isinstance(value, dict):
            lines += _lines(value, (*path, key))
    return lines


def _key(key: str) -> str:
    return key if key and all(c.isascii() and (c.isalnum() or c in "-_") for c in key) else _text(key)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, str):  # JSON's escapes are TOML's, but for DEL, which JSON leaves as it is
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
