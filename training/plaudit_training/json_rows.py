"""JSON lines and JSON arrays as rows. An array is cut into its elements as it streams by."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .errors import BadRow, DataError, Defect
from .frames import BOM, PIECE, Frame, FrameBuilder, Row, Stream, line_frames

MAX_DEPTH = 64
"""Arrays and objects inside one another. A parser without such a bound runs out of stack, at a depth that
depends on who called it."""

_OUTSIDE_STRING = re.compile(rb'["\[\]{},]')
_INSIDE_STRING = re.compile(rb'["\\]')
_STRING_OR_BRACKET = re.compile(r'"(?>[^"\\]+|\\.)*"|[\[\]{}]', re.DOTALL)
_WHITE_SPACE = b" \t\r\n"


def line_rows(stream: Stream, limit: int) -> Iterator[Row]:
    """The rows of a file with one JSON object a line. Blank lines are no rows."""
    for frame in line_frames(stream, limit):
        if not frame.blank:
            yield _row(frame)


def file_rows(stream: Stream, limit: int) -> Iterator[Row]:
    """The rows of a `.json` file: the elements of an array, or JSON lines, which many such files hold.

    An element's `line` is its number in the array, from 1: arrays are often a single line.
    """
    start = stream.peek(PIECE).removeprefix(BOM.encode()).lstrip(_WHITE_SPACE)[:1]
    if start == b"[":
        yield from map(_row, _elements(stream, limit))
    elif start == b"{":
        yield from line_rows(stream, limit)
    elif start:
        raise DataError("a .json file must hold an array of rows, or one row a line")


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object. Raises BadRow if it is something else, nested too deeply, or has a key twice."""
    _check_depth(text)
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        where = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise BadRow("bad_json", where) from None
    if not isinstance(value, dict):
        raise BadRow("wrong_type", f"expected an object, got {type(value).__name__}")
    return value


def _row(frame: Frame) -> Row:
    if frame.defect:
        return Row(frame, frame.defect)
    try:
        return Row(frame, parse_object(frame.text()))
    except BadRow as bad:
        return Row(frame, bad.defect)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("an object has a key twice")
    return value


def _check_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for token in _STRING_OR_BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth > MAX_DEPTH:
            raise BadRow("too_deep", f"more than {MAX_DEPTH} levels at character {token.start()}")


def _elements(stream: Stream, limit: int) -> Iterator[Frame]:
    """One frame an element. An array that does not end, or text after its end, is one more frame, a bad one."""
    offset = len(stream.read(stream.peek(PIECE).index(b"[") + 1))
    number, last_end, builder = 1, b",", FrameBuilder(1, offset, limit)
    for piece, end in _pieces(stream):
        if not builder.size:
            blank = len(piece) - len(piece.lstrip(_WHITE_SPACE))
            builder = FrameBuilder(number, offset + blank, limit)
            builder.add(piece[blank:])
        else:
            builder.add(piece)
        offset += len(piece) + len(end)
        if end:
            if builder.size or number > 1 or end == b",":
                yield builder.frame()
            number, last_end, builder = number + 1, end, FrameBuilder(number + 1, offset, limit)
    if last_end != b"]" or builder.size:
        detail = "text after the array" if last_end == b"]" else "the array does not end: is the file cut off?"
        yield replace(builder.frame(), defect=Defect("bad_json", detail))


def _pieces(stream: Stream) -> Iterator[tuple[bytes, bytes]]:
    """Pieces of elements, each with the `,` or `]` that ends its element; nothing where the element goes on."""
    cuts = _Cuts()
    while chunk := stream.read(PIECE):
        start = 0
        for end in cuts.of(chunk):
            yield chunk[start:end], chunk[end : end + 1]
            start = end + 1
        yield chunk[start:], b""


class _Cuts:
    """Where the elements of an array end, chunk after chunk: at its commas and its closing bracket."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped, self._closed = 0, False, False, False

    def of(self, chunk: bytes) -> Iterator[int]:
        position, self._escaped = int(self._escaped), False
        while not self._closed:
            found = (_INSIDE_STRING if self._in_string else _OUTSIDE_STRING).search(chunk, position)
            if not found:
                return
            position, byte = found.end(), found[0]
            if byte == b"\\":
                self._escaped = position == len(chunk)
                position += 1
            elif byte == b'"':
                self._in_string = not self._in_string
            elif self._depth == 0 and byte in b",]":
                self._closed = byte == b"]"
                yield found.start()
            elif byte != b",":
                self._depth = max(0, self._depth + (1 if byte in b"[{" else -1))
