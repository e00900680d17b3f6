"""`plaudit.toml`: defaults for the command line, one table a verb, checked against the verbs' own options."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .errors import ConfigurationError

FILE_NAME = "plaudit.toml"
_OTHERS = ("API_KEY", "COMPOSE_KEY", "CONFIG_FILE", "FAULT", "HOME", "KERNELS", "MAX_LENGTH", "TIMEOUT", "URL")
"""Variables whose names do not follow from a verb and an option."""


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


def unread(names: Iterable[str], command: Any, verb: str, verbs: Iterable[str]) -> list[str]:
    """Variables that look like options of the verb, or like what every verb reads, and are neither; with the nearest
    that is. Other verbs' are left to them, and names that are like none: deployments have some of their own, as
    PLAUDIT_SERVICE_PORT, which Kubernetes sets for a service `plaudit` and is no PLAUDIT_SERVE_PORT."""
    own, *others = (f"{one}_".replace("-", "_").upper() for one in (verb, *(one for one in verbs if one != verb)))
    known = {*_OTHERS, *_variables(command, own)}
    strange = {name[8:] for name in names if name.startswith("PLAUDIT_")} - known
    near = {one: get_close_matches(one, known, 1, 0.85) for one in strange if not one.startswith((*others, "SERVICE_"))}
    told = {name: f" (did you mean PLAUDIT_{found[0]}?)" if found else "" for name, found in near.items()}
    return sorted(f"PLAUDIT_{name}{said}" for name, said in told.items() if said or name.startswith(own))


def _variables(command: Any, prefix: str) -> Iterator[str]:
    yield from (prefix + option.name.upper() for option in command.params if option.param_type_name == "option")
    for name, subcommand in getattr(command, "commands", {}).items():
        yield from _variables(subcommand, f"{prefix}{name}_".replace("-", "_").upper())


def _with_underscores(table: dict[str, Any]) -> dict[str, Any]:
    """Tables keep their names, which are verbs; options get their Python names."""
    tables = {key: _with_underscores(value) for key, value in table.items() if isinstance(value, dict)}
    return tables | {key.replace("-", "_"): value for key, value in table.items() if key not in tables}
