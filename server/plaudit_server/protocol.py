"""HTTP on the socket: uvicorn's httptools protocol with the bounds that it lacks.

httptools is faster than h11 and refuses a message with both Content-Length and Transfer-Encoding, which h11
takes. But it collects headers without an end and waits for them for ever, so here they are bounded in bytes and
in time. A client that goes on sending after its answer is cut off, and so is one that sends requests far ahead of
their answers: each of a few bytes is kilobytes here, and uvicorn reads on after every answer.

httptools also takes a request that asks for another protocol (`curl --http2` asks for h2c) to have no body: what
follows would be read as requests that nobody sent. The wish is ignored here (RFC 9110, 7.8). What cannot be read is
answered in its turn, as a request that the gates refuse.

What ASGI has no words for, the `Connection` in a request's scope does: it says that the client has gone, without a
task that waits for it, and that a body is all there; and it writes an answer at once, where ASGI's two messages are
two system calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from .errors import RequestError
from .settings import Limits

_CONNECTION = "plaudit.connection"
_UNREADABLE = b"POST /unreadable HTTP/1.0\r\n\r\n"
"""Stands for what could not be read. HTTP/1.0: the connection is closed behind its answer."""


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, with what ASGI has no words for. It serves one request at a time."""

    _serving: RequestResponseCycle | None = None
    _leave: Callable[[], object] | None = None
    _lost = _refused = False

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        rest = memoryview(data)
        try:
            while rest and not self._refused:
                try:
                    return self.parser.feed_data(rest)
                except HttpParserUpgrade as wish:
                    self._read_anew(self._head_without_wish())
                    rest = rest[wish.args[0] :]
        except HttpParserError:
            self.refuse(RequestError("invalid_http", "what was sent cannot be read as an HTTP request"))

    def refuse(self, error: RequestError) -> None:
        """Have the application answer with an error, behind what came before; nothing more is read."""
        self._refused = True
        if self.cycle is None or not self.cycle.more_body or self.cycle.response_complete:
            self._read_anew(_UNREADABLE)
        self.cycle.scope["state"]["refused"] = error
        self.cycle.more_body = self.cycle.keep_alive = False
        self.cycle.message_event.set()

    def whole(self, scope: Scope) -> bool:
        """The body of the request is there to its end: reading it does not wait."""
        cycle = self._serving
        return cycle is not None and cycle.scope is scope and not cycle.more_body

    def watch(self, leave: Callable[[], object]) -> None:
        """Call `leave` once the client has gone; at once if it has already."""
        self._leave = leave
        self.flow.resume_reading()  # a connection that is not read from does not say that it is closed
        if self._lost:
            leave()

    def unwatch(self, leave: Callable[[], object]) -> None:
        """Nobody cares for `leave` any more; the next request may have put its own in that place."""
        if self._leave is leave:
            self._leave = None

    def answer(self, scope: Scope, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bool:
        """Head and body in one write. False: nothing was written, and the answer must go ASGI's way.

        The headers are the server's own: lower case and valid.
        """
        cycle = self._serving
        if cycle is None or cycle.scope is not scope or cycle.response_started or cycle.disconnected:
            return False
        if scope["method"] == "HEAD" or self.flow.write_paused or (b"content-length", b"%d" % len(body)) not in headers:
            return False
        content = [STATUS_LINE[status]]
        for name, value in (*cycle.default_headers, *headers):
            content += (name, b": ", value, b"\r\n")
        content += (b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n", body)
        cycle.waiting_for_100_continue = False
        cycle.response_started = cycle.response_complete = True
        self.transport.write(b"".join(content))
        cycle.message_event.set()
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._lost = True
        if self._serving is not None:
            self._serving.disconnected = True  # uvicorn tells the request that came last, which may wait behind it
        if self._leave is not None:
            self._leave()

    def _should_upgrade(self) -> bool:
        return True  # uvicorn then leaves such a head alone, and `data_received` feeds it again

    def _read_anew(self, head: bytes) -> None:
        """A parser that has failed, or has read `connection: close`, would read nothing more."""
        self.parser = HttpRequestParser(self)
        self.parser.feed_data(head)

    def _head_without_wish(self) -> bytes:
        """The head that was read last, without its wish for another protocol. Raises HttpParserError for a tunnel."""
        if self.scope["method"] == "CONNECT":
            raise HttpParserError("no tunnels here")
        first = b"%b %b HTTP/%b" % (self.scope["method"].encode(), self.url, self.scope["http_version"].encode())
        kept = (b"%b: %b" % header for header in self.headers if header[0] != b"upgrade")
        return b"\r\n".join((first, *kept, b"", b""))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._serving = cycle
        cycle.scope[_CONNECTION] = self  # type: ignore[literal-required]
        super()._start_asgi_task(cycle, app)


def connection_of(scope: Scope) -> Connection:
    """The connection that a request came over."""
    found = scope[_CONNECTION]
    assert isinstance(found, Connection)
    return found


def release(scope: Scope) -> None:
    """The request is done: the connection, which holds its last scope, must not be held by it."""
    del scope[_CONNECTION]


def bounded_protocol(limits: Limits) -> type[HttpToolsProtocol]:
    """The protocol class with these limits."""

    class BoundedProtocol(Connection):
        """`_head_bytes` came of a head that is not complete; None while none is awaited."""

        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._message_bytes = 0
            self._head_bytes: int | None = 0
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_timer()
            self.pipeline.clear()  # they are not answered any more, and hold this connection as it holds them
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self._message_bytes += len(data)
            if self._head_bytes is not None:
                self._head_bytes += len(data)
            super().data_received(data)
            if self.transport.is_closing():
                return
            if self._head_bytes is not None:
                if self._head_bytes > limits.header_bytes:
                    self.refuse(RequestError("headers_too_large", "the headers are too large"))
                elif self._timer is None:
                    self._await_head()
            elif self.cycle.response_complete:  # no request yet: what came has ended uvicorn's wait for one
                self._unset_keepalive_if_required()
                self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.transport.close)
            if self._message_bytes > 2 * limits.body_bytes or len(self.pipeline) > limits.pipelined:
                self.transport.abort()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._message_bytes = 0
            self._head_bytes = 0
            self._end_timer()

        def on_header(self, name: bytes, value: bytes) -> None:
            if self._head_bytes is not None:  # else it is a trailer: nobody's, and without a bound
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._head_bytes = None
            self._end_timer()
            super().on_headers_complete()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._await_head()

        def _await_head(self) -> None:
            """Its time begins once nobody waits for an answer: closing the connection would end that work."""
            if self._head_bytes is not None and (self.cycle is None or self.cycle.response_complete):
                self._timer = self.loop.call_later(limits.header_seconds, self.transport.close)

        def _end_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return BoundedProtocol


def arguments(limits: Limits) -> dict[str, Any]:
    """What uvicorn.Config is told about the protocol."""
    ours = {"http": bounded_protocol(limits), "ws": "none", "timeout_keep_alive": limits.idle_seconds}
    return {**ours, **dict.fromkeys(("access_log", "server_header", "proxy_headers"), False),
            "log_config": None, "lifespan": "off"}  # fmt: skip
