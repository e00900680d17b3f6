"""The native routes of a running server, against the model loaded beside it."""

import json
import math
import socket
import threading

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import TypeAdapter

from plaudit_model.items import encode_item, flatten
from plaudit_model.reward_model import RewardModel
from plaudit_server import openapi, schema_answers
from plaudit_server.app import published_routes

PROMPT = "Human: what is the best way to learn?"
RESPONSES = ["practise daily", "read", "", "speak\x00up", "\u2603 \U0001f600"]
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
MEAN, STD, TEMPERATURE = 0.25, 0.5, 2.0  # what `calibrated_dir` wrote into the contract


@pytest.fixture(scope="module")
def scores_of(calibrated_dir):
    """Scores of items as the model gives them without a server, each item alone."""
    model = RewardModel.load(calibrated_dir)

    def scores(*items):
        flat = [one for item in items for one in flatten(item)]
        return [float(model.score_encoded([encode_item(model.encoder, one)])[0, 0]) for one in flat]

    return scores


def post(http, path, body, **headers):
    answer = http.post(path, content=json.dumps(body), headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def valid(kind, answer):
    TypeAdapter(kind).validate_python(answer)
    return answer


def test_scores_are_the_models_own_to_the_bit_in_every_shape(http, scores_of):
    items = [
        {"prompt": PROMPT, "response": RESPONSES[0]},
        {"prompt": MESSAGES, "responses": RESPONSES},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "hello"}]},
        {"text": "Human: hi\n\nAssistant: hello"},
        {"input_ids": [5, 9, 300, 7], "prompt_tokens": 2},
    ]
    answer = valid(schema_answers.ScoreAnswer, post(http, "/score", {"items": items}))
    assert answer["scores"] == scores_of(*items)
    assert [r["score"] for r in answer["results"]] == answer["scores"]
    assert [(r["index"], r["item_index"], r["response_index"]) for r in answer["results"]] == [
        (0, 0, None), *((1 + n, 1, n) for n in range(5)), (6, 2, None), (7, 3, None), (8, 4, None),
    ]  # fmt: skip
    assert answer["transform"] == "none" and "score" not in answer
    usage = answer["usage"]
    assert usage["total_tokens"] == sum(r["tokens"] for r in answer["results"]) > usage["prompt_tokens"] > 0
    assert usage["shared_tokens"] > 0


def test_one_response_has_its_score_at_the_top(http, scores_of):
    item = {"prompt": PROMPT, "response": "a response of its own"}
    answer = valid(schema_answers.ScoreAnswer, post(http, "/score", item))
    assert [answer["score"]] == answer["scores"] == scores_of(item)
    assert answer["results"][0]["cached"] is False
    again = post(http, "/score", item)
    assert again["score"] == answer["score"] and again["results"][0]["cached"] is True
    assert again["usage"]["cached_tokens"] == again["usage"]["total_tokens"]


def test_identity_is_in_every_answer_and_in_info(http):
    answer, info = post(http, "/score", {"items": []}), http.get("/info").json()
    assert answer["scores"] == answer["results"] == []
    for key in ("model", "revision", "numerics"):
        assert answer[key] == info[key] == info["models"][0][key]
    assert answer["model"] == "calibrated" and "float32-exact" in answer["numerics"]
    assert info["limits"]["max_items"] == 4096 and info["limits"]["max_body_bytes"] == 64 * 1024 * 1024
    assert info["contract"]["statistics"] == {"mean": MEAN, "std": STD, "n": 100}


def test_a_request_id_is_in_body_and_header(http):
    answer = http.post("/score", content=b'{"items": []}', headers={"x-request-id": "run-1.step-2"})
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "run-1.step-2"


def test_transforms_are_named_and_computed_from_the_contract(http, scores_of):
    item = {"prompt": PROMPT, "responses": RESPONSES[:3]}
    raw = np.array(scores_of(item))
    normal = post(http, "/score", {**item, "transform": "normalized"})
    assert normal["transform"] == "normalized"
    np.testing.assert_allclose(normal["scores"], (raw - MEAN) / STD, rtol=1e-12)
    likely = post(http, "/score", {**item, "transform": "probability", "include": ["attributes"]})
    np.testing.assert_allclose(likely["scores"], 1 / (1 + np.exp(-(raw - MEAN) / TEMPERATURE)), rtol=1e-12)
    assert [r["attributes"] for r in likely["results"]] == [{"score": score} for score in raw]


