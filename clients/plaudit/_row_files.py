"""Files of rows with keys: read, continued by one run at a time, or written whole."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ._jsonl import readable
from .errors import InvalidInput, OutputFailed

_BEGINNING = b'{"key":"'


def digest(value: Any) -> str:
    """sha256 of a JSON value in hexadecimal, whatever the order of the fields of its objects."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def json_rows(lines: Iterable[bytes]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """The rows of a JSONL file with their line numbers, as a number and as words. Raises InvalidInput."""
    for number, line in enumerate(readable(lines), start=1):
        if line.strip():
            yield number, f"line {number}", json_object(line, f"line {number}")


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """The object on a line. Raises InvalidInput."""
    with located(where):
        value = json.loads(line)
        if not isinstance(value, dict):
            raise TypeError(f"not a JSON object, but {type(value).__name__}")
    return value


@contextmanager
def located(where: str) -> Iterator[None]:
    """What is wrong with a value in there is an InvalidInput that says where it stood."""
    try:
        yield
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{where}: {error}") from None


@contextmanager
def sole_writer(out: Path) -> Iterator[None]:
    """No other run of ours appends to the file. It is made if it is not there. Raises InvalidInput."""
    try:
        file = out.open("ab")
    except OSError as error:
        raise InvalidInput(f"{out} cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(f"{out} is being written by another run; wait for it, or choose another --out") from None
        yield


@contextmanager
def whole_file(out: Path) -> Iterator[Callable[[bytes], object]]:
    """What writes to a file that appears under its name when the block ends well, and not before. Raises InvalidInput
    if there can be no such file, OutputFailed if it cannot be written to its end."""
    if out.is_dir():
        raise InvalidInput(f"{out} cannot be written: {os.strerror(errno.EISDIR)}")
    staging = out.with_name(f".{out.name}.writing-{os.getpid()}")
    try:
        opened = staging.open("wb")
    except OSError as error:
        raise InvalidInput(f"{out} cannot be written: {error.strerror}") from None
    try:
        with opened as file:
            yield file.write
            file.flush()
            os.fsync(file.fileno())
        staging.replace(out)
    except OSError as error:
        raise OutputFailed(f"{out} cannot be written: {error.strerror}") from None
    finally:
        staging.unlink(missing_ok=True)


def take_up(
    out: Path, check: Callable[[dict[str, Any]], str | None], *, edited: bool = False
) -> Iterator[dict[str, Any]]:
    """The rows of a file that begin with their key, which is to be continued. When all were taken, a torn last line is
    cut off; in a file that people have `edited`, one that lacks but its line break gets that. Raises InvalidInput, and
    changes nothing, for a key that is there twice, and with what `check` finds wrong with a row."""
    have: set[str] = set()
    complete, kept = 0, b"\n"
    with out.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{out}:{number}"
            try:
                if not (edited or line.endswith(b"\n")):
                    raise InvalidInput(f"{where} is torn")
                row = json_object(line, where)
            except InvalidInput:
                if line.endswith(b"\n") or line[: len(_BEGINNING)] != _BEGINNING[: len(line)]:
                    raise
                break
            key = row.get("key")
            wrong = check(row) or (None if isinstance(key, str) and key not in have else "has no key, or repeats one")
            if wrong:
                raise InvalidInput(f"{where} {wrong}; use another --out")
            have.add(str(key))
            complete, kept = complete + len(line), line
            yield row
    with out.open("r+b") as file:
        file.truncate(complete)
        if not kept.endswith(b"\n"):
            file.seek(complete)
            file.write(b"\n")
