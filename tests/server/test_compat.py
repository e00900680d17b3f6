"""Routes in trainers' shapes: their requests as recorded, their defaults, and what each failure is in a shape that has
no null."""

import dataclasses
import json
import shutil
from pathlib import Path

import httpx2
import pytest
from pydantic import TypeAdapter

from plaudit_model import contract
from plaudit_model.reward_model import RewardModel
from plaudit_server.compat import OVERLONG
from plaudit_server.errors import RULES
from plaudit_server.schema_answers import (
    ClassificationAnswer,
    EmbeddingsAnswer,
    EvaluationAnswer,
    PoolingAnswer,
    RerankAnswer,
    RewardAnswer,
)

TEXTS = ["Human: hi\n\nAssistant: hello", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"]

REQUESTS = {
    # openrlhf/utils/agent.py 0.11.2
    "/get_reward": lambda texts: {"query": texts, "prompts": ["hi"] * len(texts), "labels": [None] * len(texts)},
    # src/llamafactory/train/ppo/ppo_utils.py::get_rewards_from_server
    "/v1/score/evaluation": lambda texts: {"model": "model", "messages": texts},
    # verl/experimental/reward_loop/reward_loop.py 0.9.1, engine vllm: one text, the model by its path
    "/classify": lambda texts: {"model": "/models/calibrated", "input": texts, "use_activation": False},
    # vllm/entrypoints/pooling/pooling/protocol.py, as xtuner's RewardModelClient posts it
    "/pooling": lambda texts: {"model": "calibrated", "input": texts},
    # verl, engine sglang
    "/v1/embeddings": lambda texts: {"model": "Org/calibrated", "input": texts},
}
SCORES = {
    "/get_reward": lambda answer: answer["rewards"],
    "/v1/score/evaluation": lambda answer: answer["scores"],
    "/classify": lambda answer: [entry["probs"][-1] for entry in answer["data"]],
    "/pooling": lambda answer: [entry["data"][-1] for entry in answer["data"]],
    "/v1/embeddings": lambda answer: [entry["embedding"][-1] for entry in answer["data"]],
}
ANSWERS = {
    "/get_reward": RewardAnswer,
    "/v1/score/evaluation": EvaluationAnswer,
    "/classify": ClassificationAnswer,
    "/pooling": PoolingAnswer,
    "/v1/embeddings": EmbeddingsAnswer,
}
FIELDS = dict.fromkeys(REQUESTS, "input") | {"/get_reward": "query", "/v1/score/evaluation": "messages"}


@pytest.fixture(params=REQUESTS)
def route(request):
    return request.param


def ask(http, route, texts, query=""):
    return http.post(route + query, content=json.dumps(REQUESTS[route](texts)))


def test_scores_are_the_models_of_the_text_as_it_is(http, calibrated_dir, route):
    model = RewardModel.load(calibrated_dir)
    expected = [float(model.score_encoded([model.encoder.encode_text(text)])[0, 0]) for text in TEXTS]
    answer = ask(http, route, TEXTS).json()
    TypeAdapter(ANSWERS[route]).validate_python(answer)
    assert SCORES[route](answer) == expected


def test_openrlhf_is_told_tokens_and_cuts(http):
    answer = ask(http, "/get_reward", TEXTS).json()
    assert answer["scores"] == answer["rewards"] and answer["extra_logs"]["truncated"] == [0, 0]


def test_verl_sends_one_text_and_reads_the_last_number(http):
    texts = REQUESTS["/classify"](TEXTS[1])
    classified = http.post("/classify", json=texts).json()
    embedded = http.post("/v1/embeddings", json=REQUESTS["/v1/embeddings"](TEXTS[1])).json()
    assert classified["data"][-1]["probs"][-1] == embedded["data"][-1]["embedding"][-1]
    assert classified["data"] == [{**classified["data"][0], "index": 0, "num_classes": 1}]
    assert classified["usage"] == embedded["usage"] and classified["usage"]["total_tokens"] > 0


def test_the_bos_that_verl_takes_away_is_there_again_and_once(serve, calibrated_dir, tmp_path):
    """`_preprocess_reward_inputs` strips it, because vLLM puts one there; without it the score is another."""
    directory = Path(shutil.copytree(calibrated_dir, tmp_path / "opened"))
    known = contract.read(directory)
    template = contract.Template.of("chat", "{{ bos_token }}" + known.template.source)
    files = {name: entry for name, entry in known.files.items() if name != "tokenizer_config.json"}
    contract.write(dataclasses.replace(known, template=template, files=files), directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "[CLS]"}))
    stripped, pair = TEXTS[1].removesuffix("\n"), {"prompt": "hi", "response": "hello"}
    with httpx2.Client(base_url=serve(directory).url, timeout=60) as client:
        native = client.post("/score", json=pair).json()["score"]
        for text in (stripped + "\n", "[CLS]" + stripped + "\n"):
            for route in ("/classify", "/pooling", "/v1/embeddings"):
                body = {**REQUESTS[route](text), "model": "opened"}
                assert SCORES[route](client.post(route, json=body).json()) == [native]
            assert client.post("/classify", json={"text": text}).json()["embedding"] == [native]
        whole = {"use_activation": False, "add_special_tokens": False}
        for text, same in ((stripped + "\n", False), ("[CLS]" + stripped + "\n", True)):
            as_it_is = SCORES["/classify"](client.post("/classify", json={"input": text, **whole}).json())
            assert (as_it_is == [native]) is same
        assert ask(client, "/get_reward", [stripped + "\n"]).json()["rewards"] != [native], "text as it is"


