"""Scoring a file: rows in batches, results in order, and taking up where an earlier run stopped."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from ._jsonl import ABOUT, Row, could_begin, result_line
from ._scorers import Scorer
from ._settings import Overlong
from .errors import ConfigurationError, InvalidInput, RevisionChanged
from .types import Identity, Item, ItemError, ScoreResult

B = TypeVar("B")
T = TypeVar("T")

BATCH_BYTES = 4 * 1024 * 1024
"""A batch is closed at so many bytes of rows, whatever their number: memory stays bounded."""

_SCORER = {"model", "revision", "numerics", "overlong"}


@dataclass(slots=True)
class Tally:
    """What the output holds: rows, how many of them failed (or one of their responses did), how many were there
    before this run, and what scored them."""

    rows: int = 0
    failed: int = 0
    earlier: int = 0
    identity: Identity | None = None

    def admit(self, identity: Identity | None) -> None:
        """One file holds the scores of one model. Raises RevisionChanged."""
        if identity is not None and self.identity not in (None, identity):
            raise RevisionChanged(
                f"the rows before were scored by {self.identity}, these by {identity}; write them to another file "
                "with --out"
            )
        self.identity = self.identity or identity


@dataclass(frozen=True, slots=True)
class Done:
    """A finished row: its output line and, if it failed, the first reason."""

    row: Row
    line: bytes
    error: ItemError | None


def take_up(out: Path, rows: Iterator[Row], *, overlong: Overlong, prefix: str = "") -> tuple[Tally, Iterator[Row]]:
    """What an earlier run has left in `out`, and the rows that are still to be scored; a torn last line is cut off.

    Raises InvalidInput, and changes nothing, unless every line was made from the row in its place, the torn one too;
    ConfigurationError if they were made with another `overlong`.
    """
    tally, complete = Tally(), 0
    with out.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            row = next(rows, None)
            if not line.endswith(b"\n"):
                if row is None or not could_begin(line, row, prefix):
                    raise InvalidInput(f"{out}:{number} is no torn line of this run; choose another --out")
                rows = chain([row], rows)
                break
            value = _result(line, prefix)
            if row is None or value is None or value[prefix + ABOUT].get("row_sha256") != row.sha256:
                raise InvalidInput(f"{out}:{number} was not made from the row in its place; choose another --out")
            if (other := value[prefix + ABOUT].get("overlong", overlong)) != overlong:
                raise ConfigurationError(f"{out}:{number} was scored with --overlong {other}; use it, or another --out")
            tally.admit(_identity(value[prefix + ABOUT]))
            tally.failed += prefix + "error" in value or prefix + "errors" in value
            complete += len(line)
            tally.earlier = tally.rows = number
    with out.open("r+b") as file:
        file.truncate(complete)
    return tally, rows


def items_of(rows: Iterable[Row]) -> list[Item]:
    """What is scored of them."""
    return [row.item for row in rows if row.item is not None]


def score_batches(
    batches: Iterable[Sequence[Row]], scorer: Scorer, tally: Tally, *, overlong: Overlong, prefix: str = "",
    items: Callable[[Sequence[Row]], list[Item]] = items_of,
) -> Iterator[Done]:  # fmt: skip
    """Every row scored, in order, counted in `tally`; a batch in one call, as the `items` that it makes. `overlong` is
    what the scorer was opened with. Raises RevisionChanged as soon as another revision answers, Unavailable if nothing
    can be scored now."""

    def score(batch: Sequence[Row]) -> tuple[list[list[ScoreResult]], Identity | None]:
        scores = scorer.score_items(items(batch))
        results = iter(scores)
        return [[next(results) for _ in range(row.responses)] for row in batch], scores.identity

    for batch, (results, identity) in in_order(batches, score, scorer.ahead):
        tally.admit(identity)
        for row, own in zip(batch, results, strict=True):
            error = row.problem or next((result.error for result in own if result.error), None)
            tally.rows += 1
            tally.failed += error is not None
            yield Done(row, result_line(row, own, identity, overlong=overlong, prefix=prefix), error)


def batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Consecutive rows with at most `size` responses and `BATCH_BYTES` together, but at least one row each."""
    batch: list[Row] = []
    responses = length = 0
    for row in rows:
        if batch and (responses + row.responses > size or length + row.bytes > BATCH_BYTES or len(batch) >= size):
            yield batch
            batch, responses, length = [], 0, 0
        batch.append(row)
        responses, length = responses + row.responses, length + row.bytes
    if batch:
        yield batch


def in_order(jobs: Iterable[B], work: Callable[[B], T], ahead: int) -> Iterator[tuple[B, T]]:
    """`work(job)` for every job, `ahead` of them at a time, results in the order of the jobs.

    Daemon threads: an interrupted command ends at once and does not wait for answers that nobody wants.
    """
    window: deque[tuple[B, Future[T]]] = deque()
    for job in jobs:
        if len(window) == ahead:
            first, future = window.popleft()
            yield first, future.result()
        window.append((job, started(work, job)))
    while window:
        first, future = window.popleft()
        yield first, future.result()


def started(work: Callable[[B], T], job: B) -> Future[T]:
    """What `work(job)` will have come to, in a daemon thread: an exit of the process does not wait for it."""
    future: Future[T] = Future()

    def fulfil() -> None:
        try:
            future.set_result(work(job))
        except BaseException as error:  # raised again by future.result()
            future.set_exception(error)

    threading.Thread(target=fulfil, daemon=True, name="plaudit-score").start()
    return future


def _result(line: bytes, prefix: str) -> dict[str, Any] | None:
    """An output line of ours, None if it is something else."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    about = value.get(prefix + ABOUT) if isinstance(value, dict) else None
    known = isinstance(about, dict) and ("revision" not in about or about.keys() >= _SCORER)
    return value if known else None


def _identity(about: dict[str, Any]) -> Identity | None:
    return Identity(about["model"], about["revision"], about["numerics"]) if "revision" in about else None
