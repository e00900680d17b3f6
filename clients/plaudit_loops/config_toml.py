"""Configurations as TOML: a reader that refuses what it does not know, and a writer it agrees with."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from plaudit_model import toml_values

from . import config as configs
from .errors import ConfigError

C = TypeVar("C", bound=configs.Config)
FILE_NAME = "run.toml"


def read(path: Path, kind: type[C]) -> C:
    """The configuration in a TOML file. Raises ConfigError, naming the file and the key."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    try:
        return build(kind, dict(_flat(tables)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def named(path: Path) -> set[str]:
    """The dotted paths that a TOML file which can be read gives a value."""
    return {name for name, _ in _flat(tomllib.loads(path.read_text(encoding="utf-8")))}


def write(config: configs.Config) -> str:
    """The configuration as TOML text; `read` gives the same configuration back. What is None is left out."""
    tables: dict[str, list[str]] = {"": []}
    for path, value in configs.flatten(config).items():
        section, _, name = path.rpartition(".")
        if value is not None:
            tables.setdefault(section, []).append(f"{name} = {toml_values.text(value)}")
    parts = ["\n".join([f"[{section}]", *lines] if section else lines) for section, lines in tables.items() if lines]
    return "\n\n".join(parts) + "\n"


def build(kind: type[C], values: Mapping[str, Any], base: C | None = None) -> C:
    """A configuration from values at dotted paths; what is absent is that of `base`, or the default. Raises
    ConfigError for an unknown path, a value of the wrong type or out of range."""
    known = {path: hint for path, _, hint in configs.leaves(kind)}
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(f"unknown key {unknown[0]}; known keys: {', '.join(known)}")
    start = configs.flatten(base if base is not None else kind())
    try:
        given = {path: toml_values.converted(known[path], value, path) for path, value in values.items()}
    except toml_values.BadValue as error:
        raise ConfigError(str(error)) from None
    config = _make(kind, start | given, "")
    assert isinstance(config, kind)
    configs.check(config)
    return config


def _make(kind: type, values: Mapping[str, Any], prefix: str) -> Any:
    made, default = {}, kind()
    for name in dict.fromkeys(path[len(prefix) :].partition(".")[0] for path in values if path.startswith(prefix)):
        inside = f"{prefix}{name}."
        is_value = prefix + name in values
        made[name] = values[prefix + name] if is_value else _make(type(getattr(default, name)), values, inside)
    return kind(**made)


def _flat(tables: Mapping[str, Any], prefix: str = "") -> Any:
    for key, value in tables.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