def test_sglang_takes_a_text_or_a_list_and_wraps_nothing(http):
    """`/classify` of sglang's `http_server.py`, as its documentation and Skywork's model cards call it."""
    expected = SCORES["/classify"](ask(http, "/classify", TEXTS).json())
    answer = http.post("/classify", json={"model": "Org/calibrated", "text": TEXTS}).json()
    TypeAdapter(ClassificationAnswer).validate_python(answer)
    assert [each["embedding"][0] for each in answer] == expected
    one = http.post("/classify", json={"text": TEXTS[1], "rid": "mine"}).json()
    TypeAdapter(ClassificationAnswer).validate_python(one)
    assert one == {"embedding": [expected[1]], "meta_info": {**answer[1]["meta_info"], "id": "mine"}}
    assert (
        http.post("/classify", json={"text": []}).json() == http.post("/classify", json={"input_ids": []}).json() == []
    )


def test_sglang_takes_ids(http, calibrated_dir):
    encoder = RewardModel.load(calibrated_dir).encoder
    ids = [encoder.encode_text(text).ids.tolist() for text in TEXTS]
    expected = SCORES["/classify"](ask(http, "/classify", TEXTS).json())
    answer = http.post("/classify", json={"input_ids": ids}).json()
    assert [each["embedding"][0] for each in answer] == expected
    assert http.post("/classify", json={"input_ids": ids[0]}).json()["embedding"] == expected[:1]
    refused = http.post("/classify", json={"input_ids": [ids[0], [10**9]]}).json()["error"]
    assert (refused["code"], refused["param"]) == ("invalid_token_ids", "input_ids[1]")


def test_vllm_takes_a_conversation(http):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    native = http.post("/score", json={"messages": turns}).json()["scores"]
    body = {"model": "calibrated", "messages": turns, "use_activation": False}
    assert SCORES["/classify"](http.post("/classify", json=body).json()) == native
    del body["use_activation"]
    assert SCORES["/pooling"](http.post("/pooling", json=body).json()) == native
    assert http.post("/classify", json=body).json()["error"]["param"] == "use_activation"
    failed = http.post("/pooling", json={"messages": turns[:1]}).json()["error"]
    assert (failed["code"], failed["param"]) == ("invalid_messages", "messages[0]")