def test_what_is_included_only_when_asked_for(http):
    body = {"prompt": PROMPT, "response": "included?"}
    assert not {"attributes", "timing", "error"} & set(post(http, "/score", body)["results"][0])
    answer = valid(schema_answers.ScoreAnswer, post(http, "/score", {**body, "include": ["attributes", "timing"]}))
    assert set(answer["results"][0]) >= {"attributes", "timing"}


def test_cutting_a_prompt_is_reported_and_a_default_is_an_error(http):
    body = {"prompt": "word " * 2_000, "response": "the end"}
    refused = http.post("/score", content=json.dumps(body))
    assert refused.status_code == 422 and refused.json()["error"]["code"] == "too_long"
    limit = http.get("/info").json()["max_length"]
    for answer in (post(http, "/score", {**body, "overlong": "truncate_prompt"}),
                   post(http, "/score?overlong=truncate_prompt", body)):  # fmt: skip
        (result,) = answer["results"]
        assert result["tokens"] == limit
        assert result["truncated"]["side"] == "prompt" and result["truncated"]["tokens"] > 0
    assert post(http, "/score?overlong=error", {**body, "overlong": "truncate_left"})["results"][0]["truncated"]


def test_ndjson_brings_every_result_and_ends_with_the_account(http, scores_of):
    items = [{"prompt": PROMPT, "responses": RESPONSES}, {"prompt": "p", "response": "\ud800"}]
    answer = http.post("/score", content=json.dumps({"items": items}), headers={"accept": "application/x-ndjson"})
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/x-ndjson"
    *lines, last = [json.loads(line) for line in answer.text.splitlines()]
    for line in lines:
        valid(schema_answers.ItemResult, line)
    valid(schema_answers.Head, last)
    by_index = {line["index"]: line for line in lines}
    assert sorted(by_index) == list(range(6))
    assert [by_index[i]["score"] for i in range(5)] == scores_of(items[0])
    assert by_index[5]["error"]["code"] == "invalid_unicode"
    assert last["usage"]["total_tokens"] == sum(by_index[i]["tokens"] for i in range(5))


def test_a_refused_stream_is_an_error_with_its_own_status(http):
    answer = http.post("/score", content=b'{"items": [], "model": "other"}', headers={"accept": "application/x-ndjson"})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "unknown_model"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"prompt": PROMPT, "response": "\ud800"}, 422, "invalid_unicode"),
        ({"prompt": PROMPT, "response": "nan"}, 422, "non_finite_score"),
        ({"prompt": PROMPT, "responses": ["late", "too late"], "deadline_ms": 0.001}, 504, "deadline_exceeded"),
    ],
)
def test_a_stream_that_fails_as_a_whole_has_the_status_of_the_plain_answer(http, fault_text, body, status, code):
    body = body | {"response": fault_text["nan"]} if body.get("response") == "nan" else body
    for accept in ("application/json", "application/x-ndjson"):
        answer = http.post("/score", content=json.dumps(body), headers={"accept": accept})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert answer.headers["content-type"] == "application/json"


def test_a_stream_without_a_score_still_brings_every_error(http):
    body = {"prompt": PROMPT, "responses": ["\ud800", "\ud801"]}
    answer = http.post("/score", content=json.dumps(body), headers={"accept": "application/x-ndjson"})
    *lines, last = [json.loads(line) for line in answer.text.splitlines()]
    assert answer.status_code == 200 and [line["error"]["code"] for line in lines] == ["invalid_unicode"] * 2
    assert valid(schema_answers.Head, last)["usage"]["total_tokens"] == 0


