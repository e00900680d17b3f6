"""Files -> rows as bytes, each with its place, in bounded memory. No JSON and no CSV here.

A row that is too large is hashed while it passes and never held.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from .errors import BadRow, DataError, Defect

PIECE = 1 << 16
BOM = "\ufeff"
Stream = io.BufferedReader | gzip.GzipFile


@dataclass(frozen=True, slots=True)
class Frame:
    """The bytes of one row and their place. `line` counts from 1; `offset` is in bytes of the uncompressed
    file. `raw` is empty where the row was too large to hold, and then `defect` says so."""

    line: int
    offset: int
    raw: bytes
    digest: str = ""
    defect: Defect | None = None

    @property
    def sha256(self) -> str:
        """Of the row's bytes as they are in the file, line ending included."""
        return self.digest or hashlib.sha256(self.raw).hexdigest()

    @property
    def blank(self) -> bool:
        """A line without anything on it, a byte order mark aside."""
        raw = self.raw.removeprefix(BOM.encode()) if self.offset == 0 else self.raw
        return not (self.defect or raw.strip())

    def text(self) -> str:
        """The row as text, without the byte order mark if it is the first of its file. Raises BadRow."""
        try:
            text = self.raw.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = self.raw[error.start]
            detail = f"byte {error.start} of the row (0x{byte:02x}, {self.offset + error.start} in the file)"
            raise BadRow("bad_utf8", detail) from None
        return text.removeprefix(BOM) if self.offset == 0 else text


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its columns, or what is wrong with it."""

    frame: Frame
    content: dict[str, Any] | Defect


class FrameBuilder:
    """Collects the pieces of one row; beyond `limit` bytes it only hashes them."""

    def __init__(self, line: int, offset: int, limit: int) -> None:
        self._line, self._offset, self._limit = line, offset, limit
        self._pieces: list[bytes] = []
        self._hash = hashlib.sha256()
        self.size = 0

    @property
    def oversized(self) -> bool:
        return self.size > self._limit

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        self._pieces.append(piece)
        if self.oversized:
            for held in self._pieces:
                self._hash.update(held)
            self._pieces.clear()

    def frame(self) -> Frame:
        if not self.oversized:
            return Frame(self._line, self._offset, b"".join(self._pieces))
        defect = Defect("too_large", f"{self.size} bytes, at most {self._limit} are read")
        return Frame(self._line, self._offset, b"", self._hash.hexdigest(), defect)


@contextmanager
def opened(path: Path) -> Iterator[Stream]:
    """The uncompressed bytes of a file. Raises DataError if it cannot be opened or, later, read."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            yield stream
    except (EOFError, zlib.error) as error:
        raise DataError(f"the file is damaged: {error}") from error
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror or error}") from error


def line_frames(stream: Stream, limit: int) -> Iterator[Frame]:
    """One frame a line. Nothing but `\\n` ends a line; the last one may lack it."""
    offset = 0
    for line in count(1):
        builder = FrameBuilder(line, offset, limit)
        read_line(stream, builder, limit)
        if not builder.size:
            return
        offset += builder.size
        yield builder.frame()


def read_line(stream: Stream, builder: FrameBuilder, limit: int) -> bytes:
    """Add the next line to the builder; returns it, or what of it is held where it is too large."""
    line = piece = stream.readline(limit + 1)
    builder.add(piece)
    while piece and not piece.endswith(b"\n") and builder.oversized:
        piece = stream.readline(PIECE)
        builder.add(piece)
    return line
