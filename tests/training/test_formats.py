"""One row of each format as a record, and what makes a row not one."""

from __future__ import annotations

from typing import Any

import pytest

from plaudit_model.records import Comparison, Message, Origin, Record, Votes
from plaudit_training.errors import BadRow, DataError
from plaudit_training.formats import all_formats, detect

PLACE = Origin("data.jsonl", 7)
FORMATS = all_formats({})
USER, BOT = "user", "assistant"


def parse(name: str, row: dict[str, Any], labels: dict[str, str] | None = None) -> Record:
    return all_formats(labels or {})[name].parse(row, PLACE).record


def notes(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    return FORMATS[name].parse(row, PLACE).notes


def reason(name: str, row: dict[str, Any], labels: dict[str, str] | None = None) -> str:
    with pytest.raises(BadRow) as caught:
        parse(name, row, labels)
    return caught.value.defect.reason


def turns(*contents: str, roles: tuple[str, ...] = (USER, BOT)) -> list[dict[str, str]]:
    return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]


def prompt_of(record: Record) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in record.prompt]


# -- transcripts ----------------------------------------------------------------------------------------------


def transcript(*contents: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {content}" for i, content in enumerate(contents))


def test_a_transcript_is_cut_between_turns() -> None:
    row = {"chosen": transcript("a", "b", "c", "I do."), "rejected": transcript("a", "b", "c", "I don't.")}
    record = parse("hh-rlhf", row)
    assert prompt_of(record) == [(USER, "a"), (BOT, "b"), (USER, "c")]
    assert record.responses == ("I do.", "I don't.")
    assert record.comparisons == (Comparison(0, 1, "first"),) and record.id == "data.jsonl:7"


def test_a_marker_of_the_speaker_is_text_of_the_turn() -> None:
    row = {"chosen": transcript("a", "b") + "\n\nAssistant:  more", "rejected": transcript("a", "c")}
    assert parse("hh-rlhf", row).responses == ("b\n\nAssistant:  more", "c")


def test_one_response_may_be_empty() -> None:
    row = {"chosen": transcript("a", "b"), "rejected": "\n\nHuman: a\n\nAssistant:"}
    assert parse("hh-rlhf", row).responses == ("b", "") and notes("hh-rlhf", row) == ("one_empty_response",)


@pytest.mark.parametrize(
    ("chosen", "rejected", "why"),
    [
        ("Hello", transcript("a", "b"), "bad_transcript"),
        (transcript("a", "b", "c"), transcript("a", "b", "d"), "bad_transcript"),
        (transcript("a", "b", "c", "d"), transcript("a", "x", "c", "d"), "bad_transcript"),
        (transcript("a", "b", "c", "d"), transcript("a", "b"), "bad_transcript"),
        (transcript("a", "b"), transcript("x", "b"), "different_prompts"),
        (transcript("", "b"), transcript("", "c"), "empty_prompt"),
        (transcript("a", ""), transcript("a", " "), "empty_response"),
        (transcript("a", "b"), None, "missing_key"),
    ],
)
def test_transcripts_that_are_none(chosen: str, rejected: str | None, why: str) -> None:
    assert reason("hh-rlhf", {"chosen": chosen, "rejected": rejected}) == why


# -- preference -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p?", "chosen": "x", "rejected": "y"},
        {"prompt": turns("p?"), "chosen": turns("x", roles=(BOT,)), "rejected": turns("y", roles=(BOT,))},
        {"prompt": "p?", "chosen": turns("x", roles=(BOT,)), "rejected": turns("y", roles=(BOT,))},
        {"chosen": turns("p?", "x"), "rejected": turns("p?", "y")},
        {"prompt": "p?", "chosen": turns("p?", "x"), "rejected": turns("p?", "y")},
        {"prompt": turns("p?"), "chosen": turns("p?", "x"), "rejected": turns("p?", "y")},
        {"prompt": None, "chosen": "p? x", "rejected": "p? y"},
    ],
)
def test_all_forms_of_a_preference_are_the_same_record(row: dict[str, Any]) -> None:
    record = parse("preference", row)
    assert prompt_of(record) == [(USER, "p?")] and record.responses == ("x", "y")
    assert record.comparisons == (Comparison(0, 1, "first"),)


