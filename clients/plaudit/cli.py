"""The root of the `plaudit` command.

Verbs are entry points of the group `plaudit.commands`: a function with typer annotations, or a `typer.Typer` for a
group of commands. A verb's module is imported when the verb is run. An option's value comes from the command
line, else from `PLAUDIT_<VERB>_<OPTION>`, else from `plaudit.toml`, else from its default.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from . import _config
from ._extras import install
from ._settings import installed_version
from ._summaries import summary
from .errors import ConfigurationError

GROUP = "plaudit.commands"
BUG = 70
INTERRUPTED = 130

_FILE = "Defaults for the verbs, instead of plaudit.toml in the current directory."
_VERSION = "Show the version and exit."

EXTRAS = {
    "plaudit": "model",  # what is always installed cannot be missing; the local scorer's modules can
    "plaudit_loops": "loops",
    "plaudit_compose": "server",
    "plaudit_model": "model",
    "plaudit_server": "server",
    "plaudit_training": "train",
}
"""The extra that brings what a package of ours imports."""


class Verbs(TyperGroup):
    """The verbs by name. Help, suggestions and completion see light stand-ins; running a verb loads it."""

    entries: Mapping[str, EntryPoint]

    def fill(self, entries: Mapping[str, EntryPoint]) -> None:
        self.entries = entries
        for name, entry in sorted(entries.items()):
            self.add_command(TyperCommand(name=name, short_help=summary(entry)))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        name, stand_in, rest = super().resolve_command(ctx, args)
        if name is None or stand_in is None:
            return name, stand_in, rest
        command = self.load(name)
        _config.check_options((ctx.default_map or {}).get(name, {}), command, name)
        if strange := _config.unread(os.environ, command, name, self.entries):
            typer.echo(f"warning: `plaudit {name}` does not read {', '.join(strange)}", err=True)
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            raise _explained(error, ctx.invoked_subcommand, self.entries) from error

    def load(self, name: str) -> Any:
        """The click command of a verb. Raises ConfigurationError if what it imports is not installed."""
        try:
            target = self.entries[name].load()
        except ModuleNotFoundError as error:
            raise _explained(error, name, self.entries) from error
        if isinstance(target, typer.Typer):
            target.rich_markup_mode = None  # one look for all verbs, and brackets in help texts stay brackets
            group = typer.main.get_group(target)
            group.no_args_is_help = False
            return group
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(name=name)(target)
        return typer.main.get_command(app)


def build(entries: Mapping[str, EntryPoint]) -> Verbs:
    """The root command over these verbs."""
    settings = {"auto_envvar_prefix": "PLAUDIT", "help_option_names": ["-h", "--help"], "max_content_width": 100}
    app = typer.Typer(cls=Verbs, add_completion=False, rich_markup_mode=None, context_settings=settings)
    app.callback()(plaudit)
    group = typer.main.get_group(app)
    assert isinstance(group, Verbs)
    group.fill(entries)
    return group


def _read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    if not ctx.resilient_parsing:
        config = _config.read(path)
        assert isinstance(ctx.command, Verbs)
        _config.check_verbs(config, ctx.command.entries)
        ctx.default_map = config
    return path


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"plaudit {installed_version()}")
        raise typer.Exit


def plaudit(
    config_file: Annotated[Path | None, typer.Option(help=_FILE, is_eager=True, callback=_read_config)] = None,
    version: Annotated[
        bool, typer.Option("--version", help=_VERSION, is_eager=True, allow_from_autoenv=False, callback=_show_version)
    ] = False,
) -> None:
    """Fit reward models from preference data, serve their scores, and rank with them."""


def run(args: Sequence[str], entries: Mapping[str, EntryPoint]) -> int:
    """Run one command line; the exit code. Only errors that nobody foresaw come out as exceptions."""
    try:
        result = build(entries).main(args=list(args) or ["--help"], prog_name="plaudit", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if not isinstance(code, int):
            raise
        typer.echo(f"error: {_one_line(error)}", err=True)
        return code
    return result if isinstance(result, int) else 0


def main() -> None:
    """The console script."""
    try:
        code = run(sys.argv[1:], {entry.name: entry for entry in entry_points(group=GROUP)})
    except Exception:
        traceback.print_exc()
        code = BUG
    sys.exit(code)


def _explained(error: ModuleNotFoundError, verb: str | None, entries: Mapping[str, EntryPoint]) -> Exception:
    """A module of an extra that is not installed is the user's to fix; any other missing module is a bug."""
    missing = (error.name or "").partition(".")[0]
    package = entries[verb].module.partition(".")[0] if verb is not None else ""
    if missing in sys.stdlib_module_names or missing.startswith("plaudit") or package not in EXTRAS:
        return error
    return ConfigurationError(f"`plaudit {verb}` needs {missing}, which is not installed: {install(EXTRAS[package])}")


def _one_line(error: Exception) -> str:
    format_message = getattr(error, "format_message", None)
    text = " ".join((format_message() if format_message else str(error)).split()) or type(error).__name__
    ctx = getattr(error, "ctx", None)
    return text if ctx is None else f"{text} (see `{ctx.command_path} --help`)"
