"""The native routes: score, rank, compare. Bodies are read raw: see `envelope`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from .envelope import Call, read_compare, read_rank, read_score
from .errors import RequestError, from_item, whole_failure
from .gates import header
from .results import Result, best_first, dumps, sigmoid, temperature, timing, usage
from .scoring import Scoring, Terms
from .served import Served
from .service import agree, body_of, json_response, request_id_of

NDJSON = "application/x-ndjson"

router = APIRouter()


@router.post("/score")
async def score(request: Request) -> Response:
    """Scores of one or many responses, in the order of the request."""
    call = read_score(body_of(request))
    model, terms = agree(request, call.options)
    if NDJSON in (header(request.scope, b"accept") or ""):
        return Stream(request_id_of(request), model, call, terms)
    scoring, results = await _scored(model, call, terms)
    answer = _head(request_id_of(request), model, terms)
    if call.single:
        answer["score"] = results[0].score
    answer["scores"] = [result.score for result in results]
    answer["results"] = _entries(model, terms, results)
    return json_response(answer | _tail(scoring, results))


@router.post("/rank")
async def rank(request: Request) -> Response:
    """The responses to one prompt, best first; equal scores keep their order. What has no score is in `failed`."""
    call = read_rank(body_of(request))
    model, terms = agree(request, call.options)
    scoring, results = await _scored(model, call, terms)
    ranked = best_first(results)
    answer = _head(request_id_of(request), model, terms)
    answer["best"] = ranked[0].index if ranked else None
    answer["results"] = _entries(model, terms, ranked[: call.top_n])
    answer["failed"] = _entries(model, terms, [r for r in results if r.score is None])
    return json_response(answer | _tail(scoring, results))


@router.post("/compare")
async def compare(request: Request) -> Response:
    """How likely response A is the better one: sigmoid(margin / temperature), margin = score(A) - score(B)."""
    call = read_compare(body_of(request))
    model, terms = agree(request, call.options)
    scale = temperature(model.contract)
    scoring, results = await _scored(model, call, terms)
    a, b = (_needed(result, name) for result, name in zip(results, ("response_a", "response_b"), strict=True))
    answer = _head(request_id_of(request), model, terms)
    answer |= {"probability": sigmoid((a - b) / scale), "margin": a - b, "temperature": scale, "scores": [a, b]}
    return json_response(answer | _tail(scoring, results))


class Stream(Response):
    """NDJSON: a result a line, each as soon as it is there, and last a line with identity, usage and timing.

    Errors wait for the first score: until then the request may yet fail as a whole, with a status of its own.
    """

    def __init__(self, request_id: str, model: Served, call: Call, terms: Terms) -> None:
        super().__init__(media_type=NDJSON)
        del self.headers["content-length"]
        self._request_id, self._model, self._call, self._terms = request_id, model, call, terms

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises RequestError, before anything is sent, if the engine refuses the request or all of it fails."""
        async with Scoring(self._model, self._call.candidates, self._terms) as scoring:
            results: list[Result] = []
            sent = 0
            async for result in scoring.as_finished():
                results.append(result)
                if sent or result.error is None:
                    await self._send(send, results, sent)
                    sent = len(results)
            if failure := whole_failure(result.error for result in results):
                raise failure
            if not sent:
                await self._send(send, results, sent)
            last = _head(self._request_id, self._model, self._terms) | _tail(scoring, results)
            await _send_line(send, last)
            await send({"type": "http.response.body"})

    async def _send(self, send: Send, results: list[Result], sent: int) -> None:
        """The results that have not been sent yet, and before the first of all the head of the response."""
        if not sent:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        for entry in _entries(self._model, self._terms, results[sent:]):
            await _send_line(send, entry)


async def _send_line(send: Send, value: Any) -> None:
    await send({"type": "http.response.body", "body": dumps(value) + b"\n", "more_body": True})


async def _scored(model: Served, call: Call, terms: Terms) -> tuple[Scoring, list[Result]]:
    async with Scoring(model, call.candidates, terms) as scoring:
        results = await scoring.all()
    if failure := whole_failure(result.error for result in results):
        raise failure
    return scoring, results


def _needed(result: Result, param: str) -> float:
    """The score that a comparison cannot do without. Raises RequestError."""
    if result.error is not None:
        raise from_item(result.error, param=param)
    if result.score is None:
        raise RequestError("internal_error", "an item came back with neither score nor error")
    return result.score


def _head(request_id: str, model: Served, terms: Terms) -> dict[str, Any]:
    """What every answer says of who scored, and how."""
    info = model.loaded
    return {
        "request_id": request_id, "model": model.id, "revision": info.revision, "numerics": info.numerics,
        "transform": terms.transform,
    }  # fmt: skip


def _tail(scoring: Scoring, results: list[Result]) -> dict[str, Any]:
    return {"usage": usage(results), "timing": timing(results, scoring.tokenize_seconds)}


def _entries(model: Served, terms: Terms, results: list[Result]) -> list[dict[str, Any]]:
    names = model.contract.head.attributes
    return [result.json(names, terms.include) for result in results]
