"""Both shells against a real server, with and without faults."""

from __future__ import annotations

import asyncio
import copy
import gc
import random
import socket
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import pytest

from plaudit import AsyncClient, Attempt, Client, RetryPolicy, Settings, _http, errors

# A request that is given up on is left to a daemon thread; its socket may be collected open, in this test or the next.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"
)

if TYPE_CHECKING:
    from conftest import WireServer

FAST = RetryPolicy(retries=3, base=0.01, cap=0.05)
Call = Callable[[Any], Any]
"""What is done with a client: `lambda client: client.score(...)`, awaited or not."""


def error_body(code: str, **more: Any) -> dict[str, Any]:
    return {"error": {"code": code, "message": "because", "request_id": "q", **more}}


def blocking(url: str, call: Call, **options: Any) -> Any:
    with Client(url, **{"retry": FAST, **options}) as client:
        return call(client)


def awaited(url: str, call: Call, **options: Any) -> Any:
    async def run() -> Any:
        async with AsyncClient(url, **{"retry": FAST, **options}) as client:
            return await call(client)

    return asyncio.run(run())


@pytest.fixture(params=[blocking, awaited], ids=["Client", "AsyncClient"])
def through(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`through(url, call, **options)`: the call's result through either client."""
    return request.param


def test_every_method_answers(server: WireServer, through: Callable[..., Any]) -> None:
    assert float(through(server.url, lambda c: c.score("p", "abc"))) == server.score_of("p", "abc")
    assert through(server.url, lambda c: c.score_items([{"text": ""}])).model == "tiny"
    assert through(server.url, lambda c: c.score_responses("p", ["a", "bb"])).scores == [
        server.score_of("p", "a"),
        server.score_of("p", "bb"),
    ]
    assert through(server.url, lambda c: c.rank("p", ["a", "bbbb", "cc"])).order == [1, 2, 0]
    assert through(server.url, lambda c: c.compare("p", "aaa", "b")).margin > 0
    assert through(server.url, lambda c: c.info()).max_items == 4096
    assert through(server.url, lambda c: c.models()) == ("tiny",)
    assert through(server.url, lambda c: c.wait_until_ready()) is None


def test_messages_of_a_conversation_travel(server: WireServer, through: Callable[..., Any]) -> None:
    from plaudit import assistant, system, user

    prompt = [system("be brief"), user("hi"), assistant("hello"), user("bye")]
    through(server.url, lambda c: c.score(prompt, "bye"))
    assert server.seen[-1].body is not None and server.seen[-1].body["items"][0]["prompt"][2]["content"] == "hello"


def test_the_key_and_who_we_are_travel_in_headers(server: WireServer, through: Callable[..., Any]) -> None:
    through(server.url, lambda c: c.score("p", "r"), api_key="s3cret")
    headers = server.seen[-1].headers
    assert headers["authorization"] == "Bearer s3cret" and headers["user-agent"].startswith("plaudit/")
    through(server.url, lambda c: c.score("p", "r"))
    assert "authorization" not in server.seen[-1].headers


def test_the_environment_names_server_and_key(
    server: WireServer, through: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLAUDIT_URL", server.url + "/")
    monkeypatch.setenv("PLAUDIT_API_KEY", "from-env")
    through(None, lambda c: c.score("p", "r"))
    assert server.seen[-1].headers["authorization"] == "Bearer from-env" and server.paths() == ["/score"]


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "reset"},
        {"kind": "truncate"},
        {"status": 503, "body": error_body("at_capacity", retryable=True), "headers": {"Retry-After": "0"}},
        {"status": 429, "body": error_body("quota", retry_after_ms=1)},
        {"status": 502, "body": b"<html>bad gateway</html>"},
        {"status": 500, "body": error_body("bug")},
    ],
    ids=["reset", "truncated", "503", "429", "502", "500"],
)
def test_a_fault_that_passes_costs_a_retry_and_no_score(
    server: WireServer, through: Callable[..., Any], fault: dict[str, Any]
) -> None:
    server.fail(fault, fault)
    scores = through(server.url, lambda c: c.score_responses("p", ["a", "bb"]))
    assert scores.scores == [server.score_of("p", "a"), server.score_of("p", "bb")]
    assert server.paths() == ["/score"] * 3


def wrong_length(answer: dict[str, Any]) -> dict[str, Any]:
    return {**answer, "scores": answer["scores"][:1], "results": answer["results"][:1]}


def not_a_number(answer: dict[str, Any]) -> dict[str, Any]:
    answer["results"][1]["score"] = answer["scores"][1] = float("nan")
    return answer


