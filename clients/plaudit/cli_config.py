"""`plaudit config`: which options count, and where each of them comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from . import _config
from .errors import ConfigurationError

SOURCES = {"ENVIRONMENT": "environment", "DEFAULT_MAP": "file", "DEFAULT": "default"}
SECRETS = ("key", "token", "secret", "password")

app = typer.Typer()


@dataclass(frozen=True, slots=True)
class Resolved:
    """One option of one verb: its value before the command line, and whether that is the environment's, the
    file's or the default."""

    verb: str
    option: str
    value: Any
    source: str


@app.callback()
def config() -> None:
    """Show which options count and where they come from."""


@app.command()
def show(
    ctx: typer.Context,
    verbs: Annotated[list[str] | None, typer.Argument(metavar="[VERB]...", help="All verbs if none is named.")] = None,
    all_options: Annotated[bool, typer.Option("--all", help="Options at their defaults, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list.")] = False,
) -> None:
    """List the options of the verbs: verb, option, value, source (environment, file or default)."""
    settings = [s for s in resolve(ctx.find_root(), verbs or []) if all_options or s.source != "default"]
    if as_json:
        typer.echo(json.dumps([asdict(setting) for setting in settings], default=str, indent=2))
        return
    for setting in settings:
        typer.echo(f"{setting.verb}.{setting.option} = {json.dumps(setting.value, default=str)}  # {setting.source}")
    if not settings:
        typer.echo("every option has its default (--all lists them)", err=True)


def resolve(root: Any, verbs: list[str]) -> Iterator[Resolved]:
    """The options of `verbs` (of all verbs, if empty). Verbs whose extra is not installed are left out unless
    they were asked for; then the error says what to install. Raises ConfigurationError."""
    group = root.command
    if unknown := sorted(set(verbs) - set(group.entries)):
        raise ConfigurationError(f"there is no verb {unknown[0]!r}; verbs: {', '.join(sorted(group.entries))}")
    for verb in verbs or sorted(group.entries):
        try:
            command = group.load(verb)
        except ConfigurationError:
            if verbs:
                raise
            continue
        _config.check_options((root.default_map or {}).get(verb, {}), command, verb)
        yield from _options(command, verb, command.context_class(command, info_name=verb, parent=root))


def _options(command: Any, path: str, ctx: Any) -> Iterator[Resolved]:
    for option in command.params:
        if option.param_type_name == "option":
            value, source = option.consume_value(ctx, {})
            secret = value is not None and option.name.rpartition("_")[2] in SECRETS
            yield Resolved(path, option.name, "***" if secret else value, SOURCES[source.name])
    for name, subcommand in getattr(command, "commands", {}).items():
        below = subcommand.context_class(subcommand, info_name=name, parent=ctx)
        yield from _options(subcommand, f"{path}.{name}", below)
