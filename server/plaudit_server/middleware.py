"""What stands between the socket and the routes: pure ASGI, because Starlette's BaseHTTPMiddleware hides
disconnects from what is behind it. From the outside in:

Report       request id, metrics, the log line, and every error's answer
Gate         headers, host, key, content encoding: before a byte of the body is read
             and, last, `model_in_path`: /m/{model}[@revision]/... is the same route with the model named
Body         reads and bounds the body, and cancels the route when its client goes away
Direct       calls the routes that score; the rest of FastAPI, which is behind it, routes everything else
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import secrets
import time
import traceback
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import RequestError
from .gates import PUBLIC, header, readable
from .gates import Gate as Check
from .metrics import Metrics
from .protocol import connection_of, release
from .results import dumps
from .settings import Limits

logger = logging.getLogger("plaudit.server")
access = logging.getLogger("plaudit.access")

CLIENT_GONE = 499
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_PROCESS, _NUMBER = secrets.token_hex(6), itertools.count(1)
_MODEL_PATH = re.compile(r"/m/(?P<model>[^/]+)(?P<rest>/.*)", re.DOTALL)


@dataclass(slots=True)
class _Answer:
    """What has been sent of one answer. `head` is held back until the body begins."""

    status: int = CLIENT_GONE
    started: bool = False
    head: Message | None = None


class Report:
    """Outermost. Nothing of a request but its route (one of `paths`), status, time and id is ever logged."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = scope.setdefault("state", {})["request_id"] = _request_id(scope)
        answer, connection, started = _Answer(), connection_of(scope), time.monotonic()
        self._metrics.request_begun()

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                answer.status, answer.head = message["status"], message
                return
            head, answer.head = answer.head, None
            if head is not None:
                answer.started = True
                whole = not message.get("more_body", False)
                if whole and connection.answer(scope, head["status"], head["headers"], message.get("body", b"")):
                    return
                await send(head)
            await send(message)

        try:
            await self._answered(scope, receive, tell, answer)
        finally:
            release(scope)
            self._done(scope, answer.status, time.monotonic() - started)

    async def _answered(self, scope: Scope, receive: Receive, send: Send, answer: _Answer) -> None:
        try:
            await self._app(scope, receive, send)
        except RequestError as error:
            failure = error
        except Exception as error:
            logger.error("%s in request %s\n%s", type(error).__name__, scope["state"]["request_id"], _frames(error))
            failure = RequestError("internal_error", "the server failed; its log has the request id")
        else:
            return
        if answer.started:
            raise RuntimeError("an answer broke off") from None  # the connection is closed: the client must notice
        await send_error(failure, scope, send)

    def _done(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope["path"]
        if route not in self._paths and (named := _MODEL_PATH.fullmatch(route)):  # its head was refused, or it is outer
            route = named["rest"]
        route = route if route in self._paths else "unknown"
        self._metrics.request_done(route, status, seconds)
        level = logging.DEBUG if status < 400 or route in PUBLIC else logging.WARNING if status >= 500 else logging.INFO
        if access.isEnabledFor(level):
            fields = {"route": route, "status": status, "ms": round(seconds * 1000, 2)}
            fields["request_id"] = scope["state"]["request_id"]
            access.log(level, "%s %d", route, status, extra={"fields": fields})


class Gate:
    """Refuses a request by its head alone."""

    def __init__(self, app: ASGIApp, checks: Sequence[Check]) -> None:
        self._app = app
        self._checks = checks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for check in self._checks:
                check(scope)
        await self._app(scope, receive, send)


def model_in_path(scope: Scope) -> None:
    """The last of the checks: trainers can often configure nothing but a URL, so the model can be named in it."""
    if scope["path"].startswith("/m/") and (match := _MODEL_PATH.fullmatch(scope["path"])):
        scope["state"]["model"], scope["path"] = match["model"], match["rest"]
        scope["raw_path"] = match["rest"].encode()


class Body:
    """Owns the account of what all bodies together hold."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            return await self._app(scope, receive, send)
        body = bytearray()
        try:
            if await self._read(scope, receive, body):
                readable(scope)
                await _run(self._app, scope, bytes(body), receive, send)
        finally:
            self._held -= len(body)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> bool:
        """Read into `body`; False if the client went away first."""
        self._check(_announced(scope), coming=True)
        if connection_of(scope).whole(scope):
            return await self._collect(receive, body)
        seconds = self._limits.body_seconds
        try:
            async with asyncio.timeout(seconds):
                return await self._collect(receive, body)
        except TimeoutError:
            raise RequestError("body_timeout", f"the whole body must be there within {seconds:g} s") from None

    async def _collect(self, receive: Receive, body: bytearray) -> bool:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            chunk = message.get("body", b"")
            body += chunk
            self._held += len(chunk)
            self._check(len(body), coming=False)
            if not message.get("more_body", False):
                return True

    def _check(self, size: int, *, coming: bool) -> None:
        limits = self._limits
        if size > limits.body_bytes:
            raise RequestError("body_too_large", f"a body may have {limits.body_bytes} bytes; send several requests")
        if self._held + coming * size > limits.held_bytes:
            raise RequestError("overloaded", "the requests being worked on are as large as the server may hold")


class Direct:
    """The routes that are asked thousands of times a second, without FastAPI's way to them, which costs more than
    what they do."""

    def __init__(self, app: FastAPI, hot: Sequence[BaseRoute]) -> None:
        self._app = app
        self._routes = {route.path: route for route in hot if isinstance(route, Route)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get(scope["path"]) if scope["type"] == "http" else None
        if route is None or scope["method"] not in (route.methods or ()):
            return await self._app(scope, receive, send)
        scope["app"] = self._app
        answer: Response = await route.endpoint(Request(scope, receive, send))
        await answer(scope, receive, send)


def _announced(scope: Scope) -> int:
    size = header(scope, b"content-length") or ""
    return int(size) if size.isdecimal() else 0


async def _run(app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
    """The application, with the body it asks for, until it is done or its client is gone."""
    scope["state"]["body"] = body
    unread = [{"type": "http.request", "body": body, "more_body": False}]
    finished = left = False
    task, connection = asyncio.current_task(), connection_of(scope)
    assert task is not None, "a request is served in a task of its own"

    async def replay() -> Message:
        return unread.pop() if unread else await receive()

    async def note(message: Message) -> None:
        nonlocal finished
        finished = message["type"] == "http.response.body" and not message.get("more_body", False)
        await send(message)

    def leave() -> None:
        nonlocal left
        if not finished:
            left = task.cancel()

    connection.watch(leave)
    try:
        await app(scope, replay, note)
    except asyncio.CancelledError:
        if not left or task.uncancel():  # it is somebody else who cancels
            raise
    finally:
        connection.unwatch(leave)
        del scope["state"]["body"]  # the scope lives for as long as its connection


async def send_error(error: RequestError, scope: Scope, send: Send) -> None:
    """Answer with an error, in the one shape that errors have."""
    value, headers = error.body(scope["state"]["request_id"])
    body = dumps(value)
    raw = [(name.encode(), text.encode()) for name, text in headers.items()]
    raw += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _request_id(scope: Scope) -> str:
    """The client's X-Request-Id if it is a harmless one, or a new one."""
    given = header(scope, b"x-request-id")
    return given if given and _REQUEST_ID.fullmatch(given) else f"{_PROCESS}{next(_NUMBER):012x}"


def _frames(error: BaseException) -> str:
    """Where an error came from, without its message: that may hold what a client sent."""
    return "".join(traceback.format_tb(error.__traceback__))
