"""A real HTTP server that keeps the wire contract and, on demand, breaks it."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

IDENTITY = {"model": "tiny", "revision": "rev1", "numerics": "exact/float32/torch/cpu"}


def score_of(prompt: Any, response: str) -> float:
    """The score that the server gives: it tells any two items of these tests apart."""
    text = prompt if isinstance(prompt, str) else "|".join(m["content"] for m in prompt)
    return len(text) + len(response) / 256 + sum(response.encode("utf-8", "surrogatepass")) / 65536


@dataclass
class Fault:
    """What happens to one request instead of a good answer."""

    kind: str = "answer"  # answer | reset | truncate | drip
    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    change: Callable[[dict[str, Any]], Any] | None = None
    delay: float = 0.0
    until: Callable[[], bool] = lambda: True  # when it may be answered


@dataclass
class Seen:
    """One request as the server saw it."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any] | None


def error_body(code: str, message: str, type: str = "invalid_request_error") -> dict[str, Any]:
    error = {"code": code, "message": message, "type": type, "param": None, "retryable": False}
    return {"error": {**error, "request_id": "req-e"}}


def _parts(item: dict[str, Any]) -> tuple[Any, list[str]]:
    """Prompt and responses of an item of any shape."""
    if "messages" in item:
        return item["messages"][:-1], [item["messages"][-1]["content"]]
    return item.get("prompt", ""), item.get("responses") or [item.get("response", item.get("text", ""))]


def results_of(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The wire's results. A response with the word POISON fails alone."""
    results: list[dict[str, Any]] = []
    for item_index, item in enumerate(items):
        several = "responses" in item
        prompt, responses = _parts(item)
        for position, response in enumerate(responses):
            result: dict[str, Any] = {
                "index": len(results),
                "item_index": item_index,
                "response_index": position if several else None,
                "score": score_of(prompt, response),
                "tokens": 3 + len(response),
                "truncated": None,
                "cached": False,
            }
            if "POISON" in response:
                result |= {"score": None, "error": {"code": "too_long", "message": "9 tokens too many"}}
            results.append(result)
    return results


class WireServer:
    """`faults` are used up one by one by the requests to anything but `/info`; then every answer is good.

    `echo`: answers carry the id of their request, as plaudit's do; otherwise one of the server's own. `quota`: how many
    more scoring requests are answered; those after them wait for ever."""

    def __init__(self) -> None:
        self.faults: deque[Fault] = deque()
        self.seen: list[Seen] = []
        self.identity = dict(IDENTITY)
        self.limits = {"max_items": 4096, "max_body_bytes": 64 * 1024 * 1024}
        self.in_flight = self.most_in_flight = self.connections = 0
        self.hold = 0.0
        self.quota = math.inf
        self.echo = False
        self._never = asyncio.Event()  # one that is held: what waits for it stays alive
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._connection, "127.0.0.1", 0), self._loop
        ).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def fail(self, *faults: dict[str, Any]) -> None:
        """Let the next requests meet these faults, each given by the fields of `Fault`."""
        self.faults.extend(Fault(**fault) for fault in faults)

    score_of = staticmethod(score_of)

    def paths(self) -> list[str]:
        return [seen.path for seen in self.seen]

    def close(self) -> None:
        async def stop() -> None:
            self._server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while (seen := await self._read(reader)) is not None:
                self.seen.append(seen)
                fault = self.faults.popleft() if self.faults and seen.path != "/info" else Fault()
                if seen.path == "/score":
                    self.quota -= 1
                if self.quota < 0:
                    await self._never.wait()
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                await asyncio.sleep(self.hold + fault.delay)
                while not fault.until():
                    await asyncio.sleep(0.005)
                self.in_flight -= 1
                if not await self._respond(writer, seen, fault):
                    return
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader) -> Seen | None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        except asyncio.IncompleteReadError:
            return None
        method, path, _ = head[0].split(" ")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        return Seen(method, path, headers, json.loads(body) if body else None)

    async def _respond(self, writer: asyncio.StreamWriter, seen: Seen, fault: Fault) -> bool:
        if fault.kind == "reset":
            return False
        status, answer = (fault.status, fault.body) if fault.body is not None else self._answer(seen)
        if fault.change is not None:
            answer = fault.change(answer)
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        request_id = seen.headers["x-request-id"] if self.echo else f"req-{len(self.seen)}"
        headers = {"content-type": "application/json", "x-request-id": request_id, **fault.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n{head}\r\n".encode())
        if fault.kind == "truncate":
            writer.write(body[: len(body) // 2])
            await writer.drain()
            return False
        if fault.kind == "drip":
            for byte in body:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.05)
            return True
        writer.write(body)
        await writer.drain()
        return True

    def _answer(self, seen: Seen) -> tuple[int, Any]:
        body = seen.body or {}
        if seen.path == "/score":
            return self._score(body["items"])
        if seen.path == "/compare":
            a, b = (score_of(body["prompt"], body[key]) for key in ("response_a", "response_b"))
            return 200, {"request_id": "req-c", **self.identity, "probability": 0.75, "margin": a - b}
        if seen.path == "/info":
            return 200, {**self.identity, "limits": self.limits, "sharing": "on"}
        if seen.path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]}
        return (200, {"status": "ready"}) if seen.path == "/readyz" else (404, error_body("unknown_route", "no route"))

    def _score(self, items: list[dict[str, Any]]) -> tuple[int, Any]:
        results = results_of(items)
        if len(results) > self.limits["max_items"]:
            return 413, error_body("too_many_items", "too many items")
        if len(results) == 1 and results[0]["score"] is None:
            return 422, error_body("too_long", "9 tokens too many", "item_error")
        usage = {"prompt_tokens": 1, "total_tokens": 2 * len(results), "shared_tokens": 0, "cached_tokens": 0}
        scores = [result["score"] for result in results]
        timing = {"queue_ms": 1.0, "tokenize_ms": 0.5, "compute_ms": 2.0}
        return 200, {
            "request_id": f"req-{len(self.seen)}",
            **self.identity,
            "transform": "none",
            "scores": scores,
            "results": results,
            "usage": usage,
            "timing": timing,
        }


@pytest.fixture
def server() -> Iterator[WireServer]:
    wire_server = WireServer()
    yield wire_server
    wire_server.close()


@pytest.fixture
def twin() -> Iterator[WireServer]:
    """A second server of the same model."""
    wire_server = WireServer()
    yield wire_server
    wire_server.close()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The milliseconds that each attempt was told. By the clients' clock an attempt takes 0.3 s, all else no time."""
    from plaudit import _async_client, _client, _http

    made: list[int] = []

    def call(settings: Any, step: Any) -> dict[str, Any]:
        sent = original(settings, step)
        made.append(json.loads(sent["content"])["deadline_ms"])
        return sent

    original = _http.call
    monkeypatch.setattr(_http, "call", call)
    for module in (_client, _async_client):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 0.3 * len(made), sleep=time.sleep))
    return made


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("PLAUDIT_")]:
        monkeypatch.delenv(name)
