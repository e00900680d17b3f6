"""One table from failure to HTTP: complete, consistent, and silent about what was sent."""

import re
from pathlib import Path

import pytest

import plaudit_server
from plaudit_model.errors import ItemError
from plaudit_server import engine_errors
from plaudit_server.engine_errors import DeadlineExceeded, Draining, EngineError, NonFinite, Overloaded
from plaudit_server.errors import JITTER, RULES, RequestError, from_engine, item_json, whole_failure

SOURCES = Path(plaudit_server.__file__).parent


def engine_error_classes():
    return [kind for kind in vars(engine_errors).values() if isinstance(kind, type) and issubclass(kind, EngineError)]


def test_every_engine_error_has_a_row_that_agrees_with_it():
    kinds = [kind for kind in engine_error_classes() if kind is not EngineError]
    assert len(kinds) >= 9
    for kind in kinds:
        assert RULES[kind.code].retryable is kind.retryable, kind


def test_every_item_error_has_a_row():
    documented = re.search(r"Codes: (.*?)\.\n", ItemError.__doc__, re.DOTALL)
    codes = set(re.findall(r"`(\w+)`", documented[1]))
    assert len(codes) >= 9 and codes <= set(RULES)
    assert all(RULES[code].status == 422 for code in codes)


def test_every_code_that_the_source_raises_has_a_row_and_every_row_is_used():
    text = "".join(path.read_text() for path in SOURCES.glob("*.py"))
    raised = set(re.findall(r'(?:RequestError|ItemError)\(\s*"(\w+)"', text))
    raised |= set(re.findall(r'return "(\w+)", f?["\']', text))
    assert raised <= set(RULES)
    engine = {kind.code for kind in engine_error_classes() if kind is not EngineError}
    items = set(re.findall(r"`(\w+)`", ItemError.__doc__))
    assert set(RULES) - raised - engine - items == {"rate_limited"}


def test_only_capacity_and_deadlines_are_retryable_and_5xx_are_rare():
    assert {code for code, rule in RULES.items() if rule.retryable} == {
        "rate_limited", "overloaded", "draining", "asleep", "unavailable", "deadline_exceeded",
    }  # fmt: skip
    assert {rule.status for rule in RULES.values() if rule.status >= 500} == {500, 503, 504}
    assert [code for code, rule in RULES.items() if rule.status == 500] == ["internal_error"]


def test_the_shape_of_an_error():
    body, headers = RequestError("unknown_field", "no such field", param="items[1]").body("id-1")
    assert body == {"error": {
        "code": "unknown_field", "message": "no such field", "type": "invalid_request_error", "param": "items[1]",
        "retryable": False, "request_id": "id-1",
    }}  # fmt: skip
    assert headers == {}


@pytest.mark.parametrize("draw", [0.0, 0.5, 0.999])
def test_a_refusal_says_when_to_come_back_with_jitter(draw):
    body, headers = from_engine(Overloaded("full", retry_after=10.0)).body("id", lambda: draw)
    expected = 10_000 * (1 + JITTER * (2 * draw - 1))
    assert body["error"]["retry_after_ms"] == pytest.approx(expected, abs=1)
    assert int(headers["retry-after"]) >= expected / 1000
    assert body["error"]["retryable"] is True


def test_an_items_error_beside_its_null():
    assert item_json(ItemError("too_long", "9 tokens")) == {
        "code": "too_long", "message": "9 tokens", "type": "item_error", "retryable": False,
    }  # fmt: skip
    assert item_json(DeadlineExceeded("late", started=False))["retryable"] is True


def test_when_items_fail_the_whole_request():
    late, other = DeadlineExceeded("late", started=False), DeadlineExceeded("later", started=True)
    long, nan = ItemError("too_long", "long"), NonFinite("nan")
    assert whole_failure([]) is None
    assert whole_failure([None]) is None
    assert whole_failure([None, late]) is None
    assert whole_failure([late, long]) is None
    assert whole_failure([long, long]) is None
    assert whole_failure([late, Draining("bye")]) is None
    alone, together = whole_failure([long]), whole_failure([late, other])
    assert alone is not None and (alone.status, alone.code) == (422, "too_long")
    assert together is not None and (together.status, together.code) == (504, "deadline_exceeded")
    poison = whole_failure([nan])
    assert poison is not None and poison.status == 422
