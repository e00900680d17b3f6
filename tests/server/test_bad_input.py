"""Everything hostile that a body can be, at a running server: the envelope's fault is a 4xx, the item's is its own."""

import json

import pytest

GOOD = {"prompt": "Human: what is the best way?", "response": "practise daily"}
CANARY = "zanzibar-7741"


@pytest.fixture(scope="module")
def good_score(http):
    return http.post("/score", content=json.dumps(GOOD)).json()["score"]


BAD_ITEMS = {
    "lone surrogate": ({"prompt": "p", "response": f"{CANARY}\ud800"}, "invalid_unicode"),
    "surrogate in a prompt": ({"prompt": "\udfff", "response": "r"}, "invalid_unicode"),
    "surrogate in a role": ({"messages": [{"role": "\ud800", "content": CANARY}]}, "invalid_messages"),
    "10 MB text": ({"prompt": "p", "response": CANARY * 800_000}, "too_long"),
    "10 MB of one word": ({"text": "a" * 10_000_000}, "too_long"),
    "over-long": ({"prompt": "p", "response": f"{CANARY} " * 600}, "too_long"),
    "a million token ids": ({"input_ids": [1] * 1_000_000}, "too_long"),
    "an unknown role": ({"prompt": [{"role": CANARY, "content": "x"}], "response": "r"}, "invalid_messages"),
    "no assistant's turn": ({"messages": [{"role": "user", "content": CANARY}]}, "invalid_messages"),
    "no messages": ({"prompt": [], "response": CANARY}, "invalid_messages"),
    "token ids beyond the vocabulary": ({"input_ids": [10**12]}, "invalid_token_ids"),
    "negative token ids": ({"input_ids": [-1]}, "invalid_token_ids"),
    "nothing at all": ({"text": ""}, "empty_input"),
    "another model's template": ({"text": f"<start_of_turn>user\n{CANARY}"}, "foreign_special_tokens"),
}


@pytest.mark.parametrize("name", BAD_ITEMS)
def test_a_bad_item_is_null_beside_its_scored_neighbours_and_a_422_alone(http, good_score, name):
    item, code = BAD_ITEMS[name]
    among = http.post("/score", content=json.dumps({"items": [GOOD, item, GOOD]}))
    assert among.status_code == 200 and among.json()["scores"] == [good_score, None, good_score]
    error = among.json()["results"][1]["error"]
    assert error["code"] == code and error["retryable"] is False
    alone = http.post("/score", content=json.dumps({"items": [item]}))
    assert (alone.status_code, alone.json()["error"]["code"]) == (422, code)
    assert CANARY not in among.text + alone.text


FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"


@pytest.mark.parametrize("response", ["", "a\x00b", "\x00", "\u202eright to left", FAMILY, "\ufeff", " \n\t "])
def test_odd_text_is_text(http, good_score, response):
    answer = http.post("/score", content=json.dumps({"items": [GOOD, {"prompt": "p", "response": response}]})).json()
    assert answer["scores"][0] == good_score and isinstance(answer["scores"][1], float)


BAD_BODIES = {
    "broken JSON": (b'{"prompt": "p", "response"', 400, "invalid_json"),
    "no body": (b"", 400, "invalid_json"),
    "NaN in JSON": (b'{"prompt": "p", "response": "r", "deadline_ms": NaN}', 400, "invalid_json"),
    "a number beyond floats": (b'{"prompt": "p", "response": "r", "deadline_ms": 1e999}', 422, "invalid_request"),
    "deep JSON": (b'{"items": ' + b"[" * 200_000, 400, "invalid_json"),
    "deep JSON behind a surrogate": (b'{"text": "\\ud800", "items": ' + b'{"a":' * 200_000, 400, "invalid_json"),
    "invalid UTF-8": (b'{"prompt": "\xff", "response": "r"}', 400, "invalid_json"),
    "UTF-16": ('{"prompt": "p", "response": "r"}'.encode("utf-16"), 400, "invalid_json"),
    "unknown field": (json.dumps({**GOOD, CANARY: 1}).encode(), 422, "unknown_field"),
    "unknown field in an item": (json.dumps({"items": [GOOD, {**GOOD, CANARY: 1}]}).encode(), 422, "unknown_field"),
    "two shapes at once": (json.dumps({**GOOD, "text": CANARY}).encode(), 422, "invalid_shape"),
    "a list": (json.dumps([GOOD]).encode(), 422, "invalid_shape"),
    "unknown model": (json.dumps({**GOOD, "model": CANARY}).encode(), 404, "unknown_model"),
    "unknown option": (json.dumps({**GOOD, "overlong": CANARY}).encode(), 422, "invalid_request"),
    "4,097 items": (json.dumps({"items": [GOOD] * 4097}).encode(), 413, "too_many_items"),
    "4,097 responses": (json.dumps({"prompt": "p", "responses": [""] * 4097}).encode(), 413, "too_many_items"),
    "three million items": (b'{"items": [' + b"{}," * 3_000_000 + b"{}]}", 413, "too_many_items"),
    "more than 64 MiB": (b'{"prompt": "' + b"a" * (64 * 1024 * 1024), 413, "body_too_large"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_envelope_is_a_4xx_that_repeats_nothing(http, name):
    body, status, code = BAD_BODIES[name]
    answer = http.post("/score", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    error = answer.json()["error"]
    assert error["retryable"] is False and error["request_id"] == answer.headers["x-request-id"]
    assert CANARY not in answer.text


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "nonsense", None])
def test_the_content_type_does_not_matter(http, good_score, content_type):
    headers = {} if content_type is None else {"content-type": content_type}
    assert http.post("/score", content=json.dumps(GOOD).encode(), headers=headers).json()["score"] == good_score


def test_url_options_that_are_not_known_are_refused(http):
    for query in ("overlng=error", "priority=urgent", "deadline_ms=nan", "deadline_ms=-1", f"{CANARY}={CANARY}"):
        answer = http.post(f"/score?{query}", content=json.dumps(GOOD))
        assert answer.status_code == 422 and CANARY not in answer.text


def test_no_prompt_reaches_the_log(http, server):
    secret = "quetzal-90125"
    http.post("/score", content=json.dumps({"prompt": secret, "response": f"{secret}\ud800"}))
    http.post(f"/score?{secret}=1", content=json.dumps({secret: 1}))
    http.get(f"/{secret}")
    http.post("/m/" + secret + "/score", content=json.dumps(GOOD))
    log = server.log.read_text()
    assert secret not in log and CANARY not in log
    assert all(json.loads(line)["level"] for line in log.splitlines() if '"plaudit.access"' in line)
