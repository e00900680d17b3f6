"""`plaudit.toml`: defaults for the command line, one table a verb, checked against the verbs' own options."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import ConfigurationError

FILE_NAME = "plaudit.toml"


def table_of(path: Path) -> dict[str, Any]:
    """What a TOML file holds. Raises ConfigurationError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as TOML: {error}") from None


def read(path: Path | None) -> dict[str, Any]:
    """The tables of `path`, or of `plaudit.toml` in the current directory; empty if that is not there.

    Options may be written as on the command line (`max-length`) or as in Python (`max_length`).
    """
    chosen = path or Path(FILE_NAME)
    if chosen.exists():
        return _with_underscores(table_of(chosen))
    if path is not None:
        raise ConfigurationError(f"there is no configuration file {path}")
    return {}


def check_verbs(config: Mapping[str, Any], verbs: Iterable[str]) -> None:
    """Raise ConfigurationError for a table that is no verb, or a value outside of any table."""
    known = sorted(verbs)
    for name, table in config.items():
        if name not in known:
            raise ConfigurationError(f"{FILE_NAME}: unknown table [{name}]; verbs: {', '.join(known)}")
        if not isinstance(table, dict):
            raise ConfigurationError(f"{FILE_NAME}: {name!r} must be a table: write [{name}] and its options below")


def check_options(table: Mapping[str, Any], command: Any, where: str) -> None:
    """Raise ConfigurationError for a key of `table` that `command` (a click command or group) does not have."""
    subcommands = getattr(command, "commands", {})
    options = {option.name for option in command.params}
    for key, value in table.items():
        if isinstance(value, dict) and key in subcommands:
            check_options(value, subcommands[key], f"{where}.{key}")
        elif key not in options:
            known = ", ".join(sorted([*options, *subcommands]))
            raise ConfigurationError(f"{FILE_NAME}: [{where}] has the unknown key {key!r}; known: {known}")


def _with_underscores(table: dict[str, Any]) -> dict[str, Any]:
    """Tables keep their names, which are verbs; options get their Python names."""
    tables = {key: _with_underscores(value) for key, value in table.items() if isinstance(value, dict)}
    return tables | {key.replace("-", "_"): value for key, value in table.items() if key not in tables}