def test_vllms_older_names_of_the_activation_are_known(http):
    """verl and scripts of a year before: `activation`, and `softmax` before that."""
    expected = SCORES["/classify"](ask(http, "/classify", TEXTS).json())
    for name in ("activation", "softmax"):
        body = {"input": TEXTS, name: False}
        assert SCORES["/classify"](http.post("/classify", json=body).json()) == expected
        for route in ("/classify", "/pooling"):
            answer = http.post(route, json={**body, name: True})
            assert (answer.status_code, answer.json()["error"]["param"]) == (422, "use_activation")
    assert http.post("/classify", json={**body, "use_activation": False}).status_code == 422, "said twice"


def test_an_id_that_stands_in_every_answer_is_short_text(http):
    for rid in ("x" * 257, "\ud800", ["x"], 5, None):
        answer = http.post("/classify", content=json.dumps({"text": TEXTS, "rid": rid}))
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "rid")
    found = http.post("/classify", json={"text": TEXTS, "rid": "\N{SNOWMAN}" * 256}).json()
    assert [one["meta_info"]["id"] for one in found] == ["\N{SNOWMAN}" * 256] * 2


def test_rerank_takes_what_clients_of_vllm_and_infinity_say_beside_it(http):
    """LiteLLM asks for the documents always (`litellm/rerank_api`); infinity gives raw scores only if asked."""
    body = {"query": "hi", "documents": ["hello", "go away"]}
    plain = http.post("/rerank", json=body).json()["results"]
    for more in ({"return_documents": True}, {"return_documents": False}, {"raw_scores": True}):
        assert http.post("/rerank", json=body | more).json()["results"] == plain
    answer = http.post("/rerank", json=body | {"raw_scores": False})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "raw_scores")


@pytest.mark.parametrize("route", ["/rerank", "/v1/rerank", "/m/calibrated/v2/rerank"])
def test_rerank_is_best_of_n_in_others_words(http, route):
    body = {"query": "hi", "documents": ["hello", "go away", "hello", "hi there"]}
    answer = http.post(route, json={"model": "Org/calibrated", **body}).json()
    TypeAdapter(RerankAnswer).validate_python(answer)
    native = http.post("/rank", json={"prompt": "hi", "responses": body["documents"]}).json()["results"]
    assert [(r["index"], r["relevance_score"]) for r in answer["results"]] == [(r["index"], r["score"]) for r in native]
    assert all(r["document"]["text"] == body["documents"][r["index"]] for r in answer["results"])
    for top_n, size in ((1, 1), (0, 4), (9, 4)):
        assert http.post(route, json={**body, "top_n": top_n}).json()["results"] == answer["results"][:size]
    assert http.post(route, json={**body, "documents": []}).json()["results"] == []
    failed = http.post(route, json={**body, "documents": ["fine", "word " * 2_000]}).json()["error"]
    assert (failed["code"], failed["param"]) == ("too_long", "documents[1]")


def test_a_score_is_never_passed_off_as_a_probability(http):
    for body in ({"input": "x"}, {"input": "x", "use_activation": True}):
        answer = http.post("/classify", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "use_activation")


def test_llama_factory_may_not_shorten_the_model(http):
    body = {"model": "model", "messages": ["x"], "max_length": None}
    assert http.post("/v1/score/evaluation", json=body).status_code == 200
    answer = http.post("/v1/score/evaluation", json=body | {"max_length": 8})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "max_length")


def test_the_model_is_the_one_that_is_named(http):
    for path, body in (("/classify", {"use_activation": False}), ("/v1/embeddings", {})):
        assert http.post(path, json={"model": "Org/other", "input": "x", **body}).status_code == 404
        assert http.post("/m/calibrated" + path, json={"input": "x", **body}).status_code == 200
    assert http.post("/m/calibrated/v1/score/evaluation", json={"model": "model", "messages": ["x"]}).status_code == 200


def test_slime_sends_a_label_beside_a_pair(http):
    """`slime/rollout/rm_hub/__init__.py::remote_rm`, with `--reward-key score`."""
    for prompt in ("hi", [{"role": "user", "content": "hi"}]):
        pair = {"prompt": prompt, "response": "hello"}
        for label in ("4", None):
            answer = http.post("/score?priority=batch", json={**pair, "label": label}).json()
            assert answer["score"] == http.post("/score", json=pair).json()["score"]


