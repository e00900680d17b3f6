"""Routes in other people's shapes: thin adapters over the native flow. They take text that a template has rendered,
special tokens and all, where nothing else is said, and score it with the priority `batch`: it waits through a restart.

POST /get_reward           OpenRLHF (`openrlhf/cli/serve_rm.py`, `openrlhf/utils/agent.py`)
POST /v1/score/evaluation  LLaMA-Factory (`api/app.py`, `train/ppo/ppo_utils.py`), which always calls the model "model"
POST /classify             vLLM's, to which verl's discriminative reward models post
                           (`experimental/reward_loop/reward_loop.py`), or SGLang's own, as model cards show it
POST /pooling              vLLM's, which it recommends for reward models; one conversation (`messages`) here and above
POST /v1/embeddings        verl over SGLang: the embedding is the score
POST /rerank               best of n as vLLM, infinity and their clients know it; also /v1/rerank, /v2/rerank

Their shapes have no null, so one failed item fails the request, by its row of `errors.RULES`: with a 4xx where asking
again gives the same, a 5xx where it may not. (OpenRLHF's forks and verl give up on any 4xx: a quota, of which nothing
tells yet, would have to be a 503 here.) The body is the native error, `param` the item at fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from plaudit_model.encode import Overlong

from .envelope import (
    Call,
    Candidate,
    read_classify,
    read_embeddings,
    read_evaluation,
    read_pooling,
    read_rerank,
    read_reward,
)
from .errors import RULES, RequestError, from_item
from .results import Result, best_first, usage
from .scoring import Scoring
from .served import Served
from .service import agree, body_of, json_response, request_id_of, service_of

router = APIRouter()

OVERLONG: dict[str, Overlong] = {
    "/get_reward": "truncate_left",
    "/v1/score/evaluation": "truncate_left",
    "/classify": "error",
    "/pooling": "error",
    "/v1/embeddings": "error",
    "/rerank": "error",
    "/v1/rerank": "error",
    "/v2/rerank": "error",
}
"""What becomes of a long text without a choice in the URL (`?overlong=`) or at start-up (`plaudit serve --overlong`):
cut on its left, so that the end, which the head reads, is kept, or refused, as each trainer's own server does."""


@router.post("/get_reward")
async def get_reward(request: Request) -> Response:
    """OpenRLHF's remote reward model. `prompts`, `labels` and whatever else is sent are ignored."""
    _, results = await _scored(request, read_reward(body_of(request)))
    rewards = [result.score for result in results]
    logs = {
        "tokens": [_tokens(result) for result in results],
        "truncated": [int(bool(result.encoded and result.encoded.truncated)) for result in results],
    }
    return json_response({"rewards": rewards, "scores": rewards, "extra_logs": logs})


@router.post("/v1/score/evaluation")
async def evaluation(request: Request) -> Response:
    """LLaMA-Factory's `--reward_model_type api`. `model` is ignored: where several are served, the URL names one."""
    model, results = await _scored(request, read_evaluation(body_of(request)))
    scores = [result.score for result in results]
    about = {"id": request_id_of(request), "object": "score.evaluation", "model": model.id}
    return json_response({**about, "scores": scores})


@router.post("/classify")
async def classify(request: Request) -> Response:
    """vLLM's shape, as verl sends it: the raw score stands in `probs`, so `use_activation` must be false. Or SGLang's:
    the embedding is the score, and one text has no list."""
    call = read_classify(body_of(request))
    model, results = await _scored(request, call)
    if call.field in ("text", "input_ids"):
        id = call.rid or request_id_of(request)
        found = [{"embedding": [r.score], "meta_info": {"id": id, "prompt_tokens": _tokens(r)}} for r in results]
        return json_response(found[0] if call.single else found)
    label = model.contract.head.attributes[0]
    data = [{"index": r.index, "label": label, "probs": [r.score], "num_classes": 1} for r in results]
    return json_response({"id": request_id_of(request), **_list_of(model, data, results)})


@router.post("/pooling")
async def pooling(request: Request) -> Response:
    """vLLM's shape: the raw score is all that is pooled."""
    model, results = await _scored(request, read_pooling(body_of(request)))
    data = [{"object": "pooling", "index": result.index, "data": [result.score]} for result in results]
    return json_response({"id": request_id_of(request), **_list_of(model, data, results)})


@router.post("/v1/embeddings")
async def embeddings(request: Request) -> Response:
    """SGLang's shape, as verl sends it: an embedding of one dimension, the raw score."""
    model, results = await _scored(request, read_embeddings(body_of(request)))
    data = [{"object": "embedding", "index": result.index, "embedding": [result.score]} for result in results]
    return json_response(_list_of(model, data, results))


@router.post("/rerank")
@router.post("/v1/rerank")
@router.post("/v2/rerank")
async def rerank(request: Request) -> Response:
    """Responses (`documents`) to a prompt (`query`, one user message), best first; the relevance is the raw score."""
    call = read_rerank(body_of(request))
    model, results = await _scored(request, call)
    ranked = [
        {"index": r.index, "document": {"text": call.candidates[r.index].item["response"]}, "relevance_score": r.score}
        for r in best_first(results)[: call.top_n]
    ]
    tokens = {"total_tokens": usage(results)["total_tokens"]}
    return json_response({"id": request_id_of(request), "model": model.id, "results": ranked, "usage": tokens})


async def _scored(request: Request, call: Call) -> tuple[Served, Sequence[Result]]:
    """The model and what it gave each text. Raises RequestError if one has no score."""
    overlong = service_of(request).settings.overlong or OVERLONG[request.scope["path"]]
    model, terms = agree(request, call.options, overlong=overlong, priority="batch")
    candidates = _opened(model.encoders.opening, call.candidates) if call.bare else call.candidates
    async with Scoring(model, candidates, terms) as scoring:
        results = await scoring.all()
    if failed := [result for result in results if result.error]:
        raise _failure(failed, call.field)
    return model, results


def _opened(opening: str, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Texts as the template renders them. verl takes the BOS away, because vLLM and SGLang put one there."""
    texts = (candidate.item["text"] for candidate in candidates)
    whole = (text if text.startswith(opening) or not text else opening + text for text in texts)
    return [replace(candidate, item={"text": text}) for candidate, text in zip(candidates, whole, strict=True)]


def _failure(failed: Sequence[Result], field: str) -> RequestError:
    """The failure of the request: what cannot be helped goes before what may pass."""
    worst = min(failed, key=lambda result: bool(result.error and RULES[result.error.code].retryable))
    assert worst.error is not None
    return from_item(worst.error, param=f"{field}[{worst.index}]")


def _tokens(result: Result) -> int:
    assert result.scored is not None, "one without a score fails the request"
    return result.scored.tokens


def _list_of(model: Served, data: list[dict[str, Any]], results: Sequence[Result]) -> dict[str, Any]:
    tokens = usage(results)["total_tokens"]
    counted = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": model.id, "data": data, "usage": counted}
