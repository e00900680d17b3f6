from __future__ import annotations

import json
from typing import Any

import pytest

from plaudit import _wire as wire
from plaudit._items import Chunk, Place
from plaudit._wire import Reply, Request
from plaudit.errors import ResponseInvalid
from plaudit.types import Identity, ItemError, Timing, Truncation, Usage

IDENTITY = {"model": "m", "revision": "r", "numerics": "n"}
PLACES = (Place(7, 3, None), Place(8, 4, 1))


def good() -> dict[str, Any]:
    return {
        "request_id": "q1",
        **IDENTITY,
        "transform": "normalized",
        "scores": [1.5, None],
        "results": [
            {
                "index": 0,
                "item_index": 0,
                "response_index": None,
                "score": 1.5,
                "tokens": 4,
                "cached": True,
                "truncated": {"side": "prompt", "tokens": 2},
                "attributes": {"score": 1.5, "tone": -2},
                "floor": "safety",
            },
            {
                "index": 1,
                "item_index": 1,
                "response_index": 0,
                "score": None,
                "tokens": 9,
                "truncated": None,
                "cached": False,
                "error": {"code": "too_long", "message": "cut it", "retryable": False},
            },
        ],
        "usage": {"prompt_tokens": 3, "total_tokens": 13, "shared_tokens": 1, "cached_tokens": 4},
        "timing": {"queue_ms": 1, "tokenize_ms": 0.25, "compute_ms": 8.5},
    }


def reply(answer: Any, status: int = 200, **headers: str) -> Reply:
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return Reply(status, {name.replace("_", "-"): value for name, value in headers.items()}, body)


def test_a_good_answer_becomes_scores() -> None:
    scores = wire.parse_scores(reply(good()), PLACES)
    first, second = scores
    assert scores.scores == [1.5, None] and len(scores) == 2 and scores[:1] == (first,)
    assert (first.index, first.item_index, first.response_index) == (7, 3, None)
    assert (second.index, second.item_index, second.response_index) == (8, 4, 1)
    assert first.truncated == Truncation("prompt", 2) and first.cached and first.tokens == 4
    assert first.attributes == {"score": 1.5, "tone": -2.0} and first.extra == {"floor": "safety"}
    assert second.error == ItemError("too_long", "cut it") and scores.failed == (second,)
    assert scores.identity == Identity("m", "r", "n") and scores.transform == "normalized"
    assert scores.usage == Usage(3, 13, 1, 4) and scores.timing == Timing(1.0, 0.25, 8.5)
    assert scores.request_id == "q1"


def test_what_is_optional_may_be_absent() -> None:
    answer = {**IDENTITY, "scores": [0], "results": [{"index": 0, "score": 0}]}
    scores = wire.parse_scores(reply(answer), PLACES[:1])
    assert scores.scores == [0.0] and isinstance(scores.scores[0], float)
    assert scores.usage == Usage() and scores.timing == Timing() and scores.request_id is None


def broken(path: str, value: Any) -> dict[str, Any]:
    """The good answer with one value replaced (or removed, for `...`)."""
    answer = good()
    *parents, last = path.split(".")
    target: Any = answer
    for parent in parents:
        target = target[int(parent) if parent.isdigit() else parent]
    key: Any = int(last) if last.isdigit() else last
    if value is ...:
        del target[key]
    else:
        target[key] = value
    return answer


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("results.1", ..., "2 items were sent and 1 results"),
        ("scores.1", ..., "2 items were sent and 1 scores"),
        ("scores", ..., "'scores' must be a list"),
        ("results", {}, "'results' must be a list"),
        ("results.0.index", 1, "out of order"),
        ("results.0.index", ..., "out of order"),
        ("results.0", None, r"results\[0\] must be a JSON object"),
        ("results.0.score", float("nan"), "holds NaN, which is no number"),
        ("results.0.score", float("inf"), "holds Infinity, which is no number"),
        ("results.0.score", 10**400, "must be a finite number"),
        ("results.0.score", "1.5", "must be a finite number"),
        ("results.0.score", True, "must be a finite number"),
        ("results.0.score", None, "exactly one must be there"),
        ("results.1.error", ..., "exactly one must be there"),
        ("results.1.score", 0.0, "exactly one must be there"),
        ("results.1.error", {}, "'code' must be a text"),
        ("scores.0", 1.25, "the result there says 1.5"),
        ("scores.1", 0.0, "the result there says None"),
        ("results.0.attributes.tone", "high", "attributes.tone must be a finite number"),
        ("results.0.tokens", -1, "must be a count"),
        ("results.0.truncated", {"tokens": 1}, "'side' must be a text"),
        ("revision", ..., "'revision' must be a text"),
        ("numerics", None, "'numerics' must be a text"),
        ("usage.total_tokens", 1.5, "usage.total_tokens must be a count"),
        ("timing.queue_ms", "1", "timing.queue_ms must be a finite number"),
    ],
)
def test_an_answer_that_breaks_the_contract_is_not_used(path: str, value: Any, reason: str) -> None:
    with pytest.raises(ResponseInvalid, match=reason):
        wire.parse_scores(reply(broken(path, value)), PLACES)


