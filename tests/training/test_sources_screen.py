"""Which comparisons are used: ties, identical pairs, duplicates, contradictions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from plaudit_model.records import Comparison, Message, Origin, Outcome, Record, Votes
from plaudit_training.formats import Reading
from plaudit_training.screen import Screen


def reading(first: str = "x", second: str = "y", outcome: Outcome = "first", **label: Any) -> Reading:
    comparison = Comparison(0, 1, outcome, **label)
    return Reading(Record("id", (Message("user", "p"),), (first, second), (comparison,), Origin("f", 1)))


@pytest.mark.parametrize(
    ("policy", "votes", "becomes"),
    [
        ("drop", Votes(2, 1, 2), None),
        ("half", Votes(2, 1, 2), 0.5),
        ("half", Votes(1, 1, 3), 0.5),
        ("half", None, 0.5),
        ("keep", Votes(2, 1, 2), 0.6),
        ("keep", None, 0.5),
    ],
)
def test_what_becomes_of_a_tie(policy: Any, votes: Votes | None, becomes: float | None) -> None:
    result = Screen(policy).examine(reading(outcome="tie", votes=votes, annotators=("w",)))
    if becomes is None:
        assert result == "tie"
        return
    assert isinstance(result, Reading)
    comparison = result.record.comparisons[0]
    assert (comparison.outcome, comparison.share(), comparison.annotators) == ("tie", becomes, ("w",))
    set_aside = votes is not None and comparison.votes is None
    assert result.notes == (("tie_votes_set_aside",) if set_aside else ())
    assert set_aside == (policy == "half" and votes == Votes(2, 1, 2))


def test_a_winner_keeps_its_votes_whatever_they_say() -> None:
    one = reading(votes=Votes(1, 3, 1))
    assert Screen("half").examine(one) == one


@pytest.mark.parametrize("outcome", ["first", "second", "tie"])
def test_identical_texts_are_dropped(outcome: Outcome) -> None:
    assert Screen("keep").examine(reading("x", "x", outcome)) == "identical_pair"


@pytest.mark.parametrize(
    "again",
    [
        reading(votes=Votes(3, 1, 1)),
        reading("y", "x", "second", votes=Votes(1, 3, 1)),
        replace(reading(votes=Votes(3, 1, 1)), record=replace(reading(votes=Votes(3, 1, 1)).record, id="other")),
    ],
)
def test_the_same_judgement_again_is_a_duplicate(again: Reading) -> None:
    screen = Screen("half")
    assert isinstance(screen.examine(reading(votes=Votes(3, 1, 1))), Reading)
    assert screen.examine(again) == "duplicate"


@pytest.mark.parametrize(
    "other",
    [
        reading(votes=Votes(1, 1, 3)),
        reading(votes=Votes(3, 1, 1), annotators=("w",)),
        reading(votes=Votes(3, 1, 1), margin=1.0),
        reading("x", "z", votes=Votes(3, 1, 1)),
        reading("y", "x", votes=Votes(3, 1, 1)),
    ],
)
def test_another_judgement_is_no_duplicate(other: Reading) -> None:
    screen = Screen("half")
    screen.examine(reading(votes=Votes(3, 1, 1)))
    assert isinstance(screen.examine(other), Reading)


@pytest.mark.parametrize(
    ("later", "contradicts"),
    [(reading("x", "y", "second"), True), (reading("y", "x", "first"), True),
     (reading("x", "y", "tie", margin=2.0), False), (reading("x", "z", "second"), False),
     (reading(margin=2.0), False)],
)  # fmt: skip
def test_contradictions_are_used_and_noted(later: Reading, contradicts: bool) -> None:
    screen = Screen("half")
    screen.examine(reading(outcome="tie"))
    screen.examine(reading())
    result = screen.examine(later)
    assert result == replace(later, notes=("contradictory_pair",) if contradicts else ())


def test_only_strict_ids_pass_and_the_missing_are_known() -> None:
    screen = Screen("half", frozenset({"wanted", "absent"}))
    wanted = replace(reading(), record=replace(reading().record, id="wanted"))
    assert screen.examine(reading()) == "not_in_strict_ids"
    assert screen.examine(wanted) == wanted
    assert screen.missing_ids == {"absent"}