def reordered(answer: dict[str, Any]) -> dict[str, Any]:
    return {**answer, "scores": answer["scores"][::-1], "results": answer["results"][::-1]}


@pytest.mark.parametrize("change", [wrong_length, not_a_number, reordered])
def test_an_answer_that_breaks_the_contract_raises_even_if_errors_are_to_be_none(
    server: WireServer, through: Callable[..., Any], change: Callable[[Any], Any]
) -> None:
    server.fail({"change": change})
    with pytest.raises(errors.ResponseInvalid):
        through(server.url, lambda c: c.score_responses("p", ["a", "bb"]), on_error="none")
    assert server.paths() == ["/score"]


def test_a_page_of_a_proxy_is_no_answer(server: WireServer, through: Callable[..., Any]) -> None:
    server.fail({"body": b"<html>login</html>"})
    with pytest.raises(errors.ResponseInvalid, match="is this a plaudit server"):
        through(server.url, lambda c: c.score("p", "r"))


def test_a_redirect_names_where_it_leads_and_is_not_followed(server: WireServer, through: Callable[..., Any]) -> None:
    moved = {"status": 308, "body": b"<html>moved</html>", "headers": {"location": "https://rm.example/score"}}
    server.fail(moved)
    told = "308: it sends on to 'https://rm.example/score'.*; redirects are not followed: give the URL of the server"
    with pytest.raises(errors.BadRequest, match=told):
        through(server.url, lambda c: c.score("p", "r"), on_error="none")
    server.fail(moved)
    with pytest.raises(errors.BadRequest, match=told):
        through(server.url, lambda c: c.wait_until_ready(None))


def test_a_server_that_is_not_there(through: Callable[..., Any]) -> None:
    with pytest.raises(errors.ConnectionFailed, match="4 attempts") as caught:
        through("http://127.0.0.1:9", lambda c: c.score("p", "r"))
    assert caught.value.exit_code == 69 and "retry=RetryPolicy(retries=None)" in str(caught.value)
    results = through("http://127.0.0.1:9", lambda c: c.score_responses("p", ["a", "b"]), on_error="none")
    assert results.scores == [None, None] and results.identity is None


@pytest.mark.parametrize("fault", [{"delay": 30.0}, {"kind": "drip"}], ids=["silent", "dripping"])
def test_one_deadline_covers_the_whole_call(
    server: WireServer, through: Callable[..., Any], fault: dict[str, Any], told: list[int]
) -> None:
    server.fail({"kind": "reset"}, fault)
    with pytest.raises(errors.TimedOut, match="2 attempts"):
        through(server.url, lambda c: c.score("p", "r"), timeout=0.4)
    assert told == [400, 100]


@pytest.mark.parametrize("timeout", [None, 600.0])
@pytest.mark.parametrize("fault", [{"delay": 30.0}, {"kind": "drip"}], ids=["silent", "dripping"])
def test_an_answer_that_never_comes_costs_an_attempt(
    server: WireServer, through: Callable[..., Any], fault: dict[str, Any], timeout: float | None
) -> None:
    server.fail(fault, fault)
    heard: list[Attempt] = []
    options: dict[str, Any] = {"attempt_timeout": 0.3, "timeout": timeout, "on_attempt": heard.append}
    options["retry"] = RetryPolicy(retries=None, base=0.01, cap=0.05)
    got = through(server.url, lambda c: c.score_responses("p", ["a", "bb"]), **options)
    assert got.scores == [server.score_of("p", "a"), server.score_of("p", "bb")]
    *lost, last = [one.failure for one in heard]  # a good answer may come too late as well
    assert lost == ["timeout"] * len(lost) and len(lost) >= 2 and last is None
    told = [seen.body["deadline_ms"] for seen in server.seen if seen.body]
    assert all(500_000 < ms <= 600_000 if timeout else ms == 86_400_000 for ms in told)


def test_connections_are_watched_by_the_system(
    server: WireServer, through: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def look(connection: socket.socket) -> None:
        keep_alive(connection)
        found.append(connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        known = {name: value for name, value in _http.PROBES.items() if hasattr(socket, name)}
        found.append({n: connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, n)) for n in known} == known)

    keep_alive = _http.keep_alive
    monkeypatch.setattr(_http, "keep_alive", look)
    through(server.url, lambda c: c.score_responses("p", ["a", "bb"]))
    assert [bool(one) for one in found] == [True, True]