def test_an_empty_list_is_answered_with_empty_lists(http, route):
    answer = ask(http, route, [])
    assert answer.status_code == 200 and SCORES[route](answer.json()) == []
    if route == "/get_reward":
        assert answer.json() == {"rewards": [], "scores": [], "extra_logs": {"tokens": [], "truncated": []}}


def test_a_long_text_is_cut_on_the_left_or_refused_as_the_route_does_unless_the_url_says_otherwise(http, route):
    long = "word " * 2_000 + "the end"
    assert http.get("/info").json()["overlong"][route] == OVERLONG[route]
    plain, cut = ask(http, route, [long]), ask(http, route, [long], "?overlong=truncate_left")
    assert plain.status_code == (200 if OVERLONG[route] == "truncate_left" else 422)
    same_end = ask(http, route, ["other " * 2_000 + long], "?overlong=truncate_left")
    assert SCORES[route](same_end.json()) == SCORES[route](cut.json())
    assert http.post(f"/m/calibrated{route}?overlong=error", json=REQUESTS[route]([long])).status_code == 422


def test_a_cut_text_is_reported_to_openrlhf(http):
    limit = http.get("/info").json()["max_length"]
    assert ask(http, "/get_reward", ["word " * 2_000]).json()["extra_logs"] == {"tokens": [limit], "truncated": [1]}


@pytest.mark.parametrize(
    ("text", "query", "code"),
    [
        ("word " * 2_000, "?overlong=error", "too_long"),
        ("\ud800", "", "invalid_unicode"),
        ("", "", "empty_input"),
        ("<start_of_turn>user\nhi<end_of_turn>", "", "foreign_special_tokens"),
        ("nan", "", "non_finite_score"),
        ("exit", "", "worker_crashed"),
        ("raise", "", "scoring_failed"),
        ("late", "?deadline_ms=0.001", "deadline_exceeded"),
    ],
)
def test_one_failed_item_fails_the_request_as_the_table_says(http, fault_text, route, text, query, code):
    answer = ask(http, route, ["fine", fault_text.get(text, text)], query)
    assert answer.json().keys() == {"error"}
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (504 if code == "deadline_exceeded" else 422, code)
    places = [f"{FIELDS[route]}[{place}]" for place in (0, 1)]
    assert error["param"] in places if code == "deadline_exceeded" else error["param"] == places[1]
    assert error["retryable"] is RULES[code].retryable


def test_what_cannot_be_helped_goes_before_what_may_pass(http, route):
    answer = ask(http, route, ["late", "\ud800"], "?deadline_ms=0.001")
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, f"{FIELDS[route]}[1]")


def test_retryable_is_5xx_and_fatal_is_4xx():
    """Trainers retry any 5xx and give up on any 4xx. A quota, a 429, is told of nowhere yet, nor is a failed start."""
    for code in RULES.keys() - {"rate_limited", "worker_failed", "internal_error", "body_timeout"}:
        assert (RULES[code].status >= 500) is RULES[code].retryable, code


def test_a_bad_envelope_stays_a_4xx(http, route):
    field = FIELDS[route]
    bodies = [b"{", b"{}", json.dumps({field: 3}).encode(), json.dumps({field: [1]}).encode()]
    for body, status in zip(bodies, (400, 422, 422, 422), strict=True):
        answer = http.post(route, content=body)
        assert answer.status_code == status and answer.json()["error"]["retryable"] is False
    if route != "/get_reward":  # whose forks send more than it reads
        assert http.post(route, json={**REQUESTS[route](["x"]), "typo": 1}).json()["error"]["code"] == "unknown_field"


def test_text_in_place_of_a_list_is_refused_where_only_lists_are_sent(http):
    for route in ("/get_reward", "/v1/score/evaluation"):
        assert http.post(route, json={FIELDS[route]: "text"}).status_code == 422