def test_rank_sorts_keeps_ties_in_order_and_sets_failures_apart(http, scores_of):
    responses = ["b", "a", "b", "\ud800", "c"]
    answer = valid(schema_answers.RankAnswer, post(http, "/rank", {"prompt": PROMPT, "responses": responses}))
    scores = scores_of({"prompt": PROMPT, "responses": ["b", "a", "b", "c"]})
    by_index = dict(zip([0, 1, 2, 4], scores, strict=True))
    expected = sorted(by_index, key=lambda index: -by_index[index])
    assert [r["index"] for r in answer["results"]] == expected
    assert answer["best"] == expected[0] and [r["index"] for r in answer["failed"]] == [3]
    assert expected.index(0) + 1 == expected.index(2)
    top = post(http, "/rank", {"prompt": PROMPT, "responses": responses, "top_n": 2})
    assert [r["index"] for r in top["results"]] == expected[:2] and top["best"] == expected[0]
    assert post(http, "/rank", {"prompt": PROMPT, "responses": []})["best"] is None


def test_compare_is_the_sigmoid_of_the_margin_over_the_temperature(http, scores_of):
    body = {"prompt": PROMPT, "response_a": "read", "response_b": ""}
    a, b = scores_of({"prompt": PROMPT, "responses": ["read", ""]})
    answer = valid(schema_answers.CompareAnswer, post(http, "/compare", body))
    assert answer["margin"] == a - b and answer["scores"] == [a, b]
    assert answer["probability"] == pytest.approx(1 / (1 + math.exp(-(a - b) / TEMPERATURE)), rel=1e-12)
    mirrored = post(http, "/compare", {"prompt": PROMPT, "response_a": "", "response_b": "read"})
    assert mirrored["probability"] == pytest.approx(1 - answer["probability"], rel=1e-12)
    broken = http.post("/compare", content=json.dumps({**body, "response_b": "\ud800"}))
    error = broken.json()["error"]
    assert (broken.status_code, error["code"], error["param"]) == (422, "invalid_unicode", "response_b")


def test_a_deadline_that_has_passed_is_a_504_for_all_of_the_request(http):
    responses = [f"late {n}" for n in range(4)]
    answer = http.post("/score?deadline_ms=0.001", content=json.dumps({"prompt": PROMPT, "responses": responses}))
    assert answer.status_code == 504 and answer.headers["retry-after"]
    assert answer.json()["error"] | {"message": "", "request_id": "", "retry_after_ms": 0} == {
        "code": "deadline_exceeded", "message": "", "type": "timeout_error", "param": None, "retryable": True,
        "retry_after_ms": 0, "request_id": "",
    }  # fmt: skip


def test_what_the_engine_cannot_score_is_an_error_beside_scores(http, fault_text, scores_of):
    """NaN, a forward that raises, and an item that kills the worker: neighbours keep their exact scores."""
    responses = ["fine", fault_text["nan"], fault_text["raise"], fault_text["exit"], "fine too"]
    answer = valid(schema_answers.ScoreAnswer, post(http, "/score", {"prompt": PROMPT, "responses": responses}))
    good = scores_of({"prompt": PROMPT, "responses": ["fine", "fine too"]})
    assert answer["scores"] == [good[0], None, None, None, good[1]]
    codes = [result.get("error", {}).get("code") for result in answer["results"]]
    assert codes == [None, "non_finite_score", "scoring_failed", "worker_crashed", None]
    alone = http.post("/score", content=json.dumps({"prompt": PROMPT, "response": fault_text["nan"]}))
    assert alone.status_code == 422 and alone.json()["error"]["code"] == "non_finite_score"


def test_single_requests_at_once_are_batched_and_each_gets_its_own_score(http, server, scores_of):
    items = [{"prompt": PROMPT, "response": f"storm {n}"} for n in range(24)]
    found = {}

    def one(index):
        found[index] = post(http, "/score", items[index])["score"]

    before = batches(http)
    threads = [threading.Thread(target=one, args=(n,)) for n in range(24)]
    with server.standing_still():
        for thread in threads:
            thread.start()
        while metric(http, "plaudit_queue_items", model="calibrated") < 24:
            pass
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(24)] == scores_of(*items)
    assert batches(http) - before <= 3, "what came first, what was sent ahead, and all others"


