"""UKPConvArg1 (Habernal and Gurevych, ACL 2016): which of two arguments is more convincing, five votes a pair.

The prompt is the debate's title and the side both arguments take. The gold label decides the winner; a pair
without one (the authors' filter left it out) has the winner of its votes.
"""

from __future__ import annotations

from collections import Counter

from plaudit_model.records import Comparison, Message, Origin, Outcome, Votes

from ..errors import BadRow
from ..reasons import NoteReason
from . import fields
from .format import Columns, Format, Reading, pair_reading

_OUTCOMES: dict[str, Outcome] = {"a1": "first", "a2": "second", "equal": "tie"}


def _parse(row: Columns, origin: Origin) -> Reading:
    first, second = fields.table(row, "arg1"), fields.table(row, "arg2")
    title = fields.text(fields.table(row, "debateMetaData"), "title", "debateMetaData.title")
    prompt = Message("user", f"{title}\n{_stance(first, second)}")
    pair = fields.text(first, "text", "arg1.text"), fields.text(second, "text", "arg2.text")
    comparison, notes = _comparison(row)
    record_id = fields.record_id(row, origin)
    return pair_reading(record_id, (prompt,), pair, comparison, origin, notes=notes, tags=(title,))


def _stance(first: Columns, second: Columns) -> str:
    stances = [fields.text(side, "stance", f"arg{n}.stance") for n, side in enumerate((first, second), 1)]
    if stances[0] != stances[1]:
        raise BadRow("different_prompts", "the two arguments take different sides")
    return stances[0]


def _comparison(row: Columns) -> tuple[Comparison, tuple[NoteReason, ...]]:
    assignments = [fields.table({"_": a}, "_", f"mTurkAssignments[{i}]")
                   for i, a in enumerate(fields.rows(row, "mTurkAssignments"))]  # fmt: skip
    counts = Counter(_outcome(fields.text(a, "value", "mTurkAssignments.value")) for a in assignments)
    votes = Votes(counts["first"], counts["second"], counts["tie"])
    annotators = tuple(fields.text(a, "turkID", "mTurkAssignments.turkID") for a in assignments)
    notes: tuple[NoteReason, ...] = ()
    majority = _majority(votes)
    if row.get("goldLabel") is None:
        if not votes.total:
            raise BadRow("missing_key", "there is neither a gold label nor a vote")
        outcome, notes = majority, ("gold_missing",)
    else:
        outcome = _outcome(fields.text(row, "goldLabel"))
        notes = ("gold_against_votes",) if outcome != majority and votes.total else ()
    return Comparison(0, 1, outcome, votes=votes if votes.total else None, annotators=annotators), notes


def _outcome(label: str) -> Outcome:
    if label not in _OUTCOMES:
        raise BadRow("unknown_label", f"{fields.quoted(label)}; known are {', '.join(_OUTCOMES)}")
    return _OUTCOMES[label]


def _majority(votes: Votes) -> Outcome:
    """The response with more votes; votes for a tie count for neither."""
    if votes.first == votes.second:
        return "tie"
    return "first" if votes.first > votes.second else "second"


FORMAT = Format(
    name="ukpconvarg1",
    description="arg1, arg2, debateMetaData, mTurkAssignments, goldLabel, id",
    columns=frozenset({"id", "arg1", "arg2", "debateMetaData", "mTurkAssignments", "goldLabel"}),
    matches=lambda row: {"arg1", "arg2", "mTurkAssignments"} <= row.keys(),
    parse=_parse,
)
