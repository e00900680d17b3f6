"""A configuration as a command line: every field is an option, explained by its own sentence.

`--some-name` for the field `some_name`; a list is given by repeating its option; what is not given is that of
`--config`, else the default.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer

from . import config as configs
from . import config_toml

C = TypeVar("C", configs.SftConfig, configs.DpoConfig, configs.RlConfig)
F = TypeVar("F", bound=Callable[..., None])


def takes(kind: type[configs.Config], argument: str = "") -> Callable[[F], F]:
    """Give a command the options of a configuration, in place of its `**given`; `argument` names the field that is a
    positional argument."""

    def decorate(command: F) -> F:
        known = inspect.signature(command, eval_str=True).parameters.values()
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in known if p.kind is not p.VAR_KEYWORD]
        added = [_parameter(path, field, hint, argument) for path, field, hint in configs.leaves(kind)]
        every = sorted([*added, *own], key=lambda parameter: parameter.name != argument)
        command.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in every} | {"return": None}
        return command

    return decorate


def configured(kind: type[C], file: Path | None, given: Mapping[str, Any]) -> tuple[C, dict[str, Any]]:
    """What the command line gives over what `file` names over the recipe of the data over the defaults; and, by dotted
    path, what is of the recipe. Raises ConfigError."""
    paths = {path.rpartition(".")[2]: path for path, *_ in configs.leaves(kind)}
    values = {paths[name]: value for name, value in given.items() if value is not None and value != []}
    config = config_toml.build(kind, values, config_toml.read(file, kind) if file else None)
    named = values.keys() | (config_toml.named(file) if file else set())
    derived = {path: value for path, value in configs.recipe(config).items() if path not in named}
    return config_toml.build(kind, derived, config), derived


def _parameter(path: str, field: Any, hint: Any, argument: str) -> inspect.Parameter:
    (kind, words), shown, name = _kind(hint), _shown(field.default), path.rpartition(".")[2]
    text = field.metadata["help"] + (f" [default: {shown}]" if shown else "")
    if name == argument:
        info: Any = typer.Argument(help=text, show_default=False)
    else:
        flag = "--" + name.replace("_", "-")
        flags = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
        info = typer.Option(*flags, help=text, show_default=False, metavar=words)
    annotation: Any = Annotated.__class_getitem__((kind | None, info))  # type: ignore[attr-defined]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _kind(hint: Any) -> tuple[Any, str | None]:
    """What typer takes for a type, and the words that it may be."""
    if get_origin(hint) in (Union, types.UnionType):
        return _kind(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return str, "|".join(get_args(hint))
    return list[str] if get_origin(hint) is tuple else hint, None


def _shown(default: Any) -> str:
    if isinstance(default, Sequence) and not isinstance(default, str):
        return ", ".join(default)
    return "" if default is None else str(default)
