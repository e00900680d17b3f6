"""The other transport of `AsyncClient`: the same answers, and the same failures under the same names."""

from __future__ import annotations

import asyncio
import gzip
import re
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest

from plaudit import AsyncClient, RetryPolicy, _http, errors
from plaudit._extras import install

if TYPE_CHECKING:
    from conftest import WireServer

FAST = RetryPolicy(retries=3, base=0.01, cap=0.05)


@pytest.fixture
def aiohttp() -> None:
    pytest.importorskip("aiohttp", reason="pip install 'plaudit[aiohttp]'")


def scores(url: str, count: int = 2, **options: Any) -> list[float | None]:
    async def run() -> list[float | None]:
        async with AsyncClient(url, transport="aiohttp", **{"retry": FAST, **options}) as client:
            return (await client.score_responses("p", list(map(str, range(count))))).scores

    return asyncio.run(run())


@pytest.mark.usefixtures("aiohttp")
@pytest.mark.parametrize(
    "fault",
    [
        {},
        {"kind": "reset"},
        {"kind": "truncate"},
        {"status": 503, "body": {"error": {"code": "draining", "message": "x", "retryable": True}}},
        {"status": 302, "body": b"elsewhere", "headers": {"location": "http://h/"}},
    ],
    ids=["good", "reset", "truncated", "503", "redirect"],
)
def test_faults_are_those_of_the_other_transport(server: WireServer, fault: dict[str, Any]) -> None:
    server.fail(fault)
    if fault.get("status") == 302:
        with pytest.raises(errors.PlauditError, match="302.*it sends on to 'http://h/'.*; redirects are not"):
            scores(server.url)
    else:
        assert scores(server.url) == [server.score_of("p", "0"), server.score_of("p", "1")]
        assert server.seen[0].headers["user-agent"].startswith("plaudit/")


@pytest.mark.usefixtures("aiohttp")
def test_a_compressed_answer_is_read(server: WireServer, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    server.fail({"change": lambda answer: gzip.compress(json.dumps(answer).encode()),
                 "headers": {"content-encoding": "gzip"}})  # fmt: skip
    assert scores(server.url) == [server.score_of("p", "0"), server.score_of("p", "1")]


@pytest.mark.usefixtures("aiohttp")
def test_one_deadline_covers_a_silent_server(server: WireServer) -> None:
    server.fail({"delay": 30.0})
    with pytest.raises(errors.TimedOut):
        scores(server.url, timeout=0.3)


@pytest.mark.usefixtures("aiohttp")
def test_an_answer_that_never_comes_costs_an_attempt(server: WireServer) -> None:
    server.fail({"delay": 30.0})
    assert scores(server.url, timeout=None, attempt_timeout=0.3)[0] == server.score_of("p", "0")
    assert len(server.paths()) >= 2  # a good answer may come too late as well


@pytest.mark.usefixtures("aiohttp")
def test_connections_are_watched_by_the_system(server: WireServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from plaudit import _aiohttp

    found = []

    def look(connection: socket.socket) -> None:
        _http.keep_alive(connection)
        found.append(connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))

    monkeypatch.setattr(_aiohttp, "keep_alive", look)
    scores(server.url)
    assert [bool(one) for one in found] == [True]


@pytest.mark.usefixtures("aiohttp")
def test_a_server_that_is_not_there() -> None:
    with pytest.raises(errors.ConnectionFailed, match="4 attempts"):
        scores("http://127.0.0.1:9")


def test_without_it_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "plaudit._aiohttp", raising=False)
    with pytest.raises(errors.ConfigurationError, match=re.escape(install("aiohttp"))):
        scores("http://127.0.0.1:9")


def test_a_transport_that_does_not_exist() -> None:
    with pytest.raises(errors.ConfigurationError, match="transport must be one of httpx, aiohttp"):
        AsyncClient("http://h", transport="carrier pigeon")  # type: ignore[arg-type]
