"""Run configurations as TOML: a reader that refuses what it does not know, and a writer it agrees with."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plaudit_model import toml_values

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
    try:
        config = toml_values.table(RunConfig, data)
    except toml_values.BadValue as error:
        raise ConfigError(str(error)) from None
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
    plain = [f"{_key(key)} = {toml_values.text(value)}" for key, value in data.items() if not isinstance(value, dict)]
    lines = ["", f"[{'.'.join(map(_key, path))}]", *plain] if path and plain else plain
    for key, value in data.items():
        if isinstance(value, dict):
            lines += _table(value, (*path, key))
    return lines


def _key(key: str) -> str:
    return key if key and all(c.isascii() and (c.isalnum() or c in "-_") for c in key) else toml_values.text(key)
