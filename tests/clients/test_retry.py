from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plaudit._retry import Failure, GiveUp, RetryAfter, RetryPolicy, decide, may_help, pause

DRAW = st.floats(0, 1, exclude_max=True)
REFUSED = Failure("connect", "connection refused")


def status(code: int, *, retryable: bool | None = None, retry_after: float | None = None) -> Failure:
    return Failure("status", "no", status=code, retryable=retryable, retry_after=retry_after)


@given(attempt=st.integers(0, 10_000), draw=DRAW)
def test_a_pause_is_jittered_under_an_exponential_with_a_cap(attempt: int, draw: float) -> None:
    policy = RetryPolicy(base=0.2, cap=10.0)
    assert 0 <= pause(policy, attempt, None, draw) <= min(10.0, 0.2 * 2 ** min(attempt, 64))


@given(draw=DRAW, asked=st.floats(0, 100, exclude_min=True))
def test_a_pause_is_never_shorter_than_the_server_asks(draw: float, asked: float) -> None:
    assert asked <= pause(RetryPolicy(), 0, asked, draw) <= asked * 1.2


def test_a_server_that_asks_for_no_pause_gets_one() -> None:
    assert pause(RetryPolicy(), 3, 0.0, 0.5) == pause(RetryPolicy(), 3, None, 0.5) == 0.8


@given(
    attempt=st.integers(0, 20),
    now=st.floats(0, 100),
    left=st.floats(-5, 50),
    draw=DRAW,
    asked=st.none() | st.floats(0, 200),
)
def test_no_retry_starts_after_the_deadline(
    attempt: int, now: float, left: float, draw: float, asked: float | None
) -> None:
    failure = status(503, retry_after=asked)
    decision = decide(RetryPolicy(), failure, attempt=attempt, now=now, deadline=now + left, draw=draw)
    assert isinstance(decision, GiveUp) or now + decision.seconds < now + left


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504, 507, 520, 524, 530])
def test_a_temporary_status_is_retried_unless_the_server_says_no(code: int) -> None:
    assert may_help(status(code)) and may_help(status(code, retryable=True))
    assert not may_help(status(code, retryable=False))


@pytest.mark.parametrize("code", [302, 400, 401, 403, 404, 409, 413, 422, 501, 505])
def test_any_other_status_is_not_retried_whatever_the_server_says(code: int) -> None:
    assert not may_help(status(code)) and not may_help(status(code, retryable=True))


@pytest.mark.parametrize("kind", ["connect", "broken", "timeout"])
def test_a_broken_exchange_is_retried(kind: str) -> None:
    assert may_help(Failure(kind, "x"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("failure", "attempt", "deadline", "expected"),
    [
        (REFUSED, 0, None, RetryAfter(0.1)),
        (REFUSED, 3, None, RetryAfter(0.8)),
        (REFUSED, 9, None, RetryAfter(5.0)),
        (REFUSED, 10, None, GiveUp("retries")),
        (REFUSED, 0, 0.05, GiveUp("deadline")),
        (REFUSED, 0, -1.0, GiveUp("deadline")),
        (status(422), 0, None, GiveUp("refused")),
        (status(503, retry_after=2.0), 0, None, RetryAfter(2.2)),
        (status(503, retry_after=2.0), 0, 1.0, GiveUp("deadline")),
        (status(503, retry_after=121.0), 0, None, GiveUp("asked to wait too long")),
    ],
)
def test_decisions(failure: Failure, attempt: int, deadline: float | None, expected: object) -> None:
    assert decide(RetryPolicy(), failure, attempt=attempt, now=0.0, deadline=deadline, draw=0.5) == expected


def test_without_a_limit_of_retries_only_the_deadline_ends_them() -> None:
    policy = RetryPolicy(retries=None)
    assert isinstance(decide(policy, REFUSED, attempt=10**6, now=0.0, deadline=None, draw=0.5), RetryAfter)
    assert decide(policy, REFUSED, attempt=0, now=9.0, deadline=9.0, draw=0.5) == GiveUp("deadline")
    long = status(503, retry_after=86400.0)
    assert decide(policy, long, attempt=0, now=0.0, deadline=600.0, draw=0.5) == RetryAfter(132.0)
    assert decide(policy, long, attempt=0, now=500.0, deadline=600.0, draw=0.5) == GiveUp("deadline")
