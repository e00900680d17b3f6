"""The steps a plan is made of, and the one plan that all others stand on: a request with its retries.

A plan is a generator. It yields steps; whoever runs it (the shells in `_client.py`, or a test) carries them out
and sends back what was heard. No sockets, no clock, no threads in here.

Sleep(seconds)               wait; Sleep(0) asks for the time
Send(url, request, seconds)  one HTTP exchange within so many seconds; heard: a `Reply` or a `Failure`
Gather(plans)                run these at the same time, each in one of the client's slots; heard: their results

A slot is held from the first attempt to the last, pauses included: when a server is down, its callers queue in
the client and do not all knock at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

from . import errors
from ._endpoints import Endpoints
from ._retry import Failure, GiveUp, decide
from ._settings import Settings
from ._wire import Reply, Request, failure_of
from .types import Attempt, Comparison, Scores

T = TypeVar("T")

AUTOMATIC = (120.0, 0.1)
"""Seconds that an attempt may take unless told otherwise, and more for each item. Generous, as a server that is full
says so at once, and what waits in a queue loses its place when its caller leaves."""

PATIENCE = 4
"""So often the automatic limit doubles after an attempt was cut off: a queue may be longer than was thought."""

SMALL = 10.0
"""Seconds that an attempt of a request without a body may take at most: nothing is computed for it."""

LOUD = 4
"""From so many failed attempts on a call that goes on trying says so, each time that their number has doubled."""

MOVED = "redirects are not followed: give the URL of the server that answers by itself, without this path"

LONGER = {
    "retries": "to wait longer, `plaudit wait` before it or, in Python, retry=RetryPolicy(retries=None)",
    "deadline": "to wait longer, raise timeout, or pass None for no limit",
}
"""What to do where a call has given up, by the reason."""

log = logging.getLogger("plaudit")


@dataclass(frozen=True, slots=True)
class Sleep:
    seconds: float


@dataclass(frozen=True, slots=True)
class Send:
    """`left`: the seconds that the whole call has, None for no limit; the server is told.

    Not `seconds`, the attempt's own, though the answer is awaited no longer: told those, a server would refuse again
    and again, until the retries are used up, what only has to queue for longer than one attempt. And where the answer
    is lost on its way, the server goes on with the items, and the next attempt finds them computed, or in their place.
    """

    url: str
    request: Request
    seconds: float
    left: float | None = None


@dataclass(frozen=True, slots=True)
class Gather:
    """`deadline` limits the wait for a slot; a plan whose turn comes too late is run and fails by itself."""

    plans: tuple[Plan[Any], ...]
    deadline: float | None


@dataclass(frozen=True, slots=True)
class Heard:
    """What became of a step, and the time after it, in seconds on a monotonic clock."""

    now: float
    value: Any = None


Step = Sleep | Send | Gather
Plan = Generator[Step, Heard, T]


def exchange(
    settings: Settings,
    endpoints: Endpoints,
    draw: Callable[[], float],
    request: Request,
    deadline: float | None,
    parse: Callable[[Reply], T],
    again: Callable[[T], Failure | None] = lambda answer: None,
) -> Plan[T]:
    """Send until there is an answer, retries are used up, or the deadline has passed. Of several servers the next
    is tried at once, and a pause made when all that are open have failed.

    `parse` checks a 200. `again` may call an answer a failure that is worth another attempt; if that is the last
    one, the answer is returned as it is. Raises Refused, Unavailable, ResponseInvalid, RevisionChanged.
    """
    started = now = (yield Sleep(0)).now
    if deadline is not None and now >= deadline:
        raise errors.TimedOut(
            f"{settings.base_url}: the whole timeout of {settings.timeout} s passed while waiting for one of the "
            f"client's {settings.concurrency} slots; raise timeout or concurrency",
            url=settings.base_url,
        )
    attempt, silent, tried = 0, 0, set[str]()
    while True:
        base, sent = endpoints.take(now, tried, request.items, request.fields if settings.sticky else None), now
        step = _limited(settings, base, request, silent, None if deadline is None else max(0.001, deadline - now))
        try:
            heard = yield step
        finally:
            endpoints.give(base, request.items)
        url, now = base + request.path, heard.now
        failure, answer = outcome_failure(heard.value, step.seconds), None
        if failure is None:
            answer = _parsed(url, heard.value, parse)
            identity = answer.identity if isinstance(answer, (Scores, Comparison)) else None
            failure = endpoints.objection(base, identity) if identity else None
        endpoints.heard(base, failure, now)
        if failure is None and answer is not None:
            failure = again(answer)
        if settings.on_attempt:
            settings.on_attempt(Attempt(url, attempt + 1, request.items, now - sent, _said(failure)))
        if failure is None and answer is not None:
            return answer
        assert failure is not None
        tried.add(base)
        moving = endpoints.elsewhere(tried, now)
        asked, lot = (replace(failure, retry_after=None), 0.0) if moving else (failure, draw())
        decision = decide(settings.retry, asked, attempt=attempt, now=now, deadline=deadline, draw=lot)
        if failure.kind == "identity" and endpoints.all_object():
            decision = GiveUp("refused")
        if isinstance(decision, GiveUp):
            if answer is not None and failure.kind != "identity":
                return answer
            raise_for(failure, decision, url, attempt + 1, now - started)
        if not moving:
            tried.clear()
            if attempt + 1 >= LOUD and attempt & (attempt + 1) == 0:
                log.warning("%s: %s; attempt %d follows in %.1f s", url, failure.message, attempt + 2, decision.seconds)
            now = (yield Sleep(decision.seconds)).now
        attempt, silent = attempt + 1, silent + (failure.kind == "timeout")


def _limited(settings: Settings, base: str, request: Request, silent: int, left: float | None) -> Send:
    """An attempt with its own limit, when `silent` ones before it had no answer in theirs."""
    first, each = AUTOMATIC
    own = settings.attempt_timeout or (first + each * request.items) * 2.0 ** min(silent, PATIENCE)
    own = min(own, SMALL) if request.fields is None else own
    return Send(base, request, own if left is None else min(own, left), left)


def _said(failure: Failure | None) -> str | None:
    return None if failure is None else f"{failure.status or failure.kind} {failure.code or ''}".strip()


def _parsed(url: str, reply: Reply, parse: Callable[[Reply], T]) -> T:
    try:
        return parse(reply)
    except errors.ResponseInvalid as error:
        request_id = reply.headers.get("x-request-id")
        trace = f" [request {request_id}]" if request_id else ""
        raise errors.ResponseInvalid(f"{url}: {error}{trace}", url=url, request_id=request_id) from None


def outcome_failure(outcome: Reply | Failure, seconds: float) -> Failure | None:
    """What went wrong with an attempt that had so many seconds, None if nothing did."""
    failure = outcome if isinstance(outcome, Failure) else failure_of(outcome)
    if failure is None or failure.kind != "timeout":
        return failure
    return replace(failure, message=f"no complete answer within {seconds:.4g} s")


def raise_for(failure: Failure, decision: GiveUp, url: str, attempts: int, seconds: float) -> NoReturn:
    """Raise the error that says what happened, where, how often it was tried, and what to do."""
    trace = f" [request {failure.request_id}]" if failure.request_id else ""
    tried = "" if decision.why == "refused" else f" ({decision.why}; {attempts} attempts in {seconds:.1f} s)"
    status = f"{failure.status} {failure.code or ''}".strip() + ": " if failure.status is not None else ""
    text = f"{url}: {status}{failure.message}{trace}{tried}"
    if failure.kind == "identity":
        raise errors.RevisionChanged(f"{text}; serve that one, or pin the new one", url=url)
    known: dict[str, Any] = {"url": url, "request_id": failure.request_id, "code": failure.code}
    if failure.status is not None and failure.status < 500 and failure.status not in (408, 429):
        raise _refusal(failure, text, known)
    raise _unavailable(failure, decision, text, known)


def _refusal(failure: Failure, text: str, known: Mapping[str, Any]) -> errors.Refused:
    kind, advice = {
        401: (errors.Unauthorized, "set PLAUDIT_API_KEY (in Python: api_key=)"),
        403: (errors.Unauthorized, "this key may not do that"),
        404: (errors.NotFound, "check the URL and the model's name"),
    }.get(failure.status or 0, (errors.BadRequest, MOVED if (failure.status or 0) < 400 else ""))
    said: dict[str, Any] = {name: getattr(failure, name) for name in ("status", "param", "type")}
    return kind(f"{text}; {advice}" if advice else text, **said, reason=failure.message, **known)


def _unavailable(failure: Failure, decision: GiveUp, text: str, known: Mapping[str, Any]) -> errors.Unavailable:
    longer = f"; {LONGER[decision.why]}" if decision.why in LONGER and failure.kind != "timeout" else ""
    if failure.status in (429, 503) and failure.retryable is not False:
        return errors.Overloaded(
            f"{text}; lower the concurrency or try later{longer}", retry_after=failure.retry_after, **known
        )
    if failure.status == 504:
        return errors.DeadlineExceeded(f"{text}; raise timeout", **known)
    if failure.kind == "timeout":
        limit = LONGER["deadline"] if decision.why == "deadline" else "if the server is well, raise attempt_timeout"
        return errors.TimedOut(f"{text}; {limit}", **known)
    if failure.status is not None:
        return errors.ServerFailed(f"{text}; look for the request in the server's log{longer}", **known)
    return errors.ConnectionFailed(f"{text}; is the server running there?{longer}", **known)
