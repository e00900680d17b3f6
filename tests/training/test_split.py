"""No conversation on both sides, and none that moves."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plaudit_model.records import Comparison, Message, Origin, Record
from plaudit_training.errors import DataError
from plaudit_training.split import split_by_conversation


def records(prompts: Sequence[str]) -> list[Record]:
    return [
        Record(f"{i}", (Message("user", text),), ("x", f"{i}"), (Comparison(0, 1, "first"),), Origin("f", i + 1))
        for i, text in enumerate(prompts)
    ]


def test_about_the_share_is_held_out_and_the_order_is_kept() -> None:
    everything = records([f"question {i}" for i in range(2000)])
    train, held_out = split_by_conversation(everything, 0.2, 0)
    assert 320 < len(held_out) < 480 and len(train) + len(held_out) == 2000
    assert [train, held_out] == [sorted(side, key=lambda r: r.origin.line) for side in (train, held_out)]


def test_conversations_stay_together_whatever_their_case_and_white_space() -> None:
    everything = records([f"{blank}Question {i}{blank}" for i in range(100) for blank in ("", " ", "\n")])
    train, held_out = split_by_conversation(everything, 0.3, 1)
    assert not {r.conversation() for r in train} & {r.conversation() for r in held_out}
    assert len(held_out) % 3 == 0


def test_the_seed_decides() -> None:
    everything = records([f"question {i}" for i in range(200)])
    assert split_by_conversation(everything, 0.3, 1) == split_by_conversation(everything, 0.3, 1)
    assert split_by_conversation(everything, 0.3, 1) != split_by_conversation(everything, 0.3, 2)


@given(extra=st.lists(st.text(max_size=8), max_size=20), share=st.sampled_from([0.1, 0.3, 0.5]))
def test_more_records_move_no_other(extra: list[str], share: float) -> None:
    before = records([f"question {i}" for i in range(60)])
    held_out = {r.conversation() for r in split_by_conversation(before, share, 5)[1]}
    after = split_by_conversation(before + records(extra), share, 5)[1]
    known = {r.conversation() for r in before}
    assert {r.conversation() for r in after} & known == held_out


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_must_leave_two_sides(share: float) -> None:
    with pytest.raises(DataError, match="must lie between 0 and 1"):
        split_by_conversation(records(["a", "b"]), share, 0)


@pytest.mark.parametrize(("prompts", "share", "side"), [(["a"] * 9, 0.001, "held-out"), (["a"] * 9, 0.999, "training")])
def test_an_empty_side_is_an_error(prompts: list[str], share: float, side: str) -> None:
    with pytest.raises(DataError, match=f"of 1 conversations none falls on the {side} side"):
        split_by_conversation(records(prompts), share, 0)
    with pytest.raises(DataError, match="of 0 conversations"):
        split_by_conversation([], 0.5, 0)