def batches(http):
    return metric(http, "plaudit_batch_items_count", model="calibrated")


def metric(http, name, **labels):
    families = text_string_to_metric_families(http.get("/metrics").text)
    found = [s.value for f in families for s in f.samples if s.name == name and s.labels == labels]
    assert len(found) == 1, name
    return found[0]


def test_metrics_follow_what_is_answered(http):
    before = {name: metric(http, name, model="calibrated") for name in ("plaudit_items_total", "plaudit_score_count")}
    post(http, "/score", {"prompt": "metrics", "responses": ["one", "\ud800"]})
    assert metric(http, "plaudit_items_total", model="calibrated") == before["plaudit_items_total"] + 2
    assert metric(http, "plaudit_score_count", model="calibrated") == before["plaudit_score_count"] + 1
    assert metric(http, "plaudit_requests_total", route="/score", status="200") > 0
    assert metric(http, "plaudit_item_errors_total", model="calibrated", code="invalid_unicode") > 0


def test_nothing_was_compiled_after_the_server_was_ready(http):
    """Without a GPU nothing ever is; that it would be counted is seen in test_worker and test_engine."""
    post(http, "/score", {"prompt": PROMPT, "responses": RESPONSES})
    assert metric(http, "plaudit_late_jit_total", model="calibrated") == 0
    assert list(http.get("/info").json()["ready_s"]) == ["imports", "load", "proof", "warm_up"]


def test_probes_models_and_unknown_routes(http):
    for path in ("/livez", "/readyz", "/health", "/m/calibrated/readyz"):
        assert http.get(path).status_code == http.head(path).status_code == 200
    assert http.get("/readyz").json() == {"status": "ready", "models": {"calibrated": "ready"}}
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["calibrated"]
    for path in ("/m/typo/readyz", "/m/typo/health", "/m/typo/v1/models"):
        assert (http.get(path).status_code, http.get(path).json()["error"]["code"]) == (404, "unknown_model")
    for method, path, status in (("GET", "/nope", 404), ("GET", "/score", 405), ("DELETE", "/livez", 405),
                                 ("GET", "/docs", 404), ("POST", "/score/", 404)):  # fmt: skip
        answer = http.request(method, path)
        assert answer.status_code == status
        valid(schema_answers.ErrorAnswer, answer.json())


def test_the_model_may_be_named_in_path_or_body_with_its_revision(http):
    revision = http.get("/info").json()["revision"]
    body = {"prompt": PROMPT, "response": "read"}
    expected = post(http, "/score", body)["score"]
    for path in ("/m/calibrated/score", f"/m/calibrated@{revision}/score"):
        assert post(http, path, body)["score"] == expected
    assert post(http, "/score", {**body, "model": f"calibrated@{revision}"})["score"] == expected
    assert http.get("/m/calibrated/info").json()["model"] == "calibrated"
    for path, sent in (("/m/other/score", body), ("/m/calibrated@old/score", body), ("/m/other/info", None),
                       ("/score", {**body, "model": "\ud800"})):  # fmt: skip
        answer = http.post(path, content=json.dumps(sent)) if sent else http.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_model")


def test_the_page_needs_nothing_from_elsewhere(http):
    page = http.get("/")
    assert page.headers["content-type"].startswith("text/html") and "default-src 'self'" in page.headers[
        "content-security-policy"]  # fmt: skip
    assert "http://" not in page.text and "https://" not in page.text and " src=" not in page.text
    assert len(page.text.splitlines()) < 150


def test_the_live_schema_is_the_published_one(http):
    assert http.get("/openapi.json").json() == openapi.document(published_routes())


def test_a_client_that_hangs_up_in_mid_request_leaves_no_trace(http, server):
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": PROMPT, "responses": [f"gone {n} " + "word " * 80 for n in range(200)]}).encode()
    head = f"POST /score HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + body)
    while metric(http, "plaudit_queue_items", model="calibrated") or metric(http, "plaudit_requests_open") > 1:
        pass
    assert http.get("/readyz").status_code == 200