@pytest.mark.parametrize("again", ["go on", "p?"])
def test_turns_after_an_explicit_prompt_follow_it(again: str) -> None:
    roles = (BOT, USER)
    row = {"chosen": turns("a", again, "x", roles=roles), "rejected": turns("a", again, "y", roles=roles)}
    for lead in ("p?", turns("p?")):
        record = parse("preference", {"prompt": lead, **row})
        assert prompt_of(record) == [(USER, "p?"), (BOT, "a"), (USER, again)] and record.responses == ("x", "y")


@pytest.mark.parametrize(
    ("prompt", "before"),
    [
        (turns("p?"), turns("p?", "a", "q?")),  # begins with it
        (turns("p?", "a"), turns("p?", "a", "q?")),
        ("p?", [{"role": "system", "content": "s"}, *turns("p?", "a", "q?")]),
        ([{"role": "system", "content": "s"}, *turns("p?")], [{"role": "system", "content": "s"}, *turns("p?")]),
        ("q?", turns("p?", "a", "q?")),  # UltraFeedback: the last user's turn
        (turns("a", "p?", roles=(BOT, USER)), turns("a", "p?", roles=(BOT, USER))),  # begins with the assistant's
        (None, turns("a", "p?", roles=(BOT, USER))),
    ],
)
def test_whole_conversations_hold_the_prompt_once(prompt: object, before: list[dict[str, str]]) -> None:
    chosen, rejected = ([*before, {"role": BOT, "content": text}] for text in "xy")
    record = parse("preference", {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert prompt_of(record) == [(turn["role"], turn["content"]) for turn in before]
    assert record.responses == ("x", "y")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "responses"),
    [
        ("The sky is blue.", "The sky is black.", "The sky is", ("blue.", "black.")),
        ("One two", "One", "One", ("two", "")),
        ("say it\nwell", "say it\nbadly", "say it", ("well", "badly")),
        ("one two three", "one twofold", "one", ("two three", "twofold")),
    ],
)
def test_an_implicit_prompt_in_text_ends_with_a_word(
    chosen: str, rejected: str, prompt: str, responses: tuple[str, str]
) -> None:
    record = parse("preference", {"chosen": chosen, "rejected": rejected})
    assert record.prompt == (Message("user", prompt),) and record.responses == responses


@pytest.mark.parametrize("margin", [1e39, -1e7, "1e300"])
def test_a_margin_that_would_cost_its_step_is_bad(margin: float | str) -> None:
    assert reason("preference", {"prompt": "p", "chosen": "x", "rejected": "y", "margin": margin}) == "bad_margin"


def test_what_would_change_the_text_that_is_scored_is_refused() -> None:
    row = {"prompt": "p", "chosen": "x", "rejected": "y"}
    assert reason("preference", row | {"chat_template_kwargs": {"enable_thinking": True}}) == "unsupported"
    thought = [{"role": BOT, "content": "x", "reasoning_content": "because"}]
    assert reason("preference", row | {"chosen": thought, "rejected": turns("y", roles=(BOT,))}) == "unsupported"


@pytest.mark.parametrize("margin", [0.5, 2, "0.5", 0, -1.5])
def test_margins(margin: float | str) -> None:
    row = {"prompt": "p", "chosen": "x", "rejected": "y", "margin": margin, "id": 12}
    assert parse("preference", row).comparisons[0].margin == float(margin) and parse("preference", row).id == "12"
    assert notes("preference", row) == (("negative_margin",) if float(margin) < 0 else ())


