"""HTTP on the socket: uvicorn's httptools protocol with the bounds that it lacks.

httptools is faster than h11 and refuses a message with both Content-Length and Transfer-Encoding, which h11
takes. But it collects headers without an end and waits for them for ever, so here they are bounded in bytes and
in time; and a client that goes on sending after its answer is cut off.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .settings import Limits

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s"
)
_BODY = (
    b'{"error":{"code":"headers_too_large","message":"the headers are too large","type":"invalid_request_error",'
    b'"param":null,"retryable":false,"request_id":null}}'
)


def bounded_protocol(limits: Limits) -> type[HttpToolsProtocol]:
    """The protocol class with these limits."""

    class BoundedProtocol(HttpToolsProtocol):
        """`_head_bytes` came of a head that is not complete; None while none is awaited."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._message_bytes = 0
            self._head_bytes: int | None = 0
            self._timer = self._head_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self._message_bytes += len(data)
            if self._head_bytes is not None:
                self._head_bytes += len(data)
            super().data_received(data)
            if self.transport.is_closing():
                return
            if self._head_bytes is not None and self._head_bytes > limits.header_bytes:
                self.transport.write(_TOO_LARGE % (len(_BODY), _BODY))
                self.transport.close()
            elif self._message_bytes > 2 * limits.body_bytes:
                self.transport.abort()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._message_bytes = 0
            self._head_bytes = 0
            self._timer.cancel()
            self._timer = self._head_timer()

        def on_headers_complete(self) -> None:
            self._head_bytes = None
            self._timer.cancel()
            super().on_headers_complete()

        def _head_timer(self) -> asyncio.TimerHandle:
            return self.loop.call_later(limits.header_seconds, self._late)

        def _late(self) -> None:
            if not self.transport.is_closing():
                self.transport.close()

    return BoundedProtocol


def arguments(limits: Limits) -> dict[str, Any]:
    """What uvicorn.Config is told about the protocol."""
    return {"http": bounded_protocol(limits), "ws": "none", "timeout_keep_alive": limits.idle_seconds}
