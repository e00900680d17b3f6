"""The directory of a run of training or of the loops: its configuration in `run.toml`, one process at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from plaudit import _trees as trees
from plaudit.errors import ConfigurationError

C = TypeVar("C")
FILE_NAME = "run.toml"


class RunExists(Exception):
    """The output directory belongs to another run."""

    exit_code = 2


class NotWritten(Exception):
    """The run cannot be written any more (full, read-only). What is on disk is whole and can be resumed."""

    exit_code = 75


class Diverged(Exception):
    """Too many steps had a loss or gradient that is not finite."""

    exit_code = 1


def stored(out: Path | None, *, resume: bool, file: Path | None) -> Path | None:
    """The configuration that the command line comes on top of: `file`, or the run's own where it is resumed without
    one. Raises RunExists for a run that is to be resumed and is not named."""
    if resume and out is None:
        raise RunExists("--resume needs --out, the directory of the run to go on with")
    own = out / FILE_NAME if out and resume and not file else None
    return own if own is not None and own.exists() else file


def settle(config: C, out: Path, *, resume: bool, outputs: Collection[str] = ()) -> C:
    """The configuration to go on with: that of the run in `out`, if there is one to resume, with what may change from
    `config`; what a run resolves when it starts (None, "auto") asks for nothing.

    Raises RunExists if there is a run and no `resume`, or no run and one of `outputs`; ConfigurationError if something
    else is asked for.
    """
    path, changes = out / FILE_NAME, dict[str, Any]()
    check_own(out, outputs)
    if not path.exists():
        return config
    if not resume:
        raise RunExists(f"{out} already holds a run: go on with --resume, or name another --out")
    begun = trees.read(path, type(config))
    for name, field, _ in trees.leaves(type(config)):
        given, known = trees.get(config, name), trees.get(begun, name)
        if given not in (known, None, "auto"):
            if not field.metadata["changes"]:
                raise ConfigurationError(f"{name} is {given!r}, but the run in {out} has {known!r}: name another --out")
            changes[name] = given
    return trees.changed(begun, changes)


def check_own(out: Path, outputs: Collection[str]) -> None:
    """Raise RunExists if something is there that is of no run, and would be overwritten or gone on with."""
    if not (out / FILE_NAME).exists() and (foreign := [name for name in outputs if (out / name).exists()]):
        raise RunExists(f"{out} holds {foreign[0]} and no run: it would be overwritten; name another --out")


@contextmanager
def held(out: Path, *, lock: bool = True) -> Iterator[None]:
    """The directory, made and locked: two processes that write one run would each prune the other's checkpoints.
    Raises RunExists if another process is in it, NotWritten if it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / ".lock").open("w") if lock else nullcontext() as file:
            if file is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError as error:
        raise RunExists(f"another process is training into {out}") from error
    except OSError as error:
        raise NotWritten(f"{error}; what is in {out} is whole, go on with --resume") from error
