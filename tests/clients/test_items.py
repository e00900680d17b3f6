from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plaudit._items import Limits, check, encode, pieces, plan_chunks
from plaudit.errors import InvalidInput

TEXT = st.text(max_size=12)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": TEXT}), max_size=2)
ITEM = st.one_of(
    st.fixed_dictionaries({"prompt": TEXT | MESSAGES, "response": TEXT}),
    st.fixed_dictionaries({"prompt": TEXT | MESSAGES, "responses": st.lists(TEXT, max_size=9)}),
    st.fixed_dictionaries({"text": TEXT}),
    st.fixed_dictionaries({"input_ids": st.lists(st.integers(0, 99), max_size=5)}),
)


def flattened(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One item a response, as the server would see them."""
    flat = []
    for item in items:
        if "responses" in item:
            flat += [{"prompt": item["prompt"], "response": response} for response in item["responses"]]
        else:
            flat.append(item)
    return flat


@settings(max_examples=200)
@given(items=st.lists(ITEM, max_size=12), most=st.integers(1, 6), length=st.integers(1, 300))
def test_the_chunks_joined_are_the_list(items: list[dict[str, Any]], most: int, length: int) -> None:
    chunks = plan_chunks(pieces(items), Limits(most, length))
    sent = [json.loads(b"[" + chunk.items_json + b"]") for chunk in chunks]
    assert flattened([item for chunk in sent for item in chunk]) == flattened(items)
    places = [place for chunk in chunks for place in chunk.places]
    assert [place.index for place in places] == list(range(len(places)))
    expected = [
        (index, number if "responses" in item else None)
        for index, item in enumerate(items)
        for number in range(len(item.get("responses", [0])))
    ]
    assert [(place.item_index, place.response_index) for place in places] == expected


@settings(max_examples=200)
@given(items=st.lists(ITEM, max_size=12), most=st.integers(1, 6), length=st.integers(1, 300))
def test_no_chunk_is_larger_than_the_limits(items: list[dict[str, Any]], most: int, length: int) -> None:
    for chunk in plan_chunks(pieces(items), Limits(most, length)):
        assert 1 <= len(chunk.places) <= most
        assert len(chunk.items_json) <= length or len(chunk.places) == 1
        assert len(flattened(json.loads(b"[" + chunk.items_json + b"]"))) == len(chunk.places)


def test_the_responses_of_one_prompt_stay_together_where_they_fit() -> None:
    item = {"prompt": "p" * 50, "responses": ["a", "b", "c"]}
    (chunk,) = plan_chunks(pieces([item]), Limits(64, 10_000))
    assert json.loads(chunk.items_json) == item


def test_a_pair_is_an_item() -> None:
    (chunk,) = plan_chunks(pieces([("why?", "because")]), Limits(64, 10_000))
    assert json.loads(chunk.items_json) == {"prompt": "why?", "response": "because"}


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"prompt": "p"}, "an item is one of"),
        ({"prompt": "p", "response": "r", "text": "t"}, "an item is one of"),
        ({"prompt": "p", "response": None}, "'response' must be a text, got null"),
        ({"prompt": "p", "response": ["r"]}, "got list; for several, score_responses or rank"),
        ({"prompt": ["p"], "response": "r"}, "'prompt' must be a text or a list of"),
        ({"prompt": "p", "responses": "r"}, "'responses' must be a list of texts"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "must end with the assistant's turn"),
        ({"messages": []}, "must end with the assistant's turn"),
        ({"input_ids": [1, -2]}, "'input_ids' must be a list of token ids"),
        ({"input_ids": [1, True]}, "'input_ids' must be a list of token ids"),
        (("p", "r", "x"), "is a tuple of 3"),
        (7, "is int"),
    ],
)
def test_an_item_that_cannot_be_sent_is_named(item: Any, reason: str) -> None:
    with pytest.raises(InvalidInput, match=f"item 1 .*{reason}"):
        pieces([{"text": "good"}, item])


def test_every_native_shape_passes() -> None:
    turn = {"role": "assistant", "content": "c"}
    for item in (
        {"prompt": "p", "response": ""},
        {"prompt": [turn], "responses": []},
        {"messages": [turn]},
        {"text": ""},
        {"input_ids": []},
        {"input_ids": [3], "prompt_tokens": 1},
    ):
        check(item)


def test_a_lone_surrogate_travels_to_the_server() -> None:
    assert json.loads(encode({"text": "a\ud800"})) == {"text": "a\ud800"}
    assert encode("ä") == '"ä"'.encode()


def test_a_value_that_is_not_json_is_the_callers_error() -> None:
    with pytest.raises(InvalidInput, match="is not JSON"):
        encode({"text": object()})
    with pytest.raises(InvalidInput, match="is not JSON"):
        encode(float("nan"))
