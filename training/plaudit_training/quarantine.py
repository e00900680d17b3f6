"""The file that lists bad rows: one JSON object a row, the same bytes whenever the same data is read.

    {"file", "line", "offset", "reason", "detail", "sha256"}, and "text" if asked for

`line` is the line the row begins on, from 1 (in a JSON array: the element's number); `offset` is in bytes of the
uncompressed file; `sha256` is of the row's bytes, line ending included.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .errors import DataError, Defect, OptionError
from .frames import Frame

_KEYS = {"file", "line", "offset", "reason", "detail", "sha256"}


class Quarantine:
    """Lists bad rows beside the final name and takes that name when all are listed: a reader of the file never
    sees half a list. If nothing is bad, a list that an earlier run left is removed.

    Raises OptionError if the path holds anything but such a list.
    """

    def __init__(self, path: Path, inputs: Sequence[str], *, with_text: bool = False) -> None:
        self._path, self._with_text = path, with_text
        self._partial = path.with_name(path.name + ".partial")
        self._stream: IO[str] | None = None
        if any(os.path.realpath(name) == os.path.realpath(path) for name in inputs) or not _is_list(path):
            raise OptionError(f"{path} exists and is no list of bad rows; name another file for --quarantine")

    def add(self, file: str, frame: Frame, defect: Defect) -> None:
        """List a row. Raises DataError if that cannot be written."""
        entry = {"file": file, "line": frame.line, "offset": frame.offset, "reason": defect.reason,
                 "detail": defect.detail, "sha256": frame.sha256}  # fmt: skip
        if self._with_text:
            entry["text"] = frame.raw.decode("utf-8", "backslashreplace").rstrip("\r\n")
        with _writing(self._path):
            if self._stream is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._stream = self._partial.open("w", encoding="ascii", newline="\n")
            self._stream.write(json.dumps(entry) + "\n")

    def finish(self) -> None:
        """All rows were read: the list takes its name."""
        with _writing(self._path):
            if self._stream is None:
                self._path.unlink(missing_ok=True)
                return
            self._stream.close()
            self._partial.replace(self._path)
            self._stream = None

    def abandon(self) -> None:
        """Reading ended early: leave no half list behind. Does nothing after `finish`."""
        if self._stream is not None:
            self._stream.close()
            self._partial.unlink(missing_ok=True)
            self._stream = None


def _is_list(path: Path) -> bool:
    """Whether the path is free, or holds a list of bad rows."""
    if not path.exists():
        return True
    try:
        with path.open(encoding="ascii") as stream:
            return set(json.loads(stream.readline(1 << 20))) >= _KEYS
    except (OSError, ValueError, TypeError):
        return False


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