def test_without_a_timeout_the_longest_deadline_is_sent(server: WireServer, through: Callable[..., Any]) -> None:
    for timeout in (None, 1e7):
        through(server.url, lambda c: c.score("p", "r"), timeout=timeout)
        assert server.seen[-1].body is not None and server.seen[-1].body["deadline_ms"] == 86_400_000


def test_a_long_list_is_cut_sent_at_once_and_joined_in_order(server: WireServer, through: Callable[..., Any]) -> None:
    server.limits["max_items"], server.hold = 40, 0.05
    server.fail({"kind": "reset"}, {"delay": 0.2})
    responses = [f"response {n}" + "!" * (n % 7) for n in range(500)]
    scores = through(server.url, lambda c: c.score_responses("p", responses), concurrency=5)
    assert scores.scores == [server.score_of("p", response) for response in responses]
    assert [result.index for result in scores] == list(range(500))
    assert len(scores.request_ids) == 13 and scores.usage.total_tokens == 1000
    assert 1 < server.most_in_flight <= 5


def test_many_callers_share_the_slots_of_a_client(server: WireServer) -> None:
    server.hold = 0.02

    async def run() -> list[Any]:
        async with AsyncClient(server.url, retry=FAST, concurrency=4) as client:
            return await asyncio.gather(*(client.score("p", str(n)) for n in range(60)))

    assert [float(result) for result in asyncio.run(run())] == [server.score_of("p", str(n)) for n in range(60)]
    assert server.most_in_flight <= 4 and server.connections <= 4


def test_threads_share_a_client(server: WireServer) -> None:
    results: dict[int, float] = {}
    server.hold = 0.02
    with Client(server.url, retry=FAST, concurrency=3) as client:

        def work(n: int) -> None:
            results[n] = float(client.score("p", str(n)))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {n: server.score_of("p", str(n)) for n in range(12)}
    assert server.most_in_flight <= 3


def test_one_failing_part_ends_the_whole_list(server: WireServer, through: Callable[..., Any]) -> None:
    server.limits["max_items"] = 40
    server.fail({"status": 400, "body": error_body("bad_json")}, {"delay": 300.0})  # which nobody waits for
    with pytest.raises(errors.BadRequest, match="bad_json"):
        through(server.url, lambda c: c.score_responses("p", ["x"] * 500), concurrency=2)


def test_a_failed_part_is_none_and_the_others_keep_their_scores(
    server: WireServer, through: Callable[..., Any]
) -> None:
    server.limits["max_items"] = 40
    server.fail({"status": 500, "body": error_body("bug", retryable=False)})
    scores = through(server.url, lambda c: c.score_responses("p", ["x"] * 100), concurrency=1, on_error="none")
    assert scores.scores == [None] * 40 + [server.score_of("p", "x")] * 60
    assert {result.error.code for result in scores.failed} == {"bug"}


def test_a_failed_item_is_none_alone_or_in_company(server: WireServer, through: Callable[..., Any]) -> None:
    assert through(server.url, lambda c: c.score("p", "POISON"), on_error="none").error.code == "too_long"
    scores = through(server.url, lambda c: c.score_responses("p", ["a", "POISON"]), on_error="none")
    assert scores.scores == [server.score_of("p", "a"), None]
    with pytest.raises(errors.ItemFailed):
        through(server.url, lambda c: c.score("p", "POISON"))


def test_a_pinned_revision_that_goes_away_is_noticed(server: WireServer, through: Callable[..., Any]) -> None:
    assert through(server.url, lambda c: c.score("p", "r"), revision="rev1").score is not None
    server.identity["revision"] = "rev2"
    with pytest.raises(errors.RevisionChanged):
        through(server.url, lambda c: c.score("p", "r"), revision="rev1")


def test_an_async_client_serves_one_event_loop_after_the_other(server: WireServer) -> None:
    client = AsyncClient(server.url, retry=FAST)

    async def run() -> float:
        score = float(await client.score("p", "r"))
        await client.aclose()
        return score

    assert asyncio.run(run()) == asyncio.run(run()) == server.score_of("p", "r")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("transport", ["httpx", "aiohttp"])
def test_connections_do_not_outlive_their_event_loops_by_more_than_one(server: WireServer, transport: Any) -> None:
    loops: list[weakref.ref[Any]] = []

    async def run(client: AsyncClient) -> list[float | None]:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        return [(await client.score("p", "r")).score, *(await client.score_items([("p", "r")])).scores]

    def gone(client: AsyncClient) -> list[bool]:
        assert [asyncio.run(run(client)) for _ in range(4)] == [[server.score_of("p", "r")] * 2] * 4
        gc.collect()
        return [loop() is None for loop in loops]

    assert gone(AsyncClient(server.url, retry=FAST, transport=transport)) == [True, True, True, False]
    gc.collect()  # what complains of its loop's end does so in here


