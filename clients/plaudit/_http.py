"""The HTTP library: httpx2, or httpx where that is what is installed. Nothing else here imports either.

Loaded on first use, so that `import plaudit` costs nothing.
"""

from __future__ import annotations

import itertools
import os
import secrets
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx2 as http

    from ._aiohttp import Transport
else:
    try:
        import httpx2 as http
    except ImportError:
        import httpx as http

from ._extras import install
from ._plan import Send
from ._retry import Failure, FailureKind
from ._settings import Settings, installed_version
from ._wire import Reply
from .errors import ConfigurationError

__all__ = ["http"]

RequestError = http.RequestError
STALE = Failure("broken", "the answer to another request came")

PROBES = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}
"""A connection is tried after 30 s of silence (macOS has another name for that), three times, 10 s apart; a request
that is not acknowledged has as long, here in milliseconds."""

_PROCESS, _NUMBERS = secrets.token_hex(6), itertools.count()

# First match wins: a connect timeout is a TimeoutException too, but the server never saw that request.
_KINDS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], FailureKind], ...] = (
    ((http.ConnectTimeout, http.ConnectError, http.ProxyError), "connect"),
    (http.TimeoutException, "timeout"),
    (http.RequestError, "broken"),
)


def failure_of_error(error: Exception) -> Failure:
    """What an exception of the HTTP library says about the attempt."""
    kind = next(kind for library_type, kind in _KINDS if isinstance(error, library_type))
    return Failure(kind, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def call(settings: Settings, step: Send) -> dict[str, Any]:
    """The arguments with which the HTTP library sends what a step says. Connecting has its own limit; an answer may
    take all the time of its attempt."""
    return {
        "method": step.request.method,
        "url": step.url + step.request.path,
        "content": step.request.body(step.left),
        "headers": headers(settings) | {"x-request-id": f"{_PROCESS}-{os.getpid()}-{next(_NUMBERS)}"},
        "timeout": http.Timeout(step.seconds, connect=min(step.seconds, settings.connect_timeout), pool=None),
    }


def stale(call: Mapping[str, Any], response: Mapping[str, str]) -> bool:
    """Whether headers answer another request of ours: something between has sent a response twice, and from then on
    every answer on that connection would be the one before. Our servers echo the id; other ids say nothing."""
    answered = response.get("x-request-id", "")
    return answered.startswith(_PROCESS) and answered != call["headers"]["x-request-id"]


def reply_of(response: http.Response, body: bytes) -> Reply:
    """A complete response in our own terms."""
    return Reply(response.status_code, {k.lower(): v for k, v in response.headers.items()}, body)


def headers(settings: Settings) -> dict[str, str]:
    """Headers of every request."""
    json = "application/json"
    known = {"user-agent": f"plaudit/{installed_version()}", "accept": json, "content-type": json}
    if settings.api_key:
        known["authorization"] = f"Bearer {settings.api_key}"
    return known


def open_async(settings: Settings) -> http.AsyncClient | Transport:
    """New connections for an event loop. Raises ConfigurationError if the transport is not installed."""
    if settings.transport == "httpx":
        return http.AsyncClient(limits=limits(settings))
    try:
        from ._aiohttp import Transport
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"aiohttp is not installed: {install('aiohttp')}") from error
    return Transport()


def limits(settings: Settings) -> http.Limits:
    """Of connections: our own slots bound the requests in flight, so the pool never makes one wait."""
    return http.Limits(max_connections=None, max_keepalive_connections=settings.concurrency)


def keep_alive(connection: socket.socket) -> None:
    """Have the system notice that the peer is gone, or that something between has forgotten the connection: the
    attempt then fails at once. As far as the platform can; a peer that is there but silent goes unnoticed."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name in PROBES.keys() & vars(socket).keys():
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), PROBES[name])


def watch(event: str, about: Mapping[str, Any]) -> None:
    """Hears from the HTTP library of every step of a request (its extension `trace`)."""
    if event == "connection.connect_tcp.complete":
        keep_alive(about["return_value"].get_extra_info("socket"))


async def watch_async(event: str, about: Mapping[str, Any]) -> None:
    """`watch` as the asynchronous client wants it."""
    watch(event, about)
