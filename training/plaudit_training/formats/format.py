"""What a format is: which rows are its own, and how one becomes a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from plaudit_model.records import Comparison, Message, Origin, Record

from ..errors import BadRow
from ..reasons import NoteReason

Columns = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reading:
    """A record, and what is odd about the row it was read from."""

    record: Record
    notes: tuple[NoteReason, ...] = ()


@dataclass(frozen=True, slots=True)
class Format:
    """`columns` are all that `parse` looks at. `matches` says whether a row looks like this format; `parse`
    raises BadRow if it is not, Dropped if it says nothing."""

    name: str
    description: str
    columns: frozenset[str]
    matches: Callable[[Columns], bool]
    parse: Callable[[Columns, Origin], Reading]


def pair_reading(
    record_id: str, prompt: tuple[Message, ...], pair: tuple[str, str], comparison: Comparison, origin: Origin,
    *, notes: tuple[NoteReason, ...] = (), tags: tuple[str, ...] = (),
) -> Reading:  # fmt: skip
    """A record of two responses. Raises BadRow if the prompt is empty, or both responses are."""
    if not any(message.content.strip() for message in prompt):
        raise BadRow("empty_prompt", "the prompt has no text")
    empty = sum(not text.strip() for text in pair)
    if empty == 2:
        raise BadRow("empty_response", "neither response has text")
    if empty:
        notes = (*notes, "one_empty_response")
    if comparison.margin is not None and comparison.margin < 0:
        notes = (*notes, "negative_margin")
    return Reading(Record(record_id, prompt, pair, (comparison,), origin, tags), notes)