def test_a_retry_leaves_the_trainers_random_numbers_alone(server: WireServer, through: Callable[..., Any]) -> None:
    random.seed(1)
    before = random.getstate()
    server.fail({"status": 503, "body": {}}, {"kind": "reset"})
    assert through(server.url, lambda c: c.score("p", "r")).score is not None
    assert random.getstate() == before


def test_a_text_is_no_list_of_responses(server: WireServer, through: Callable[..., Any]) -> None:
    for call in (lambda c: c.score_responses("p", "abc"), lambda c: c.rank("p", "abc")):
        with pytest.raises(errors.InvalidInput, match="a list of texts, got one text"):
            through(server.url, call)
    assert not server.seen


def test_an_async_client_serves_two_event_loops_at_the_same_time(server: WireServer) -> None:
    client = AsyncClient(server.url, retry=FAST)
    meet = threading.Barrier(2)
    scores: list[float] = []

    async def run(response: str) -> None:
        scores.append(float(await client.score("p", response)))
        meet.wait()  # both loops have connections now
        scores.append(float(await client.score("p", response)))
        await client.aclose()

    threads = [threading.Thread(target=lambda r=r: asyncio.run(run(r))) for r in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(scores) == sorted([server.score_of("p", "a"), server.score_of("p", "b")] * 2)


def test_a_cancelled_call_gives_its_slot_back(server: WireServer) -> None:
    async def run() -> float:
        async with AsyncClient(server.url, retry=FAST, concurrency=1) as client:
            server.fail({"delay": 30.0})
            call: Coroutine[Any, Any, Any] = client.score("p", "r")
            task = asyncio.ensure_future(call)
            while not server.in_flight:
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return float(await client.score("p", "r"))

    assert asyncio.run(run()) == server.score_of("p", "r")


def test_the_blocking_client_works_inside_a_running_loop(server: WireServer) -> None:
    async def run() -> float:
        with Client(server.url) as client:
            return float(client.score("p", "r"))

    assert asyncio.run(run()) == server.score_of("p", "r")


def test_connections_are_kept_and_a_closed_client_opens_new_ones(server: WireServer) -> None:
    client = Client(server.url)
    for _ in range(3):
        client.score("p", "r")
    assert server.connections == 1
    client.close()
    client.close()
    with client:
        assert float(client.score("p", "r")) == server.score_of("p", "r")
    assert server.connections == 2


def test_other_options_share_the_connections(server: WireServer) -> None:
    with Client(server.url, api_key="k") as client:
        client.score("p", "r")
        other = client.with_options(on_error="none", api_key="other")
        assert other.score("p", "POISON").score is None
        assert server.connections == 1 and server.seen[-1].headers["authorization"] == "Bearer other"
        assert client.settings.on_error == "raise"
        with pytest.raises(TypeError, match="unknown"):
            client.with_options(unknown=1)


def test_a_copy_starts_without_connections(server: WireServer) -> None:
    with Client(server.url, api_key="k") as client:
        client.score("p", "r")
        with copy.deepcopy(client) as twin:
            assert twin.settings == client.settings and float(twin.score("p", "r")) == server.score_of("p", "r")
    assert server.connections == 2


def test_the_key_is_not_shown() -> None:
    client = Client("http://h", api_key="s3cret")
    assert "s3cret" not in repr(client) and "http://h" in repr(client)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"url": ""}, "no server is named"),
        ({"url": "h:8000"}, "must be http"),
        ({"url": "http://[::1"}, "must be http"),
        ({"url": "http://h:99999"}, "must be http"),
        ({"url": "http://h", "api_key": "k\n"}, "printable ASCII"),
        ({"url": "http://h", "concurrency": 0}, "at least 1"),
        ({"url": "http://h", "timeout": 0}, "None for no limit"),
        ({"url": "http://h", "attempt_timeout": 0}, "attempt_timeout must be positive, or None for an automatic"),
        ({"url": "http://h", "on_error": "zero"}, "on_error must be one of raise, none"),
        ({"url": "http://h", "overlong": "cut"}, "overlong must be one of error"),
        ({"url": "http://h", "on_error": None}, "on_error must be one of"),
    ],
)
def test_a_client_that_cannot_work_is_not_made(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=reason):
        Client(**options)


def test_defaults_of_both_clients_are_those_of_the_settings() -> None:
    assert Client("http://h").settings == AsyncClient("http://h").settings == Settings("http://h")
