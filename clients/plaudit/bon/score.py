"""Scoring a file of samples: the samples of one prompt in one request, one line each, taken up after a kill.

The rows, the output lines and the way to continue a file are those of `plaudit score`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from .._bulk import Done, Tally, in_order
from .._jsonl import Row, read_rows, result_line
from .._scorers import Scorer
from .._settings import Overlong
from ..errors import InvalidInput
from ..types import Identity, ItemError, ScoreResult


def sample_rows(lines: Iterable[bytes], prefix: str = "") -> Iterator[Row]:
    """The rows of a file of samples. A sample without a response cannot be scored, and says so. Raises InvalidInput
    if a key is there twice."""
    seen: set[str] = set()
    for row in read_rows(lines, prefix):
        key, failure = row.value.get("key"), row.value.get("failure")
        if isinstance(key, str):
            if key in seen:
                raise InvalidInput(f"line {row.line} repeats the key {key}; `plaudit bon merge` leaves copies out")
            seen.add(key)
        if row.item is not None and row.item.keys() != {"prompt", "response"}:
            row = replace(row, item=None, problem=ItemError("bad_row", "a sample is a prompt and one response"))
        if isinstance(failure, dict):
            row = replace(row, item=None, problem=ItemError("not_generated", str(failure.get("message"))))
        yield row


def score_groups(
    rows: Iterable[Row], scorer: Scorer, tally: Tally, *, overlong: Overlong, prefix: str = ""
) -> Iterator[Done]:
    """Every row scored, in order, counted in `tally`; consecutive rows with one prompt in one call.

    Raises RevisionChanged as soon as another revision answers, Unavailable if nothing can be scored now.
    """

    def score(group: Sequence[Row]) -> tuple[list[list[ScoreResult]], Identity | None]:
        items = [row.item for row in group if row.item is not None]
        if not items:
            return [[] for _ in group], None
        responses = [item["response"] for item in items]
        scores = scorer.score_items([{"prompt": items[0]["prompt"], "responses": responses}])
        results = iter(scores)
        return [[] if row.item is None else [next(results)] for row in group], scores.identity

    groups = (list(group) for _, group in groupby(rows, key=lambda row: row.value.get("prompt")))
    for group, (results, identity) in in_order(groups, score, scorer.ahead):
        tally.admit(identity)
        for row, own in zip(group, results, strict=True):
            error = row.problem or (own[0].error if own else None)
            tally.rows += 1
            tally.failed += error is not None
            yield Done(row, result_line(row, own, identity, overlong=overlong, prefix=prefix), error)
