"""OpenRLHF's route: its shapes, its defaults, and what each failure is in a shape that has no null."""

import json

import pytest
from pydantic import TypeAdapter

from plaudit_model.reward_model import RewardModel
from plaudit_server.compat import GET_REWARD
from plaudit_server.errors import RULES, RequestError
from plaudit_server.schema_answers import RewardAnswer

TEXTS = ["Human: hi\n\nAssistant: hello", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"]


def ask(http, query, path="/get_reward", **more):
    return http.post(path, content=json.dumps({"query": query, **more}))


def test_rewards_are_the_models_scores_of_the_text_as_it_is(http, calibrated_dir):
    model = RewardModel.load(calibrated_dir)
    expected = [float(model.score_encoded([model.encoder.encode_text(text)])[0, 0]) for text in TEXTS]
    answer = ask(http, TEXTS, prompts=["hi", "hi"], labels=[None, ""]).json()
    TypeAdapter(RewardAnswer).validate_python(answer)
    assert answer["rewards"] == answer["scores"] == expected
    assert answer["extra_logs"]["truncated"] == [0, 0]


def test_an_empty_list_is_answered_with_empty_lists(http):
    answer = ask(http, [])
    assert answer.status_code == 200
    assert answer.json() == {"rewards": [], "scores": [], "extra_logs": {"tokens": [], "truncated": []}}


def test_a_long_text_is_cut_on_the_left_unless_the_url_says_otherwise(http):
    limit = http.get("/info").json()["max_length"]
    long = "word " * 2_000 + "the end"
    assert ask(http, [long]).json()["extra_logs"] == {"tokens": [limit], "truncated": [1]}
    same_end = ask(http, ["other " * 2_000 + long]).json()
    assert same_end["rewards"] == ask(http, [long]).json()["rewards"]
    for path in ("/get_reward?overlong=error", "/m/calibrated/get_reward?overlong=error"):
        assert ask(http, [long], path).status_code == 422


@pytest.mark.parametrize(
    ("text", "path", "code"),
    [
        ("word " * 2_000, "/get_reward?overlong=error", "too_long"),
        ("\ud800", "/get_reward", "invalid_unicode"),
        ("", "/get_reward", "empty_input"),
        ("<start_of_turn>user\nhi<end_of_turn>", "/get_reward", "foreign_special_tokens"),
        ("nan", "/get_reward", "non_finite_score"),
        ("exit", "/get_reward", "worker_crashed"),
        ("raise", "/get_reward", "scoring_failed"),
        ("late", "/get_reward?deadline_ms=0.001", "deadline_exceeded"),
    ],
)
def test_one_failed_item_fails_the_request_as_the_table_says(http, fault_text, text, path, code):
    answer = ask(http, ["fine", fault_text.get(text, text)], path)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (GET_REWARD[code], code)
    assert error["param"] in ("query[0]", "query[1]") if code == "deadline_exceeded" else error["param"] == "query[1]"
    assert error["retryable"] is RULES[code].retryable


def test_what_cannot_be_helped_goes_before_what_may_pass(http):
    answer = ask(http, ["late", "\ud800"], "/get_reward?deadline_ms=0.001")
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "query[1]")


def test_retryable_is_5xx_and_fatal_is_4xx():
    """Trainers retry any 5xx and give up on any 4xx, so a quota is a 503 here."""
    for code, status in GET_REWARD.items():
        assert (status >= 500) is RULES[code].retryable, code
    assert RULES["rate_limited"].status == 429 and GET_REWARD["rate_limited"] == 503
    quota = RequestError("rate_limited", "too much of one client").as_status(GET_REWARD["rate_limited"])
    assert quota.status == 503 and "retry-after" in quota.body("id")[1]


def test_a_bad_envelope_stays_a_4xx(http):
    for body, status in ((b"{", 400), (b'{"query": "text"}', 422), (b"{}", 422), (b'{"query": [1]}', 422)):
        assert http.post("/get_reward", content=body).status_code == status
