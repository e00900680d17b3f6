"""CSV and TSV files as rows. Python's csv module decides where a row ends; places and bounds are ours."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

from .errors import BadRow, DataError, Defect
from .frames import BOM, PIECE, Frame, FrameBuilder, Row, Stream, read_line

Cells = list[str] | Defect


def cell_rows(stream: Stream, limit: int, delimiter: str) -> Iterator[Row]:
    """The rows under a header, as {column: cell}. A cell may hold line ends if it is quoted; a row's `line` is
    the one it begins on. Blank lines are no rows.

    Raises DataError if the header cannot be read or names a column twice.
    """
    records = _records(stream, limit, delimiter)
    header = _header(next(records, None))
    for frame, cells in records:
        try:
            yield Row(frame, _columns(frame, cells, header))
        except BadRow as bad:
            yield Row(frame, bad.defect)


def separator(stream: Stream) -> str:
    """Of a .csv: the comma, or `;` where the header has one and no comma, as spreadsheets write it in countries with a
    decimal comma. With commas such a header is one column, of which no comparison can be made."""
    header = stream.peek(PIECE).partition(b"\n")[0]
    return ";" if b";" in header and b"," not in header else ","


def _header(first: tuple[Frame, Cells] | None) -> list[str]:
    if first is None:
        return []
    frame, header = first
    try:
        frame.text()
    except BadRow as bad:
        header = bad.defect
    if isinstance(header, Defect):
        raise DataError(f"the header cannot be read: {header.reason}, {header.detail}")
    if len(set(header)) < len(header):
        raise DataError(f"the header names a column twice: {', '.join(header)}")
    return header


def _columns(frame: Frame, cells: Cells, header: list[str]) -> dict[str, Any]:
    if isinstance(cells, Defect):
        raise BadRow(cells.reason, cells.detail)
    frame.text()
    if len(cells) != len(header):
        raise BadRow("bad_csv", f"{len(cells)} cells under a header of {len(header)}")
    return dict(zip(header, cells, strict=True))


def _records(stream: Stream, limit: int, delimiter: str) -> Iterator[tuple[Frame, Cells]]:
    """The cells of each record that is not a blank line. After a bad one, reading goes on with the next line."""
    if csv.field_size_limit() < limit:
        csv.field_size_limit(limit)
    lines = _Lines(stream, limit)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.begin()
        cells: Cells
        try:
            cells = next(reader)
        except StopIteration:
            return
        except (BadRow, csv.Error) as error:
            cells = error.defect if isinstance(error, BadRow) else Defect("bad_csv", str(error))
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
        if cells:
            yield lines.frame(), cells


class _Lines:
    """The lines of a file for a csv reader, which asks for more of them inside a quoted cell.

    Bytes that are not UTF-8 pass as lone surrogates, so that they do not change where the row ends.
    """

    def __init__(self, stream: Stream, limit: int) -> None:
        self._stream, self._limit = stream, limit
        self._line, self._offset = 1, 0
        self._builder = FrameBuilder(1, 0, limit)

    def begin(self) -> None:
        """A new row begins with the next line."""
        self._builder = FrameBuilder(self._line, self._offset, self._limit)

    def frame(self) -> Frame:
        """What was read since the row began."""
        return self._builder.frame()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        size, first = self._builder.size, self._offset == 0
        line = read_line(self._stream, self._builder, self._limit)
        if not line:
            raise StopIteration
        self._line += 1
        self._offset += self._builder.size - size
        if self._builder.oversized:
            raise BadRow("too_large", f"{self._builder.size} bytes, at most {self._limit} are read")
        text = line.decode("utf-8", "surrogateescape")
        return text.removeprefix(BOM) if first else text