@pytest.mark.parametrize("body", [b"<html>proxy</html>", b"", b"\xff", b"[1]", b"[" * 100_000])
def test_an_answer_that_is_not_our_json_is_not_used(body: bytes) -> None:
    with pytest.raises(ResponseInvalid, match="cannot be used"):
        wire.parse_scores(reply(body), PLACES)


def test_swapped_results_are_refused_even_if_the_list_of_scores_is_swapped_too() -> None:
    answer = good()
    answer["results"].reverse()
    answer["scores"].reverse()
    with pytest.raises(ResponseInvalid, match="out of order"):
        wire.parse_scores(reply(answer), PLACES)


def test_a_request_carries_the_time_that_is_left() -> None:
    chunk = Chunk(b'{"text":"t"}', PLACES[:1])
    request = wire.score_request(chunk, wire.object_fields({"model": "m", "include": ("tokens",)}))
    assert json.loads(request.body(1.5) or b"") == {
        "items": [{"text": "t"}],
        "model": "m",
        "include": ["tokens"],
        "deadline_ms": 1500,
    }
    longest = {"items": [{"text": "t"}], "deadline_ms": 86_400_000}
    for seconds in (None, 1e9):
        assert json.loads(wire.score_request(chunk, b"").body(seconds) or b"") == longest
    assert json.loads(wire.score_request(chunk, b"").body(1e-9) or b"")["deadline_ms"] == 1
    assert Request("GET", "/info").body(1.0) is None


def test_a_comparison_is_checked() -> None:
    answer = {**IDENTITY, "request_id": "c", "probability": 0.25, "margin": -1.0, "tie_probability": 0.5}
    comparison = wire.parse_comparison(reply(answer))
    assert (comparison.probability, comparison.margin, comparison.tie_probability) == (0.25, -1.0, 0.5)
    assert wire.parse_comparison(reply(answer | {"tie_probability": None})).tie_probability is None
    wrong = ({"probability": None}, {"probability": 1.5}, {"margin": None}, {"tie_probability": -0.1}, {"revision": 3})
    for change in wrong:
        with pytest.raises(ResponseInvalid):
            wire.parse_comparison(reply(answer | change))


def test_info_and_models_are_checked() -> None:
    answer = {**IDENTITY, "limits": {"max_items": 4096, "max_body_bytes": 1 << 26}, "path": "packed"}
    info = wire.parse_info(reply(answer))
    assert (info.max_items, info.max_body_bytes, info.details["path"]) == (4096, 1 << 26, "packed")
    assert wire.limits_of(info).bytes == (1 << 26) - wire.ENVELOPE_BYTES
    for limits in (None, {}, {"max_items": 0, "max_body_bytes": 1}):
        with pytest.raises(ResponseInvalid):
            wire.parse_info(reply(answer | {"limits": limits}))
    assert wire.parse_models(reply({"data": [{"id": "a"}, {"id": "b"}]})) == ("a", "b")
    with pytest.raises(ResponseInvalid):
        wire.parse_models(reply({"data": [{"name": "a"}]}))


def error(**fields: Any) -> dict[str, Any]:
    return {"error": {"code": "at_capacity", "message": "later", "param": "p", "request_id": "q", **fields}}


def test_a_failure_says_what_the_server_said() -> None:
    failure = wire.failure_of(reply(error(retryable=True, retry_after_ms=1500), 503))
    assert failure is not None
    assert (failure.status, failure.code, failure.message, failure.param) == (503, "at_capacity", "later", "p")
    assert (failure.retryable, failure.retry_after, failure.request_id) == (True, 1.5, "q")
    assert wire.failure_of(reply({})) is None


@pytest.mark.parametrize("body", [b"<html>Bad gateway</html>", b"", b'{"error":"text"}', b"[]", b"\xff\xfe"])
def test_a_failure_of_a_proxy_is_a_failure_too(body: bytes) -> None:
    failure = wire.failure_of(reply(body, 502, x_request_id="q9"))
    assert failure is not None
    assert (failure.status, failure.code, failure.retryable, failure.request_id) == (502, None, None, "q9")
    assert failure.message


@pytest.mark.parametrize(
    ("headers", "fields", "seconds"),
    [
        ({"retry_after": "3"}, {}, 3.0),
        ({"retry_after": "0.25"}, {}, 0.25),
        ({"retry_after": "-3"}, {}, 0.0),
        ({"retry_after": "3"}, {"retry_after_ms": 250}, 0.25),
        ({"retry_after": "nan"}, {}, None),
        ({"retry_after": "soon"}, {}, None),
        ({"retry_after": "Wed, 21 Oct 2026 07:28:30 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, {}, 30.0),
        ({"retry_after": "Wed, 21 Oct 2026 07:28:30 GMT"}, {}, None),
        ({}, {"retry_after_ms": "x"}, None),
        ({}, {}, None),
    ],
)
def test_retry_after_is_read_in_all_its_forms(
    headers: dict[str, str], fields: dict[str, Any], seconds: float | None
) -> None:
    failure = wire.failure_of(reply(error(**fields), 503, **headers))
    assert failure is not None and failure.retry_after == seconds