@pytest.mark.parametrize("absent", [None, ""])
def test_an_absent_margin_is_none(absent: object) -> None:
    row = {"prompt": "p", "chosen": "x", "rejected": "y", "margin": absent}
    assert parse("preference", row).comparisons[0].margin is None


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"chosen": "apple", "rejected": "apricot"}, "empty_prompt"),
        ({"chosen": turns("p?", "x"), "rejected": "y"}, "wrong_type"),
        ({"chosen": turns("x", roles=(BOT,)), "rejected": turns("y", roles=(BOT,))}, "empty_prompt"),
        ({"chosen": [], "rejected": []}, "bad_transcript"),
        ({"chosen": turns("p?", "x"), "rejected": turns("p?", "z", "q?", "y")}, "bad_transcript"),
        ({"chosen": turns("p?", "x"), "rejected": turns("other?", "y")}, "different_prompts"),
        ({"prompt": "q?", "chosen": turns("p?", "x"), "rejected": turns("p?", "y")}, "different_prompts"),
        ({"prompt": "q", "chosen": turns(*"abqcdx"), "rejected": turns(*"abqcdy")}, "different_prompts"),
        ({"prompt": "p?", "chosen": turns("x", roles=(BOT,)), "rejected": turns("p?", "y")}, "different_prompts"),
        (
            {"prompt": "p?", "chosen": turns(*"ax", roles=(BOT, USER)), "rejected": turns(*"ay", roles=(BOT, USER))},
            "bad_transcript",
        ),
        ({"prompt": 1, "chosen": "x", "rejected": "y"}, "wrong_type"),
        ({"prompt": "p", "chosen": "x"}, "missing_key"),
        ({"chosen": [{"role": USER}], "rejected": "y"}, "missing_key"),
        ({"chosen": ["p?"], "rejected": turns("p?", "x")}, "wrong_type"),
        ({"chosen": [{"role": USER, "content": [{"type": "text"}]}], "rejected": []}, "unsupported"),
        ({"chosen": [{"role": BOT, "content": "", "tool_calls": [{}]}], "rejected": []}, "unsupported"),
    ],
)
def test_preferences_that_are_none(row: dict[str, Any], why: str) -> None:
    assert reason("preference", row) == why


# -- pairs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "outcome"),
    [("A", "first"), ("b", "second"), ("tie", "tie"), (" Equal ", "tie"), (1, "first"), ("2", "second"),
     (2.0, "second")],
)  # fmt: skip
def test_labels_that_need_no_map(label: object, outcome: str) -> None:
    row = {"prompt": "p", "response_a": "x", "response_b": "y", "label": label, "annotator": "w1", "margin": "1.5"}
    record = parse("pairs", row)
    assert record.responses == ("x", "y") and record.comparisons[0].outcome == outcome
    assert record.comparisons[0].annotators == ("w1",) and record.comparisons[0].margin == 1.5


def test_a_label_map_replaces_what_is_known() -> None:
    row = {"prompt": "p", "response_a": "x", "response_b": "y"}
    labels = {"0": "tie", "Left": "a", "true": "b"}
    assert parse("pairs", {**row, "label": 0}, labels).comparisons[0].outcome == "tie"
    assert parse("pairs", {**row, "label": "left"}, labels).comparisons[0].outcome == "first"
    assert parse("pairs", {**row, "label": True}, labels).comparisons[0].outcome == "second"
    assert reason("pairs", {**row, "label": 1}, labels) == "unknown_label"


@pytest.mark.parametrize(("label", "why"), [(0, "unknown_label"), ("", "unknown_label"), (None, "missing_key"),
                                            (float("nan"), "unknown_label"), ("x" * 99, "unknown_label")])  # fmt: skip
def test_labels_are_not_guessed(label: object, why: str) -> None:
    assert reason("pairs", {"prompt": "p", "response_a": "x", "response_b": "y", "label": label}) == why


