"""Which well-formed comparisons are used: policy over records, in order, without I/O."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Set
from dataclasses import replace

from plaudit_model.records import Comparison, Record

from .formats import Reading
from .read_options import Ties
from .reasons import DropReason, NoteReason

Judgement = tuple[int, tuple[int, ...], float | None, list[str]]


class Screen:
    """Examines records one after the other and remembers the comparisons it has seen (about 200 bytes each).

    `strict_ids` None lets every id pass.
    """

    def __init__(self, ties: Ties, strict_ids: Set[str] | None = None) -> None:
        self._ties, self._strict_ids = ties, strict_ids
        self.missing_ids = set(strict_ids or ())
        self._seen: set[bytes] = set()
        self._winners: dict[bytes, int] = {}

    def examine(self, reading: Reading) -> Reading | DropReason:
        """The reading to use, with what is odd about it, or why it is not used."""
        record = reading.record
        comparison = record.comparisons[0]
        self.missing_ids.discard(record.id)
        if self._strict_ids is not None and record.id not in self._strict_ids:
            return "not_in_strict_ids"
        if record.responses[0] == record.responses[1]:
            return "identical_pair"
        pair, judgement = _pair(record), _judgement(record)
        if self._is_duplicate(pair, judgement):
            return "duplicate"
        if comparison.outcome == "tie" and self._ties == "drop":
            return "tie"
        notes = reading.notes + self._contradiction(pair, judgement[0])
        if self._ties == "half" and _leaning_tie(comparison):
            record = replace(record, comparisons=(replace(comparison, votes=None),))
            notes = (*notes, "tie_votes_set_aside")
        return Reading(record, notes)

    def _is_duplicate(self, pair: bytes, judgement: Judgement) -> bool:
        """The same judgement of the same texts, in either order. A repeated pair with other votes or other
        people is another judgement."""
        key = pair + _digest(judgement)
        known = key in self._seen
        self._seen.add(key)
        return known

    def _contradiction(self, pair: bytes, winner: int) -> tuple[NoteReason, ...]:
        """Whether the other response won when this pair was seen before."""
        if winner and self._winners.setdefault(pair, winner) != winner:
            return ("contradictory_pair",)
        return ()


def _pair(record: Record) -> bytes:
    """Key of the prompt and the two texts, whatever their order."""
    return _digest([(message.role, message.content) for message in record.prompt], sorted(record.responses))


def _judgement(record: Record) -> Judgement:
    """What was said of the pair, as if its texts were in alphabetical order: 1 if the first of them won, -1 if
    the other did, 0 for a tie; votes, margin, people."""
    comparison = record.comparisons[0]
    sign = 1 if record.responses[0] < record.responses[1] else -1
    winner = {"first": sign, "second": -sign, "tie": 0}[comparison.outcome]
    votes = comparison.votes
    counts = (votes.first, votes.second)[::sign] + (votes.tie,) if votes else ()
    return winner, counts, comparison.margin, sorted(comparison.annotators)


def _leaning_tie(comparison: Comparison) -> bool:
    return comparison.outcome == "tie" and comparison.votes is not None and comparison.share() != 0.5


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(json.dumps(parts).encode()).digest()[:16]
