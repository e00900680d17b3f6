"""Several servers: who is asked next, who is left alone, and whose answers count. First by hand, then over sockets."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any

import pytest

from plaudit import AsyncClient, Client, RetryPolicy, errors
from plaudit._endpoints import LEFT_ALONE, Endpoints
from plaudit._retry import Failure
from plaudit.types import Identity

if TYPE_CHECKING:
    from conftest import WireServer

A, B, C = "http://a", "http://b", "http://c"
OLD, NEW = Identity("m", "r1", "n"), Identity("m", "r2", "n")
DOWN = Failure("connect", "refused")
FAST = RetryPolicy(retries=None, base=0.01, cap=0.05)


def take(endpoints: Endpoints, now: float = 0.0, *, items: int = 1, tried: tuple[str, ...] = ()) -> str:
    return endpoints.take(now, set(tried), items)


def test_the_least_outstanding_work_is_next_and_equals_take_turns() -> None:
    endpoints = Endpoints((A, B, C))
    first = take(endpoints, items=10)
    assert {first, take(endpoints, items=4), take(endpoints, items=6)} == {A, B, C}
    endpoints.give(first, 10)
    assert take(endpoints) == first
    idle = Endpoints((A, B))
    turns = []
    for _ in range(4):
        turns.append(take(idle))
        idle.give(turns[-1], 1)
    assert turns[0] != turns[1] and turns == turns[:2] * 2


def test_a_key_has_its_server_as_long_as_that_is_there() -> None:
    endpoints = Endpoints((A, B, C))
    keys = [str(n).encode() for n in range(300)]
    homes = {key: endpoints.take(0.0, set(), 1, key) for key in keys}
    assert {homes[key] for key in keys} == {A, B, C}
    assert all(60 <= list(homes.values()).count(url) <= 140 for url in (A, B, C)), "spread"
    assert all(endpoints.take(0.0, set(), 1, key) == home for key, home in homes.items()), "whatever is outstanding"
    endpoints.heard(B, DOWN, 0.0)
    moved = {key: endpoints.take(0.0, set(), 1, key) for key in keys}
    assert B not in moved.values() and all(moved[key] == home for key, home in homes.items() if home != B)


def test_sticky_calls_go_to_one_server(server: WireServer, twin: WireServer) -> None:
    with Client([server.url, twin.url], sticky=True) as client:
        for n in range(30):
            for _ in range(2):
                assert float(client.score("p", str(n))) == server.score_of("p", str(n))
    asked = [[seen.body["items"] for seen in one.seen if seen.body] for one in (server, twin)]
    assert all(items in one for one in asked for items in one) and sorted(map(len, asked))[0] > 0
    assert not [items for items in asked[0] if items in asked[1]], "equal requests have one home"


def test_other_options_know_the_servers_and_the_pin(server: WireServer, twin: WireServer) -> None:
    with Client([server.url, twin.url], pin=True, retry=FAST) as client:
        for _ in range(6):
            client.with_options(overlong="error").score("p", "r")
        assert len(server.seen) == len(twin.seen) == 3
        server.identity["revision"] = twin.identity["revision"] = "rev2"
        with pytest.raises(errors.RevisionChanged):
            client.with_options(on_error="none").score("p", "r")
        assert client.with_options(model="tiny").score("p", "r").score is not None, "another model may be another"


def test_one_that_fails_is_left_alone_longer_each_time_and_proves_itself_with_one_request() -> None:
    endpoints, now = Endpoints((A, B)), 0.0
    for pause in (1.0, 2.0, 4.0):
        endpoints.heard(A, DOWN, now)
        assert not endpoints.elsewhere({B}, now + pause - 0.01)
        now += pause
        assert endpoints.elsewhere({B}, now)
    assert take(endpoints, now, tried=(B,)) == A
    assert take(endpoints, now) == B and take(endpoints, now) == B, "A has its one request out"
    endpoints.heard(A, None, now)
    assert take(endpoints, now) == A
    for _ in range(99):
        endpoints.give(B, 1)
        endpoints.heard(B, DOWN, now)
    assert endpoints.elsewhere({A}, now + LEFT_ALONE[1])


@pytest.mark.parametrize(
    ("failure", "alone"),
    [
        (Failure("broken", "", None), True),
        (Failure("identity", ""), True),
        (Failure("timeout", "", None), True),
        (Failure("status", "", status=502), True),
        (Failure("status", "", status=503), True),
        (Failure("status", "", status=503, retryable=False), False),
        (Failure("status", "", status=500), False),
        (Failure("status", "", status=422), False),
    ],
)
def test_what_ejects_a_server(failure: Failure, alone: bool) -> None:
    endpoints = Endpoints((A, B))
    endpoints.heard(A, failure, 0.0)
    assert endpoints.elsewhere({B}, 0.5) is not alone


def test_a_server_that_asks_to_be_left_alone_is_believed() -> None:
    endpoints = Endpoints((A, B))
    endpoints.heard(A, Failure("status", "", status=503, retry_after=60.0), 0.0)
    assert not endpoints.elsewhere({B}, 59.0) and endpoints.elsewhere({B}, 61.0)


def test_when_all_are_down_the_first_to_come_back_is_asked() -> None:
    endpoints = Endpoints((A, B))
    endpoints.heard(A, DOWN, 0.0)
    endpoints.heard(B, DOWN, 0.5)
    assert take(endpoints, 0.6) == A


def test_another_model_is_refused_until_no_server_has_the_old_one(caplog: pytest.LogCaptureFixture) -> None:
    endpoints = Endpoints((A, B))
    assert endpoints.objection(A, OLD) is None and endpoints.objection(B, OLD) is None
    objection = endpoints.objection(B, NEW)
    assert objection is not None and "the others answer as m@r1" in objection.message and not endpoints.all_object()
    with caplog.at_level(logging.WARNING, "plaudit"):
        assert endpoints.objection(A, NEW) is None
    assert "now answers as m@r2 (n), before as m@r1 (n)" in caplog.text
    assert endpoints.objection(B, NEW) is None and endpoints.objection(B, OLD) is not None


def test_other_numerics_are_another_model() -> None:
    endpoints = Endpoints((A, B))
    assert endpoints.objection(A, OLD) is None
    assert endpoints.objection(B, Identity("m", "r1", "bf16")) is not None


def test_a_dead_server_does_not_hold_up_a_new_revision() -> None:
    endpoints = Endpoints((A, B))
    assert endpoints.objection(A, OLD) is None and endpoints.objection(B, OLD) is None
    endpoints.heard(A, DOWN, 0.0)
    assert endpoints.objection(B, NEW) is None


def test_a_pin_never_gives_way() -> None:
    endpoints = Endpoints((A,), pin=True)
    assert endpoints.objection(A, OLD) is None
    assert endpoints.objection(A, NEW) is not None and endpoints.all_object()
    named = Endpoints((A, B), revision="r1")
    assert named.objection(B, NEW) is not None and not named.all_object()
    assert named.objection(A, OLD) is None and not named.all_object()
    assert named.objection(A, NEW) is not None and named.all_object()


def test_a_child_process_starts_with_nobody_outstanding_and_the_same_pin() -> None:
    endpoints = Endpoints((A, B), pin=True)
    busy = take(endpoints, items=1000)
    endpoints.objection(A, OLD)
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        chosen = {take(endpoints), take(endpoints)}
        os.write(writing, b"1" if chosen == {A, B} and endpoints.objection(B, NEW) is not None else b"0")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 1) == b"1" and take(endpoints) != busy


def responses(count: int) -> list[str]:
    return [f"response {n}" + "!" * (n % 7) for n in range(count)]


def through(kind: str, urls: Any, count: int, **options: Any) -> Any:
    """The scores of a long list, and those of a client that is then used again."""
    if kind == "Client":
        with Client(urls, retry=FAST, **options) as client:
            return [client.score_responses("p", responses(count)) for _ in range(2)]

    async def run() -> Any:
        async with AsyncClient(urls, retry=FAST, **options) as client:
            return [await client.score_responses("p", responses(count)) for _ in range(2)]

    return asyncio.run(run())


@pytest.mark.parametrize("kind", ["Client", "AsyncClient"])
def test_a_list_is_spread_over_both_servers(server: WireServer, twin: WireServer, kind: str) -> None:
    both = server, twin

    def all_are_there() -> bool:  # the 16 parts of a list
        return sum(one.paths().count("/score") for one in both) % 16 == 0

    for one in both:
        one.fail(*[{"until": all_are_there}] * 32)
    for scores in through(kind, [server.url, twin.url], 2000):
        assert scores.scores == [server.score_of("p", response) for response in responses(2000)]
    assert [one.paths().count("/score") for one in both] == [16, 16]


@pytest.mark.parametrize("kind", ["Client", "AsyncClient"])
def test_one_of_two_dies_and_no_score_is_lost(server: WireServer, twin: WireServer, kind: str) -> None:
    twin.fail({}, {}, {}, *[{"kind": "reset"}] * 200)
    for scores in through(kind, f"{server.url},{twin.url}", 2000):
        assert scores.scores == [server.score_of("p", response) for response in responses(2000)]
    assert len(twin.seen) < 40, "the dead one is asked seldom"


@pytest.mark.parametrize("kind", ["Client", "AsyncClient"])
def test_one_of_two_falls_silent_and_the_other_does_its_work(server: WireServer, twin: WireServer, kind: str) -> None:
    """Its connections stay open, as those of a host that is frozen."""
    twin.quota = 3
    for scores in through(kind, f"{server.url},{twin.url}", 2000, timeout=None, attempt_timeout=0.3):
        assert scores.scores == [server.score_of("p", response) for response in responses(2000)]
    assert len(twin.seen) < 40, "the silent one is asked seldom"


def test_one_that_was_never_there_is_no_obstacle(server: WireServer) -> None:
    for scores in through("Client", ["http://127.0.0.1:9", server.url], 300):
        assert None not in scores.scores
    with Client(["http://127.0.0.1:9", server.url]) as client:
        client.wait_until_ready(60)


def test_one_that_is_full_sends_its_work_to_the_other_at_once(server: WireServer, twin: WireServer) -> None:
    body = {"error": {"code": "overloaded", "message": "full", "retryable": True, "retry_after_ms": 60_000}}
    twin.fail(*[{"status": 503, "body": body}] * 100)
    with Client([server.url, twin.url], timeout=20.0) as client:
        for n in range(10):
            assert float(client.score("p", str(n))) == server.score_of("p", str(n))
    assert twin.paths() == ["/score"]


def test_one_with_another_revision_is_refused_and_the_other_used(server: WireServer, twin: WireServer) -> None:
    twin.identity["revision"] = "rev2"
    with Client([server.url, twin.url], revision="rev1") as client:
        for n in range(6):
            assert client.score_responses("p", [str(n)]).revision == "rev1"
    assert len(twin.seen) == 1
    assert server.paths() == ["/score"] * 6, "it is asked again, and seldom"
    server.identity["revision"] = "rev2"
    with Client([server.url, twin.url], revision="rev1") as client, pytest.raises(errors.RevisionChanged):
        client.score("p", "r")


def test_a_pin_on_the_first_answer_raises_when_it_changes(server: WireServer, caplog: pytest.LogCaptureFixture) -> None:
    with Client(server.url, pin=True, on_error="none") as client:
        assert client.score_responses("p", ["r"]).revision == "rev1"
        server.identity["numerics"] = "other"
        with pytest.raises(errors.RevisionChanged, match=r"tiny@rev1 .* answered first and is pinned"):
            client.score("p", "r")
    with Client(server.url) as client:
        client.score("p", "r")
        server.identity["revision"] = "rev3"
        assert client.score_responses("p", ["r"]).revision == "rev3"
    assert "now answers as tiny@rev3" in caplog.text


@pytest.mark.parametrize("urls", [[], ["http://a", "http://a/"], ["http://a", "b"], "http://a,"])
def test_servers_that_cannot_be(urls: Any) -> None:
    with pytest.raises(errors.ConfigurationError):
        Client(urls)
