"""What a run writes for machines: files of one JSON object a line, and files that are there whole."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

LOG = logging.getLogger("plaudit.json_lines")


class JsonLines:
    """metrics.jsonl and the like: one object a line, a function of the configuration and the data alone (no times), so
    that an interrupted and resumed run leaves the same bytes as one that ran through."""

    def __init__(self, path: Path, resume_at: int) -> None:
        self._path = path
        if resume_at and (not path.exists() or path.stat().st_size < resume_at):
            LOG.warning("%s is shorter than the checkpoint says; lines from before it are lost", path)
        path.touch()
        self._length = min(resume_at, path.stat().st_size)
        os.truncate(path, self._length)
        self._file = path.open("ab", buffering=0)

    def write(self, event: Mapping[str, Any]) -> None:
        """Append one line, or nothing. A disk that cannot take it is a warning, not the end of the run."""
        line = json.dumps(event, allow_nan=False).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._length += len(line)
        except OSError as error:
            LOG.warning("%s lacks a line, it could not be written: %s", self._path, error.strerror)
            with suppress(OSError):
                os.truncate(self._path, self._length)

    def position(self) -> int:
        """Bytes so far, safely on disk: what a checkpoint notes for `resume_at`."""
        with suppress(OSError):  # the checkpoint that follows meets the same disk, and says so
            os.fsync(self._file.fileno())
        return self._length

    def close(self) -> None:
        self._file.close()


def write_whole(path: Path, text: str) -> None:
    """Write a file at once, if it says something else: a kill leaves the old one or the new one, never a part."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    hidden = path.with_name(f".{path.name}.writing")
    with hidden.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    hidden.replace(path)
