"""Rows of a JSONL file: the item in a row, and the row with its scores. Pure, but for opening files.

Every line of the input that is not blank gives one line of the output, in the same order; a line that cannot be
scored carries an error instead of a score. `plaudit.row_sha256` says which row a line was made from, so that a
second run can prove that the file it continues is its own (`_bulk.take_up`).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from ._items import KEYS, check, encode
from ._settings import Overlong
from .errors import InvalidInput, OutputFailed
from .types import Identity, ItemError, ScoreResult

STANDARD = "-"
ABOUT = "plaudit"
ADDED = ("score", "scores", "error", "errors", ABOUT)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the input. `item` is the part of `value` that is scored; a row without one has a `problem`."""

    line: int
    bytes: int
    sha256: str
    value: Mapping[str, Any]
    item: Mapping[str, Any] | None = None
    problem: ItemError | None = None

    @property
    def responses(self) -> int:
        """How many scores belong to the row."""
        if self.item is None:
            return 0
        return len(self.item["responses"]) if "responses" in self.item else 1


def read_rows(lines: Iterable[bytes], prefix: str = "") -> Iterator[Row]:
    """The rows of a JSONL file, bad ones included. Raises InvalidInput if the file cannot be read to its end, and if
    a row has a field that would be overwritten by its score."""
    for number, line in enumerate(readable(lines), start=1):
        if line.strip():
            yield _row(number, line, prefix)


def readable(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of an input. Raises InvalidInput where it cannot be read any further."""
    try:
        yield from lines
    except (OSError, EOFError, zlib.error) as error:  # the last two: a gzip'd file that is cut off or damaged
        raise InvalidInput(f"the input cannot be read to its end: {error}") from None


def result_line(
    row: Row, results: Sequence[ScoreResult], identity: Identity | None, *, overlong: Overlong, prefix: str = ""
) -> bytes:
    """The output line of a row: its own fields; `score` and `error`, or `scores` and `errors` for a row with
    `responses`; under `plaudit`, what scored it, how, and how many tokens that took."""
    if row.item is not None and "responses" in row.item:
        added = _several(results)
    else:
        added = _single(results[0] if results else ScoreResult(None, error=row.problem))
    scorer = {**asdict(identity), "overlong": overlong} if results and identity else {}
    about = {"row_sha256": row.sha256, **scorer, **_sizes(results)}
    fields = {**added, ABOUT: about}
    return encode({**row.value, **{prefix + key: value for key, value in fields.items()}}) + b"\n"


def could_begin(torn: bytes, row: Row, prefix: str = "") -> bool:
    """Whether `torn` may be the beginning of the row's output line: its own fields, then the first of ours."""
    own = encode(row.value)[:-1]
    head = own + (b"," if row.value else b"") + b'"' + prefix.encode("utf-8", "surrogatepass") + b"score"
    return head.startswith(torn) or torn.startswith(head)


def open_input(source: str) -> AbstractContextManager[BinaryIO]:
    """The lines of a file, of a gzip'd file, or of standard input for `-`. Raises InvalidInput."""
    if source == STANDARD:
        return nullcontext(sys.stdin.buffer)
    try:
        return cast(BinaryIO, gzip.open(source)) if source.endswith(".gz") else Path(source).open("rb")
    except OSError as error:
        raise InvalidInput(f"{source} cannot be read: {error.strerror}") from None


@contextmanager
def open_output(out: str) -> Iterator[Callable[[bytes], None]]:
    """What appends a line to a file, or to standard output for `-`, and returns when it is out of this process.

    Raises InvalidInput if there can be no such file, OutputFailed if a line cannot be written.
    """
    try:
        file = sys.stdout.buffer if out == STANDARD else Path(out).open("ab")  # noqa: SIM115 - closed below
    except OSError as error:
        raise InvalidInput(f"{out} cannot be written: {error.strerror}") from None

    def write(line: bytes) -> None:
        try:
            file.write(line)
            file.flush()
        except OSError as error:
            _abandon(file)
            raise OutputFailed(f"{out} cannot be written any further: {error.strerror}; run it again later") from None

    with nullcontext() if out == STANDARD else file:
        yield write


def _abandon(file: BinaryIO) -> None:
    """Close it without what it could not write, which would fail once more."""
    if isinstance(file, io.BufferedWriter):
        file.raw.close()


def _row(number: int, line: bytes, prefix: str) -> Row:
    row = partial(Row, number, len(line), hashlib.sha256(line.strip()).hexdigest())
    try:
        value = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        return row({}, problem=ItemError("bad_row", f"not JSON: {error}"))
    if not isinstance(value, dict):
        return row({}, problem=ItemError("bad_row", f"not a JSON object, but {type(value).__name__}"))
    if taken := [prefix + key for key in ADDED if prefix + key in value]:
        raise InvalidInput(f"line {number} has a field {taken[0]!r} of its own; name ours with --prefix rm_")
    item = {key: value[key] for key in value if key in KEYS}
    try:
        encode(value)
    except InvalidInput as error:
        return row({}, problem=ItemError("bad_row", str(error)))
    try:
        check(item or value)
    except InvalidInput as error:
        return row(value, problem=ItemError("bad_row", str(error)))
    return row(value, item)


def _single(result: ScoreResult) -> dict[str, Any]:
    return {"score": result.score, "error": _error(result)} if result.error else {"score": result.score}


def _several(results: Sequence[ScoreResult]) -> dict[str, Any]:
    errors = [_error(result) for result in results]
    return {"scores": [result.score for result in results], **({"errors": errors} if any(errors) else {})}


def _error(result: ScoreResult) -> dict[str, str] | None:
    return {"code": result.error.code, "message": result.error.message} if result.error else None


def _sizes(results: Sequence[ScoreResult]) -> dict[str, Any]:
    sizes: dict[str, Any] = {"tokens": sum(result.tokens or 0 for result in results)} if results else {}
    if any(result.truncated for result in results):
        sizes["truncated"] = [asdict(result.truncated) if result.truncated else None for result in results]
    return sizes


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")
