"""What the head of a request must satisfy. Each gate is a function of the scope that returns or raises RequestError."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable

from starlette.types import Scope

from .errors import RequestError
from .settings import Limits, ServerSettings

Gate = Callable[[Scope], None]

PUBLIC = frozenset({"/livez", "/readyz", "/health"})
"""The only paths that need no key."""


def gates(settings: ServerSettings) -> list[Gate]:
    """The gates of a server, in order."""
    found = [readable, small_head(settings.limits)]
    if settings.hosts is not None:
        found.append(known_host(settings.hosts))
    if settings.api_key is not None:
        found.append(key_holder(settings.api_key))
    return [*found, plain_body]


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of a (lower case) name."""
    for key, value in scope["headers"]:
        if key == name:
            found: str = value.decode("latin-1")
            return found
    return None


def readable(scope: Scope) -> None:
    """What `protocol` could not read."""
    refused: RequestError | None = scope["state"].get("refused")
    if refused is not None:
        raise refused


def small_head(limits: Limits) -> Gate:
    """Bounds the number and the size of the headers; `protocol` bounds what is read before they are complete."""

    def gate(scope: Scope) -> None:
        size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        for name, value in scope["headers"]:
            size += len(name) + len(value)
        if len(scope["headers"]) > limits.headers or size > limits.header_bytes:
            raise RequestError(
                "headers_too_large", f"at most {limits.headers} headers and {limits.header_bytes} bytes of them"
            )

    return gate


def known_host(hosts: frozenset[str]) -> Gate:
    """Answers to its own names only (see `ServerSettings.hosts`)."""

    def gate(scope: Scope) -> None:
        host = header(scope, b"host") or ""
        name = host if host.endswith("]") else host.rpartition(":")[0] if ":" in host else host
        if name.lower() not in hosts:
            raise RequestError(
                "host_not_allowed", "this server does not answer to that host name; start it with --allowed-host NAME"
            )

    return gate


def key_holder(key: str) -> Gate:
    """Every route but the probes needs the key: as a bearer token, as X-API-Key, or as the password of basic
    authentication, which a client that can configure only a URL sends for http://:KEY@host."""
    digest = hashlib.sha256(key.encode()).digest()

    def gate(scope: Scope) -> None:
        if scope["path"] in PUBLIC:
            return
        given = hashlib.sha256(_credential(scope)).digest()
        if not hmac.compare_digest(given, digest):
            challenge = (("www-authenticate", 'Basic realm="plaudit", charset="UTF-8"'),)
            raise RequestError("unauthorized", "this server needs its API key", headers=challenge)

    return gate


def plain_body(scope: Scope) -> None:
    """A compressed body could unfold to any size."""
    encoding = header(scope, b"content-encoding")
    if encoding is not None and encoding.strip().lower() not in ("", "identity"):
        raise RequestError("unsupported_encoding", "send the body as it is: no content encoding is accepted")


def _credential(scope: Scope) -> bytes:
    scheme, _, value = (header(scope, b"authorization") or "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip().encode("latin-1"), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return (header(scope, b"x-api-key") or "").encode("latin-1")
