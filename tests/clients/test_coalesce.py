"""Single calls that travel together: few requests, the same scores, and nobody pays for another."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest

from plaudit import AsyncClient, RetryPolicy, errors

if TYPE_CHECKING:
    from conftest import WireServer

FAST = RetryPolicy(retries=3, base=0.01, cap=0.05)


def run(server: WireServer, use: Callable[[AsyncClient], Awaitable[Any]], **options: Any) -> Any:
    async def session() -> Any:
        async with AsyncClient(server.url, **{"retry": FAST, **options}) as client:
            return await use(client)

    return asyncio.run(session())


def items_of(server: WireServer) -> list[int]:
    """How many items each request had."""
    return [len(seen.body["items"]) for seen in server.seen if seen.body]


async def many(client: AsyncClient, count: int) -> list[Any]:
    return await asyncio.gather(*(client.score(f"p{n % 5}", str(n)) for n in range(count)), return_exceptions=True)


def test_64_concurrent_calls_are_one_request(server: WireServer) -> None:
    results = run(server, lambda client: many(client, 64))
    assert [float(result) for result in results] == [server.score_of("p0", str(n)) for n in range(64)]
    assert {(result.index, result.item_index, result.response_index) for result in results} == {(0, 0, None)}
    assert items_of(server) == [64]


def test_thousands_are_cut_by_what_may_travel_together(server: WireServer) -> None:
    results = run(server, lambda client: many(client, 1000), coalesce=100)
    assert [float(result) for result in results] == [server.score_of("p0", str(n)) for n in range(1000)]
    assert sum(items_of(server)) == 1000 and len(items_of(server)) == 20 and "/info" not in server.paths()


def test_one_call_alone_and_calls_one_after_the_other_are_not_held_back(server: WireServer) -> None:
    async def use(client: AsyncClient) -> None:
        for n in range(5):
            await client.score("p", str(n))

    run(server, use)
    assert items_of(server) == [1] * 5


def test_callers_gather_while_requests_are_on_their_way(server: WireServer) -> None:
    """A trickle of calls, one per turn of the loop, against a slow server: requests grow, they do not multiply."""
    tasks: list[asyncio.Future[Any]] = []
    server.fail(*[{"until": lambda: len(tasks) == 200}] * 200)

    async def use(client: AsyncClient) -> list[Any]:
        for n in range(200):
            tasks.append(asyncio.ensure_future(client.score("p", str(n))))
            await asyncio.sleep(0)
        return await asyncio.gather(*tasks)

    assert len(run(server, use)) == 200
    assert server.most_in_flight == 8 and len(items_of(server)) < 40


def test_coalesce_1_sends_each_alone(server: WireServer) -> None:
    run(server, lambda client: many(client, 10), coalesce=1)
    assert items_of(server) == [1] * 10


def test_a_bad_item_is_its_callers_alone(server: WireServer) -> None:
    async def use(client: AsyncClient) -> list[Any]:
        calls = [client.score("p", "a"), client.score("p", "POISON"), client.score("p", "b")]
        return await asyncio.gather(*calls, return_exceptions=True)

    good, bad, also_good = run(server, use)
    assert (good.score, also_good.score) == (server.score_of("p", "a"), server.score_of("p", "b"))
    assert isinstance(bad, errors.ItemFailed) and bad.code == "too_long" and bad.index == 0
    assert items_of(server) == [3]
    assert run(server, use, on_error="none")[1].error.code == "too_long"


def test_an_item_that_cannot_be_sent_never_joins(server: WireServer) -> None:
    async def use(client: AsyncClient) -> list[Any]:
        return await asyncio.gather(client.score("p", "a"), client.score("p", None), return_exceptions=True)  # type: ignore[arg-type]

    good, bad = run(server, use)
    assert good.score is not None and isinstance(bad, errors.InvalidInput) and items_of(server) == [1]


def test_a_request_refused_as_a_whole_is_repeated_one_by_one(server: WireServer) -> None:
    server.fail({"status": 400, "body": {"error": {"code": "bad_json", "message": "because"}}})
    assert None not in [r.score for r in run(server, lambda client: many(client, 3))]
    assert items_of(server) == [3, 1, 1, 1]


def test_a_failed_request_is_each_callers_own_error(server: WireServer) -> None:
    server.fail(*[{"status": 500, "body": {"error": {"code": "bug", "message": "x", "retryable": False}}}] * 9)
    found = run(server, lambda client: many(client, 3))
    assert all(isinstance(error, errors.ServerFailed) for error in found) and len({id(error) for error in found}) == 3


def test_who_leaves_cancels_nobody_and_the_last_one_the_request(server: WireServer) -> None:
    async def use(client: AsyncClient) -> Any:
        leaving, staying = (asyncio.ensure_future(client.score("p", text)) for text in "ab")
        server.fail({"until": leaving.cancelled}, {"delay": 30.0})
        await _until(lambda: server.in_flight == 1)
        leaving.cancel()
        stayed = await staying
        last = [asyncio.ensure_future(client.score("p", text)) for text in "cd"]
        await _until(lambda: server.in_flight == 1)
        for task in last:
            task.cancel()
        await asyncio.gather(*last, return_exceptions=True)
        collector = next(iter(client._collectors.values()))
        await _until(lambda: not collector._on_their_way)
        return leaving.cancelled(), stayed.score

    assert run(server, use) == (True, server.score_of("p", "b"))


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def test_each_call_has_its_deadline(server: WireServer, told: list[int]) -> None:
    server.fail({"delay": 30.0})
    with pytest.raises(errors.TimedOut):
        run(server, lambda client: client.score("p", "r"), timeout=0.2)
    assert told == [200]


def test_other_options_do_not_travel_together(server: WireServer) -> None:
    async def use(client: AsyncClient) -> None:
        other = client.with_options(transform="normalized")
        await asyncio.gather(client.score("p", "a"), other.score("p", "a"), client.score("p", "b"))

    run(server, use)
    assert sorted(items_of(server)) == [1, 2]


def test_results_are_iterated_in_order_from_any_iterable(server: WireServer) -> None:
    async def pairs() -> Any:
        for n in range(300):
            yield "p", str(n)
            await asyncio.sleep(0)

    async def use(client: AsyncClient) -> list[Any]:
        streamed = [result async for result in client.score_iter(pairs(), ahead=50)]
        listed = [result async for result in client.score_iter([{"text": "a"}, {"prompt": "p", "response": "b"}])]
        return [streamed, listed]

    streamed, listed = run(server, use)
    assert [(r.index, r.score) for r in streamed] == [(n, server.score_of("p", str(n))) for n in range(300)]
    assert [r.score for r in listed] == [server.score_of("", "a"), server.score_of("p", "b")]


def test_an_item_with_several_responses_has_no_single_score(server: WireServer) -> None:
    with pytest.raises(errors.InvalidInput, match="several responses"):
        run(server, lambda client: client.score_item({"prompt": "p", "responses": ["a", "b"]}))
    assert server.seen == []
