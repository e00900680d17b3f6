"""Scoring a file of samples: the samples of one prompt in one request, one line each, taken up after a kill.

The rows, the output lines and the way to continue a file are those of `plaudit score`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from .._jsonl import Row, read_rows
from ..errors import InvalidInput
from ..types import Item, ItemError


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
            problem = ItemError("bad_row", "a sample is a prompt and one response; `plaudit score` takes several")
            row = replace(row, item=None, problem=problem)
        if isinstance(failure, dict):
            row = replace(row, item=None, problem=ItemError("not_generated", str(failure.get("message"))))
        yield row


def by_prompt(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Consecutive rows with one prompt."""
    return (list(group) for _, group in groupby(rows, key=lambda row: row.value.get("prompt")))


def one_item(group: Sequence[Row]) -> list[Item]:
    """The responses of a group as one item, so that their prompt travels once."""
    items: list[Any] = [row.item for row in group if row.item is not None]
    return [{"prompt": items[0]["prompt"], "responses": [item["response"] for item in items]}] if items else []
