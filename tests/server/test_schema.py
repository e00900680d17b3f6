"""From the bytes of a body to a checked call: every shape, and every way an envelope can be wrong."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plaudit_server.envelope import Options, decode, read_compare, read_query, read_rank, read_reward, read_score
from plaudit_server.errors import RequestError

PAIR = {"prompt": "p", "response": "r"}
MANY = {str(number): 0 for number in range(9_999)}
CANARY = "zanzibar-7741"


def refused(read, body):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(RequestError) as caught:
        read(raw)
    return caught.value


def test_every_shape_of_score_is_flattened_in_order():
    items = [
        PAIR,
        {"prompt": [{"role": "user", "content": "p"}], "responses": ["a", "b"]},
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]},
        {"text": "t"},
        {"input_ids": [1, 2, 3], "prompt_tokens": 1},
        {"input_ids": []},
    ]
    call = read_score(json.dumps({"items": items}).encode())
    assert [(c.item_index, c.response_index) for c in call.candidates] == [
        (0, None), (1, 0), (1, 1), (2, None), (3, None), (4, None), (5, None),
    ]  # fmt: skip
    assert call.candidates[2].item == {"prompt": [{"role": "user", "content": "p"}], "response": "b"}
    assert not call.single


def test_the_top_level_takes_three_of_the_shapes_itself():
    assert read_score(json.dumps(PAIR).encode()).single
    both = read_score(b'{"prompt": "p", "responses": ["a", "b"]}')
    assert [c.response_index for c in both.candidates] == [0, 1] and not both.single
    assert len(read_score(b'{"messages": [{"role": "user", "content": "p"}]}').candidates) == 1
    assert read_score(b'{"items": []}').candidates == []
    assert refused(read_score, {"text": "t"}).code == "invalid_shape"


def test_options_are_read_and_win_over_the_url():
    body = {**PAIR, "model": "m", "overlong": "truncate_prompt", "deadline_ms": 5, "include": ["timing"]}
    options = read_score(json.dumps(body).encode()).options
    url = read_query([("overlong", "error"), ("priority", "batch"), ("deadline_ms", "9.5")])
    assert options.over(url) == Options("m", "truncate_prompt", "batch", 5, "none", ["timing"])
    with pytest.raises(RequestError, match="different models"):
        options.over(Options(model="other"))


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (PAIR | {"foo": 1}, "unknown_field", None),
        (PAIR | {"text": "t"}, "invalid_shape", None),
        (PAIR | {"responses": []}, "invalid_shape", None),
        ({"prompt": "p"}, "invalid_shape", None),
        ({}, "invalid_shape", None),
        ([], "invalid_shape", None),
        ("text", "invalid_shape", None),
        ({"items": {}}, "invalid_request", "items"),
        ({"items": [PAIR, 3]}, "invalid_shape", "items[1]"),
        ({"items": [PAIR, {"text": "t", CANARY: 1}]}, "unknown_field", "items[1]"),
        ({"items": [PAIR, {"prompt": "p", "response": 3}]}, "invalid_request", "items[1].response"),
        ({"items": [{"input_ids": [1, True]}]}, "invalid_request", "items[0].input_ids[1]"),
        ({"prompt": 3, "response": "r"}, "invalid_request", "prompt"),
        ({"prompt": [{"role": "user"}], "response": "r"}, "invalid_request", "prompt[0].content"),
        ({"prompt": "p", "responses": ["a", None]}, "invalid_request", "responses[1]"),
        (PAIR | {"overlong": CANARY}, "invalid_request", "overlong"),
        (PAIR | {"transform": "softmax"}, "invalid_request", "transform"),
        (PAIR | {"include": ["everything"]}, "invalid_request", "include[0]"),
        (PAIR | {"deadline_ms": 0}, "invalid_request", "deadline_ms"),
        (PAIR | {"deadline_ms": "5"}, "invalid_request", "deadline_ms"),
        (PAIR | {"model": None}, "invalid_request", "model"),
    ],
)
def test_a_bad_envelope_is_a_422_that_names_the_field_and_repeats_nothing(body, code, param):
    error = refused(read_score, body)
    assert (error.status, error.code, error.param) == (422, code, param)
    assert CANARY not in error.message
    if code == "invalid_shape":
        assert '{"prompt", "response"}' in error.message


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nonsense", b'{"prompt": NaN}', b'{"prompt": Infinity}', b"\xff\xfe", b"[" * 100_000,
     b'{"a":' * 5_000, b'{"prompt": "\\ud800", "response": NaN}', b'["\\ud800", ' + b"[" * 100_000,
     b'{"prompt": "\\ud800"', b'{"n": 1' + b"0" * 5_000 + b"}", '{"prompt": "p"}'.encode("utf-16")],
)  # fmt: skip
def test_what_is_not_strict_json_is_a_400(body):
    error = refused(read_score, body)
    assert (error.status, error.code) == (400, "invalid_json")


def test_a_number_beyond_the_floats_is_refused():
    assert refused(read_score, b'{"prompt": "p", "response": "r", "deadline_ms": 1e999}').param == "deadline_ms"


def test_a_lone_surrogate_reaches_its_item_and_nothing_else():
    call = read_score(b'{"items": [{"prompt": "p", "response": "\\ud800"}, {"text": "\\ud83d\\ude00 fine"}]}')
    assert [c.item.get("response", c.item.get("text")) for c in call.candidates] == ["\ud800", "\U0001f600 fine"]
    assert refused(read_score, {"prompt": "p", "response": "r", "\ud800": 1}).code == "unknown_field"
    assert refused(read_score, {"prompt": "p", "response": "r", "overlong": "\ud800"}).param == "overlong"


@pytest.mark.parametrize(("read", "body"), [(read_score, PAIR), (read_rank, {"prompt": "p", "responses": ["r"]})])
def test_the_refusal_of_an_unknown_field_names_the_known_ones(read, body):
    said = refused(read, body | {"revision": "r"}).message
    assert all(name in said for name in ("id@revision", "overlong", "priority", "deadline_ms", "transform", "include"))


def test_4096_scores_are_the_most_of_one_request():
    assert len(read_score(json.dumps({"items": [PAIR] * 4096}).encode()).candidates) == 4096
    several = {"prompt": "p", "responses": ["a"] * 2049}
    for body in ({"items": [PAIR] * 4097}, {"items": [several, several]}, {"prompt": "p", "responses": ["a"] * 4097}):
        error = refused(read_score, body)
        assert (error.status, error.code) == (413, "too_many_items")
    assert refused(read_reward, {"query": ["t"] * 4097}).status == 413


@pytest.mark.parametrize(
    ("read", "body", "param"),
    [
        (read_score, {"messages": [0] * 9_999}, "messages[0]"),
        (read_score, {"prompt": [{}] * 9_999, "response": "r"}, "prompt[0].role"),
        (read_score, {"items": [{"input_ids": [1.5] * 9_999}]}, "items[0].input_ids[0]"),
        (read_score, {"items": [{"prompt": "p", "responses": [0] * 4_096}]}, "items[0].responses[0]"),
        (read_score, PAIR | {"include": [0] * 9_999}, "include[0]"),
        (read_score, {"messages": [{"role": "user", "content": "c"} | MANY]}, "messages[0]"),
        (read_score, {"items": [PAIR | MANY]}, "items[0]"),
        (read_rank, {"prompt": "p", "responses": []} | MANY, None),
        (read_reward, {"query": [0] * 4_096}, "query[0]"),
    ],
)
def test_a_body_full_of_faults_costs_no_more_than_one(read, body, param):
    """Each fault that is collected takes a kilobyte: two megabytes of zeros took a gigabyte, and seconds."""
    error = refused(read, body)
    assert error.status == 422 and error.param == param
    assert not re.search(r"and \d\d+ more", error.message)


def test_rank_and_compare_read_their_own_fields():
    ranked = read_rank(b'{"prompt": "p", "responses": ["a", "b"], "top_n": 1}')
    assert ranked.top_n == 1 and len(ranked.candidates) == 2
    assert refused(read_rank, {"prompt": "p", "responses": [], "top_n": 0}).param == "top_n"
    compared = read_compare(b'{"prompt": "p", "response_a": "a", "response_b": ""}')
    assert [c.item["response"] for c in compared.candidates] == ["a", ""]
    error = refused(read_compare, {"prompt": "p", "response_a": "a"})
    assert error.param == "response_b" and '"response_b"' in error.message
    assert refused(read_compare, {"prompt": "p", "response_a": "", "response_b": "", "transform": "none"}).status == 422


def test_openrlhf_may_send_whatever_it_likes_beside_the_query():
    body = {"query": ["a", ""], "prompts": None, "labels": [None, {"x": [1]}], "whatever": 1}
    assert [c.item for c in read_reward(json.dumps(body).encode()).candidates] == [{"text": "a"}, {"text": ""}]
    assert read_reward(b'{"query": []}').candidates == []
    assert refused(read_reward, {"query": "a"}).param == "query"
    assert refused(read_reward, {}).param == "query"


@pytest.mark.parametrize(
    "pairs", [[("overlng", "error")], [("deadline_ms", "nan")], [("priority", "x")], [("priority", "batch")] * 2]
)
def test_a_url_option_that_is_not_known_is_refused(pairs):
    with pytest.raises(RequestError) as caught:
        read_query(pairs)
    assert caught.value.status == 422


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["prompt", "response", "responses", "messages", "items", "text", "input_ids", "role", "model"]),
        inner, max_size=3,
    ),
    max_leaves=8,
)  # fmt: skip


@given(JSON)
def test_any_json_is_a_call_or_a_4xx(value):
    body = json.dumps(value).encode()
    for read in (read_score, read_rank, read_compare, read_reward):
        try:
            assert len(read(body).candidates) <= 4096
        except RequestError as error:
            assert 400 <= error.status < 500


@given(st.binary(max_size=40) | st.text(alphabet='{}[]",:\\ud80eE+-.0123456789 ntf').map(str.encode))
def test_any_bytes_are_a_value_or_a_400(body):
    try:
        decode(body)
    except RequestError as error:
        assert error.code == "invalid_json"
