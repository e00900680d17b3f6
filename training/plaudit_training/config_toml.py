"""Run configurations as TOML: a reader that refuses what it does not know, and a writer it agrees with."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .config import ConfigError, RunConfig

FILE_NAME = "run.toml"


def read(path: Path) -> RunConfig:
    """The configuration in a TOML file. Raises ConfigError, naming the file and the key."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    try:
        return from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def write(config: RunConfig) -> str:
    """The configuration as TOML text; `read` gives the same configuration back."""
    return "\n".join(_table(to_dict(config), ())).lstrip("\n") + "\n"


def from_dict(data: Mapping[str, Any]) -> RunConfig:
    """A configuration from parsed TOML; what is absent has its default. Raises ConfigError."""
    config = _read(RunConfig, data, "")
    assert isinstance(config, RunConfig)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values, without those that are None: TOML has no null."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            plain[field.name] = to_dict(value)
        elif value is not None:
            plain[field.name] = list(value) if isinstance(value, tuple) else value
    return plain


def override(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The configuration with the values at dotted paths replaced. Raises ConfigError for an unknown path or
    a value of the wrong type."""
    data = to_dict(config)
    for path, value in changes.items():
        *sections, name = path.split(".")
        place = data
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = list(value) if isinstance(value, tuple) else value
    return from_dict(data)


def _table(data: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    plain = [f"{_key(key)} = {_value(value)}" for key, value in data.items() if not isinstance(value, dict)]
    lines = ["", f"[{'.'.join(map(_key, path))}]", *plain] if path and plain else plain
    for key, value in data.items():
        if isinstance(value, dict):
            lines += _table(value, (*path, key))
    return lines


def _key(key: str) -> str:
    return key if key and all(c.isascii() and (c.isalnum() or c in "-_") for c in key) else _string(key)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return _string(value) if isinstance(value, str) else repr(value)


def _string(text: str) -> str:
    """A TOML basic string: JSON's escapes are TOML's, but for DEL, which JSON leaves as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _read(kind: Any, data: Mapping[str, Any], path: str) -> Any:
    hints = get_type_hints(kind)
    if unknown := sorted(set(data) - set(hints)):
        raise ConfigError(f"unknown key {path}{unknown[0]}; known keys: {', '.join(hints)}")
    return kind(**{name: _convert(hints[name], value, f"{path}{name}") for name, value in data.items()})


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _convert(arguments[0], value, path)
    if origin is Literal:
        return _expect(value in arguments, value, path, f"one of {', '.join(arguments)}")
    if origin is tuple:
        _expect(isinstance(value, list), value, path, "a list")
        return tuple(_convert(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        _expect(isinstance(value, dict), value, path, "a table")
        return {key: _convert(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        _expect(isinstance(value, dict), value, path, "a table")
        return _read(kind, value, f"{path}.")
    return _scalar(kind, value, path)


def _scalar(kind: Any, value: Any, path: str) -> Any:
    if kind is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(_expect(is_number and math.isfinite(value), value, path, "a finite number"))
    is_plain = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    return _expect(is_plain, value, path, {int: "an integer", str: "a string", bool: "true or false"}[kind])


def _expect(condition: bool, value: Any, path: str, what: str) -> Any:
    if not condition:
        raise ConfigError(f"{path}: expected {what}, got {value!r}")
    return value
