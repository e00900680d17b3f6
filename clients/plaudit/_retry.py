"""When a request is sent again. Pure: values in, a decision out; no clock, no sockets.

Scoring is a pure function of the item, so every request is safe to repeat; what is decided here is only whether
a repetition can help, and when. Full jitter after Brooker, "Exponential backoff and jitter" (2015).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RETRYABLE_STATUS = frozenset({408, 429, *range(500, 600)}) - {501, 505}
"""Proxies have 5xx of their own, as a tunnel's 530 while the server behind it restarts."""

FULL_STATUS = frozenset({429, 502, 503, *range(520, 531)})

FailureKind = Literal["connect", "broken", "timeout", "status", "identity"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """`retries` after the first attempt (None: as many as the deadline allows); times in seconds.

    `longest_wait`: a server that asks for more than this is believed, and the request given up; where retries have no
    limit, it is asked again after so long.
    """

    retries: int | None = 10
    base: float = 0.2
    cap: float = 10.0
    longest_wait: float = 120.0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt brought no answer.

    connect  the server never saw the request       broken  the connection ended before the answer was complete
    timeout  no complete answer in the attempt's time status  the server answered with an error
    identity the answer is another model's

    `retryable` is the server's own word for it, None if it gave none. `retry_after` is in seconds.
    """

    kind: FailureKind
    message: str
    status: int | None = None
    code: str | None = None
    param: str | None = None
    type: str | None = None
    retryable: bool | None = None
    retry_after: float | None = None
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class RetryAfter:
    """Send it again after so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Do not send it again, and why."""

    why: Literal["refused", "retries", "deadline", "asked to wait too long"]


def decide(
    policy: RetryPolicy, failure: Failure, *, attempt: int, now: float, deadline: float | None, draw: float
) -> RetryAfter | GiveUp:
    """What to do after attempt number `attempt` (from 0) failed at `now`.

    deadline  on the same clock as `now`; None for none
    draw      a random number in [0, 1)
    """
    if deadline is not None and now >= deadline:
        return GiveUp("deadline")
    if not may_help(failure):
        return GiveUp("refused")
    if policy.retries is not None and attempt >= policy.retries:
        return GiveUp("retries")
    asked = failure.retry_after
    if asked is not None and asked > policy.longest_wait:
        if policy.retries is not None:
            return GiveUp("asked to wait too long")
        asked = policy.longest_wait
    seconds = pause(policy, attempt, asked, draw)
    if deadline is not None and now + seconds >= deadline:
        return GiveUp("deadline")
    return RetryAfter(seconds)


def may_help(failure: Failure) -> bool:
    """Whether the same request can succeed later. The server's own word counts most, but never for a 4xx that
    is not known as temporary: those are refused again."""
    if failure.kind != "status":
        return True
    if failure.status not in RETRYABLE_STATUS:
        return False
    return failure.retryable is not False


def full(failure: Failure) -> bool:
    """Whether the server turned the request away for want of room, or is not there behind its proxy."""
    return failure.status in FULL_STATUS and failure.retryable is not False


def pause(policy: RetryPolicy, attempt: int, retry_after: float | None, draw: float) -> float:
    """Seconds until the next attempt: full jitter under an exponential, or what the server asks for plus up to
    a fifth, so that the callers it turned away together do not return together. "Now" is not believed."""
    if retry_after:
        return retry_after * (1 + 0.2 * draw)
    return draw * min(policy.cap, policy.base * 2.0 ** min(attempt, 64))
