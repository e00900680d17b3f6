"""A network that loses, delays, cuts and repeats: every score is the right one, in its place, or there is an error."""

from __future__ import annotations

import asyncio
import importlib.util
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from plaudit import AsyncClient, Client, RetryPolicy

if TYPE_CHECKING:
    from conftest import WireServer
    from lossy import Fate, LossyProxy

PATIENT = RetryPolicy(retries=None, base=0.001, cap=0.02)
FATES: dict[Fate, int] = {
    "whole": 12, "refuse": 2, "reset": 2, "cut": 2, "delay": 2, "interim": 1, "twice": 2, "late": 2,
    "swallow": 1,
}  # fmt: skip
LIMIT = 0.5
"""Seconds after which an answer counts as swallowed."""
CALLS = ("singles", "groups", "list", "threads")


def _lossy() -> Any:
    spec = importlib.util.spec_from_file_location("lossy", Path(__file__).with_name("lossy.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def lossy(server: WireServer, seed: int, **fates: int) -> Iterator[LossyProxy]:
    server.echo = True
    proxy = _lossy().LossyProxy(urlsplit(server.url).port, fates or FATES, seed)
    try:
        yield proxy
    finally:
        proxy.close()


def pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """No two with the same score, no score that its place gives away."""
    draw = random.Random(seed)
    return [(f"prompt {n // 4}" + "?" * draw.randrange(9), f"{n} " + "x" * draw.randrange(60)) for n in range(count)]


async def awaited(url: str, items: list[tuple[str, str]], calls: str, **options: Any) -> list[float | None]:
    async with AsyncClient(url, retry=PATIENT, timeout=None, attempt_timeout=LIMIT, **options) as client:
        if calls == "singles":
            return [r.score for r in await asyncio.gather(*(client.score(*item) for item in items))]
        if calls == "list":
            return (await client.score_items(items)).scores
        groups = [items[start : start + 7] for start in range(0, len(items), 7)]
        return [s for scores in await asyncio.gather(*map(client.score_items, groups)) for s in scores.scores]


def score(url: str, items: list[tuple[str, str]], calls: str, **options: Any) -> list[float | None]:
    if calls != "threads":
        return asyncio.run(awaited(url, items, calls, **options))
    with Client(url, retry=PATIENT, timeout=None, attempt_timeout=LIMIT) as client:
        return client.score_items(items).scores


def check(server: WireServer, count: int, calls: str, seed: int, **options: Any) -> None:
    items = pairs(count, seed)
    server.limits["max_items"] = 20
    with lossy(server, seed) as proxy:
        got = score(proxy.url, items, calls, **options)
    assert got == [server.score_of(*item) for item in items]
    assert all(proxy.met[fate] for fate in FATES), proxy.met


@pytest.mark.parametrize("calls", CALLS)
def test_500_items_through_a_lossy_network(server: WireServer, calls: str) -> None:
    check(server, 500, calls, seed=CALLS.index(calls), **({"coalesce": 10} if calls == "singles" else {}))


def test_the_other_transport_through_a_lossy_network(server: WireServer) -> None:
    pytest.importorskip("aiohttp", reason="pip install 'plaudit[aiohttp]'")
    check(server, 500, "groups", seed=9, transport="aiohttp")


@pytest.mark.parametrize("fate", ["twice", "late"])
@pytest.mark.parametrize("calls", ["one by one", "awaited one by one"])
def test_an_answer_that_comes_twice_is_never_the_next_ones(server: WireServer, fate: str, calls: str) -> None:
    """A connection that has it would otherwise answer every request with the answer before."""
    items = pairs(40, seed=4)

    async def one_by_one() -> list[float]:
        async with AsyncClient(proxy.url, retry=PATIENT) as client:
            return [float(await client.score(*item)) for item in items]

    with lossy(server, 0, **{fate: 1}) as proxy:
        if calls == "one by one":
            with Client(proxy.url, retry=PATIENT) as client:
                got = [float(client.score(*item)) for item in items]
        else:
            got = asyncio.run(one_by_one())
    assert got == [server.score_of(*item) for item in items]


@pytest.mark.soak
@pytest.mark.parametrize("calls", CALLS)
def test_25_000_items_through_a_lossy_network(server: WireServer, calls: str) -> None:
    check(server, 25_000, calls, seed=10 + CALLS.index(calls), **({"coalesce": 10} if calls == "singles" else {}))
