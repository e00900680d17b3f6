"""Routes in other people's shapes: thin adapters over the native flow. All take text that a template has rendered,
special tokens and all, and score it with the priority `batch`, so that it waits through a restart.

POST /get_reward           OpenRLHF (`openrlhf/cli/serve_rm.py`, `openrlhf/utils/agent.py`)
POST /v1/score/evaluation  LLaMA-Factory (`api/app.py`, `train/ppo/ppo_utils.py`), which always calls the model "model"
POST /classify             verl's discriminative reward models over vLLM (`experimental/reward_loop/reward_loop.py`)
POST /v1/embeddings        the same over SGLang, where the embedding is the score

Their shapes have no null, so one failed item fails the request, by its row of `errors.RULES`: with a 4xx where asking
again gives the same, a 5xx where it may not. (OpenRLHF's forks and verl give up on any 4xx: a quota, of which nothing
tells yet, would have to be a 503 here.) The body is the native error, `param` the item at fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from plaudit_model.encode import Overlong

from .envelope import Call, Candidate, read_classify, read_embeddings, read_evaluation, read_reward
from .errors import RULES, RequestError, from_item
from .results import Result, usage
from .scoring import Scoring
from .served import Served
from .service import agree, body_of, json_response, request_id_of, service_of

router = APIRouter()

OVERLONG: dict[str, Overlong] = {
    "/get_reward": "truncate_left",
    "/v1/score/evaluation": "truncate_left",
    "/classify": "error",
    "/v1/embeddings": "error",
}
"""What becomes of a long text without a choice in the URL (`?overlong=`) or at start-up (`plaudit serve --overlong`):
cut on its left, so that the end, which the head reads, is kept, or refused, as each trainer's own server does."""


@router.post("/get_reward")
async def get_reward(request: Request) -> Response:
    """OpenRLHF's remote reward model. `prompts`, `labels` and whatever else is sent are ignored."""
    _, results = await _scored(request, read_reward, "query")
    rewards = [result.score for result in results]
    logs = {
        "tokens": [result.scored.tokens for result in results if result.scored],
        "truncated": [int(bool(result.encoded and result.encoded.truncated)) for result in results],
    }
    return json_response({"rewards": rewards, "scores": rewards, "extra_logs": logs})


@router.post("/v1/score/evaluation")
async def evaluation(request: Request) -> Response:
    """LLaMA-Factory's `--reward_model_type api`. `model` is ignored: where several are served, the URL names one."""
    model, results = await _scored(request, read_evaluation, "messages")
    scores = [result.score for result in results]
    about = {"id": request_id_of(request), "object": "score.evaluation", "model": model.id}
    return json_response({**about, "scores": scores})


@router.post("/classify")
async def classify(request: Request) -> Response:
    """vLLM's shape, as verl sends it. The raw score stands in `probs`; `use_activation` must be false."""
    model, results = await _scored(request, read_classify, "input")
    label = model.contract.head.attributes[0]
    data = [{"index": r.index, "label": label, "probs": [r.score], "num_classes": 1} for r in results]
    return json_response({"id": request_id_of(request), **_listed(model, data, results)})


@router.post("/v1/embeddings")
async def embeddings(request: Request) -> Response:
    """SGLang's shape, as verl sends it: an embedding of one dimension, the raw score."""
    model, results = await _scored(request, read_embeddings, "input")
    data = [{"object": "embedding", "index": result.index, "embedding": [result.score]} for result in results]
    return json_response(_listed(model, data, results))


async def _scored(request: Request, read: Callable[[bytes], Call], field: str) -> tuple[Served, Sequence[Result]]:
    """The model and what it gave each text. Raises RequestError if one has no score."""
    call = read(body_of(request))
    overlong = service_of(request).settings.overlong or OVERLONG[request.scope["path"]]
    model, terms = agree(request, call.options, overlong=overlong, priority="batch")
    candidates = call.candidates if field != "input" else _opened(model.encoders.opening, call.candidates)
    async with Scoring(model, candidates, terms) as scoring:
        results = await scoring.all()
    if failed := [result for result in results if result.error]:
        raise _failure(failed, field)
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


def _listed(model: Served, data: list[dict[str, Any]], results: Sequence[Result]) -> dict[str, Any]:
    tokens = usage(results)["total_tokens"]
    counted = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": model.id, "data": data, "usage": counted}
