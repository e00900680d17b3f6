"""Routes in other people's shapes: thin adapters over the native flow.

`POST /get_reward` is OpenRLHF's (`openrlhf/cli/serve_rm.py`, `openrlhf/utils/agent.py`): `query` is text that the
policy's template has rendered, special tokens and all. Without a choice in the URL (`?overlong=`) or at start-up
(`plaudit serve --overlong`) an overlong text is cut on its left (`truncate_left`), so that the end, which the
head reads, is kept; its priority is `batch`, so that it waits through a restart.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from .envelope import read_reward
from .errors import RULES, RequestError, from_item
from .results import Result
from .scoring import Scoring
from .service import Defaults, agree, body_of, json_response, service_of

router = APIRouter()

GET_REWARD = {
    "too_long": 422,
    "invalid_unicode": 422,
    "empty_input": 422,
    "foreign_special_tokens": 422,
    "rendered_text_refused": 422,
    "template_error": 422,
    "non_finite_score": 422,
    "worker_crashed": 422,
    "scoring_failed": 422,
    "too_large": 413,
    "rate_limited": 503,
    "overloaded": 503,
    "draining": 503,
    "unavailable": 503,
    "deadline_exceeded": 504,
}
"""What a failure is to OpenRLHF's clients. Their shape has no null, so one failed item fails the request: with a
4xx where asking again gives the same, a 5xx where it may not. (Forks give up on any 4xx, so a quota, 429
elsewhere, is a 503 here.) The body is the native error, `param` the item at fault."""


@router.post("/get_reward")
async def get_reward(request: Request) -> Response:
    """OpenRLHF's remote reward model. `prompts`, `labels` and whatever else is sent are ignored."""
    try:
        return await _get_reward(request)
    except RequestError as error:
        raise error.as_status(GET_REWARD.get(error.code, error.status)) from error


async def _get_reward(request: Request) -> Response:
    call = read_reward(body_of(request))
    defaults = Defaults(service_of(request).settings.overlong or "truncate_left", "batch")
    model, terms = agree(request, call.options, defaults)
    async with Scoring(model, call.candidates, terms) as scoring:
        results = await scoring.all()
    if failed := [result for result in results if result.error]:
        raise _failure(failed)
    rewards = [result.score for result in results]
    logs = {
        "tokens": [result.scored.tokens for result in results if result.scored],
        "truncated": [int(bool(result.encoded and result.encoded.truncated)) for result in results],
    }
    return json_response({"rewards": rewards, "scores": rewards, "extra_logs": logs})


def _failure(failed: Sequence[Result]) -> RequestError:
    """The failure of the request: what cannot be helped goes before what may pass."""
    worst = min(failed, key=lambda result: bool(result.error and RULES[result.error.code].retryable))
    assert worst.error is not None
    return from_item(worst.error, param=f"query[{worst.index}]")
