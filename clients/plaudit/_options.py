"""The fields of a dataclass as options of a command, each explained by its own sentence.

`--some-name` for `some_name`; a list is given by repeating its option. What is not given is None: it is left to a file,
or to the field's default.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer

from ._trees import leaves

F = TypeVar("F", bound=Callable[..., None])


def own_names(kind: type) -> dict[str, str]:
    """The dotted path of every field under the last part of it, where those parts differ."""
    return {path.rpartition(".")[2]: path for path, *_ in leaves(kind)}


def takes(
    kind: type, names: Mapping[str, str], *, argument: str = "", flags: Mapping[str, str] = types.MappingProxyType({})
) -> Callable[[F], F]:
    """Give a command options in place of its `**given`: for each name the field at a dotted path of `kind`. `argument`
    is the name that is positional, `flags` are those that are not made of the name."""
    known = {path: (field, hint) for path, field, hint in leaves(kind)}

    def decorate(command: F) -> F:
        said = inspect.signature(command, eval_str=True).parameters.values()
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in said if p.kind is not p.VAR_KEYWORD]
        added = [_parameter(name, *known[path], flags.get(name), name == argument) for name, path in names.items()]
        every = sorted([*added, *own], key=lambda p: (p.name != argument, p.default is not p.empty))
        command.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in every} | {"return": None}
        return command

    return decorate


def _parameter(name: str, field: Any, hint: Any, flag: str | None, positional: bool) -> inspect.Parameter:
    (kind, words), shown = _kind(hint), _shown(field.default)
    text = field.metadata["help"] + (f" [default: {shown}]" if shown else "")
    if positional:
        info: Any = typer.Argument(help=text, show_default=False)
    else:
        plain = "--" + name.replace("_", "-")
        flag = flag or (f"{plain}/--no-{plain[2:]}" if kind is bool else plain)
        info = typer.Option(flag, help=text, show_default=False, metavar=words)
    annotation: Any = Annotated.__class_getitem__((kind | None, info))  # type: ignore[attr-defined]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _kind(hint: Any) -> tuple[Any, str | None]:
    """What typer takes for a type, and the words that it may be."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _kind(get_args(hint)[0])
    if origin is Literal:
        return str, "|".join(get_args(hint))
    if origin in (dict, Mapping):
        return str, "name=name,..."
    return list[str] if origin is tuple else hint, None


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ", ".join(default)
    return "" if default in (None, MISSING) else str(default)