def test_an_unknown_label_is_told_unless_it_may_be_a_text() -> None:
    with pytest.raises(BadRow, match="'Model_A'; known are"):
        parse("pairs", {"prompt": "p", "response_a": "x", "response_b": "y", "label": "Model_A"})
    with pytest.raises(BadRow, match="a str of 101 characters; known are") as caught:
        parse("pairs", {"prompt": "p", "response_a": "x", "response_b": "y", "label": "secret" + "x" * 93})
    assert "secret" not in str(caught.value)


# -- votes ----------------------------------------------------------------------------------------------------


def debate(gold: str | None, votes: str, **changes: Any) -> dict[str, Any]:
    """`votes` is a string of 1, 2 and = in the order they were given."""
    values = {"1": "a1", "2": "a2", "=": "equal"}
    return {
        "id": "arg1_arg2", "arg1": {"text": "x", "stance": "Yes"}, "arg2": {"text": "y", "stance": "Yes"},
        "debateMetaData": {"title": "Is it?"}, "goldLabel": gold,
        "mTurkAssignments": [{"turkID": f"W{i}", "value": values[v]} for i, v in enumerate(votes)], **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("gold", "votes", "outcome", "noted"),
    [
        ("a1", "1122=", "first", ("gold_against_votes",)),
        ("a2", "2221=", "second", ()),
        ("equal", "12===", "tie", ()),
        ("equal", "112==", "tie", ("gold_against_votes",)),
        (None, "112==", "first", ("gold_missing",)),
        (None, "1122=", "tie", ("gold_missing",)),
        ("a1", "", "first", ()),
    ],
)
def test_gold_decides_and_votes_are_kept(gold: str | None, votes: str, outcome: str, noted: tuple[str, ...]) -> None:
    record = parse("ukpconvarg1", debate(gold, votes))
    counted = Votes(votes.count("1"), votes.count("2"), votes.count("=")) if votes else None
    workers = tuple(f"W{i}" for i in range(len(votes)))
    assert record.comparisons == (Comparison(0, 1, outcome, votes=counted, annotators=workers),)  # type: ignore[arg-type]
    assert record.prompt == (Message("user", "Is it?\nYes"),) and record.tags == ("Is it?",)
    assert record.id == "arg1_arg2" and notes("ukpconvarg1", debate(gold, votes)) == noted


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"arg2": {"text": "y", "stance": "No"}}, "different_prompts"),
        ({"arg1": "x"}, "wrong_type"),
        ({"arg1": {"stance": "Yes"}}, "missing_key"),
        ({"goldLabel": "a3"}, "unknown_label"),
        ({"mTurkAssignments": [{"turkID": "W1", "value": "neither"}]}, "unknown_label"),
        ({"mTurkAssignments": ["a1"]}, "wrong_type"),
        ({"mTurkAssignments": [], "goldLabel": None}, "missing_key"),
        ({"debateMetaData": {}}, "missing_key"),
    ],
)
def test_debates_that_are_none(changes: dict[str, Any], why: str) -> None:
    assert reason("ukpconvarg1", debate("a1", "111") | changes) == why


# -- detection ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"chosen": transcript("a", "b"), "rejected": transcript("a", "c")}, "hh-rlhf"),
        ({"chosen": "x y", "rejected": "x z"}, "preference"),
        ({"chosen": turns("p", "x"), "rejected": turns("p", "y"), "margin": 1}, "preference"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "label": "A"}, "pairs"),
        (debate("a1", "1"), "ukpconvarg1"),
    ],
)
def test_formats_are_known_by_their_columns(row: dict[str, Any], name: str) -> None:
    assert detect([row], FORMATS).name == name
    assert detect([{"stray": 1}, row, row], FORMATS).name == name


def test_columns_of_two_formats_are_ambiguous() -> None:
    row = {"prompt": "p", "chosen": "x", "rejected": "y", "response_a": "x", "response_b": "y", "label": 1}
    with pytest.raises(DataError, match="could be preference or pairs"):
        detect([row], FORMATS)
