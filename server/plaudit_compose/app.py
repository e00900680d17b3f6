"""The routes: `/score` and `/get_reward` as a plaudit server has them, probes, and what is served.

A failed item is null with its error natively, and fails the request of `/get_reward`, whose shape has no null: with a
503 where asking again may help (a model's server is down), else with a 422.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NoReturn, get_args

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from plaudit._settings import Overlong
from plaudit.rewards.compose import Candidate, Composer, Reward
from plaudit.types import ItemError
from plaudit_server.errors import RULES, RequestError
from plaudit_server.gates import gates
from plaudit_server.metrics import Metrics
from plaudit_server.middleware import Body, Gate, Report
from plaudit_server.service import json_response
from plaudit_server.settings import MAX_ITEMS, ServerSettings

from .envelope import Call, read_reward, read_score

_A_DAY = 86_400_000
_MOMENT = 0.1
"""Seconds that the models' servers have beyond the caller's deadline, so that it is told here that it has passed."""


def build_app(settings: ServerSettings, composer: Composer) -> ASGIApp:
    """The service, behind the same guards as the server."""
    routes = Routes(settings, composer)
    table = {"/score": routes.score, "/get_reward": routes.get_reward}
    probes = {"/livez": routes.livez, "/readyz": routes.readyz, "/health": routes.readyz, "/info": routes.info}
    router = Router(
        [Route(path, handler, methods=["POST"]) for path, handler in table.items()]
        + [Route(path, handler, methods=["GET"]) for path, handler in probes.items()],
        redirect_slashes=False,
        default=_unknown,
    )
    return Report(Gate(Body(router, settings.limits), gates(settings)), Metrics(), {*table, *probes})


class Routes:
    """What is answered."""

    def __init__(self, settings: ServerSettings, composer: Composer) -> None:
        self._settings, self._composer = settings, composer

    async def score(self, request: Request) -> Response:
        """Rewards of one or many responses, in the order of the request."""
        call = read_score(await request.body())
        identity = self._composer.identity
        if call.options.get("model") not in (None, identity.model, f"{identity.model}@{identity.revision}"):
            raise RequestError("unknown_model", f"only {identity.model}@{identity.revision} is here", param="model")
        overlong = _overlong(call.options.get("overlong"))
        found = await self._rewards(call.candidates, overlong, call.options.get("deadline_ms"))
        failed = [reward.error for reward in found if reward.error]
        if failed and len(failed) == len(found) and (len(found) == 1 or all(error.retryable for error in failed)):
            raise _failure(failed)
        return json_response(self._answer(request, call, found))

    async def get_reward(self, request: Request) -> Response:
        """OpenRLHF's remote reward model. What is too long is cut on its left, as by the server."""
        candidates = read_reward(await request.body(), self._composer.rewards.ends)
        overlong = _overlong(request.query_params.get("overlong")) or "truncate_left"
        found = await self._rewards(candidates, overlong, _number(request.query_params.get("deadline_ms")))
        if failed := [reward.error for reward in found if reward.error]:
            raise _failure(failed)
        scores = [reward.score for reward in found]
        names = [term.name for term in self._composer.rewards.terms]
        logs = {name: [reward.attributes[name] for reward in found] for name in names}
        floored = [int(reward.floor is not None) for reward in found]
        return json_response({"rewards": scores, "scores": scores, "extra_logs": {**logs, "floored": floored}})

    async def livez(self, _request: Request) -> Response:
        return json_response({"status": "alive"})

    async def readyz(self, _request: Request) -> Response:
        """Ready when the models' servers are."""
        ready = await self._composer.ready()
        return json_response({"status": "ready" if ready else "waiting"}, 200 if ready else 503)

    async def info(self, _request: Request) -> Response:
        """Terms, identity and limits."""
        rewards, limits = self._composer.rewards, self._settings.limits
        terms = [{"kind": type(term).__name__, **asdict(term)} for term in rewards.terms]
        sizes = {"max_items": MAX_ITEMS, "max_body_bytes": limits.body_bytes}
        about = {"floor": rewards.floor, "terms": terms, "sha256": rewards.sha256, "limits": sizes}
        return json_response({**asdict(self._composer.identity), **about})

    async def _rewards(self, candidates: Sequence[Candidate], overlong: Overlong | None, deadline: Any) -> list[Reward]:
        """Raises RequestError when the caller, who named a deadline in milliseconds, waits no longer."""
        seconds = _seconds(deadline)
        try:
            async with asyncio.timeout(seconds):
                return await self._composer.rewards_of(candidates, overlong, (seconds or math.inf) + _MOMENT)
        except TimeoutError:
            raise RequestError("deadline_exceeded", f"no rewards within {seconds} s") from None

    def _answer(self, request: Request, call: Call, found: Sequence[Reward]) -> dict[str, Any]:
        scores = [reward.score for reward in found]
        head = {"request_id": request.state.request_id, **asdict(self._composer.identity), "transform": "none"}
        results = [_entry(index, call.places[index], reward) for index, reward in enumerate(found)]
        one = {"score": scores[0]} if call.single else {}
        return {**head, **one, "scores": scores, "results": results}


def _entry(index: int, place: tuple[int, int | None], reward: Reward) -> dict[str, Any]:
    entry = {"index": index, "item_index": place[0], "response_index": place[1], "score": reward.score}
    entry |= {"tokens": reward.tokens, "truncated": None, "cached": False}
    if reward.error:
        rule = RULES[_code(reward.error)]
        said = {"code": reward.error.code, "message": reward.error.message}
        return {**entry, "error": {**said, "type": rule.type, "retryable": reward.error.retryable}}
    return {**entry, "attributes": reward.attributes, **({"floor": reward.floor} if reward.floor else {})}


def _failure(failed: Sequence[ItemError]) -> RequestError:
    """The failure of a request: what cannot be helped goes before what may pass."""
    worst = min(failed, key=lambda error: error.retryable)
    failure = RequestError(_code(worst), worst.message)
    failure.code = worst.code
    return failure


def _code(error: ItemError) -> str:
    """The row of the server's table from codes to HTTP; a term's own codes are about the item."""
    return error.code if error.code in RULES else "scoring_failed"


def _overlong(value: Any) -> Overlong | None:
    if value is not None and value not in get_args(Overlong):
        raise RequestError("invalid_request", f"overlong is one of {', '.join(get_args(Overlong))}", param="overlong")
    return value  # type: ignore[no-any-return]


def _number(text: str | None) -> Any:
    """The number of a URL's option; what is none stays what it is."""
    try:
        return text and float(text)
    except ValueError:
        return text


def _seconds(milliseconds: Any) -> float | None:
    if milliseconds is None:
        return None
    if isinstance(milliseconds, bool) or not isinstance(milliseconds, (int, float)) or not 0 < milliseconds <= _A_DAY:
        raise RequestError("invalid_request", f"deadline_ms must be positive, at most {_A_DAY}", param="deadline_ms")
    return milliseconds / 1000


async def _unknown(_scope: Scope, _receive: Receive, _send: Send) -> NoReturn:
    raise RequestError("not_found", "known here: /score, /get_reward, /info, /livez, /readyz")
