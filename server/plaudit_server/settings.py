"""How the HTTP side is set up: frozen values, checked once. What the engine needs is `EngineSettings`."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from typing import Literal, get_args

from plaudit_model.encode import Overlong

RenderedText = Literal["refuse", "as-is", "rerender"]

MAX_ITEMS = 4096
"""Scores of one request, a part of the wire contract."""

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class SettingsError(Exception):
    """The server was asked to run in a way that it refuses."""

    exit_code = 78


@dataclass(frozen=True)
class Limits:
    """What one request may be, and what all of them together may hold. Sizes in bytes, times in seconds.

    held_bytes   bodies of all requests being worked on; beyond it new ones are told to come back
    item_bytes   text of one item before it is tokenised: a tokenizer takes about a second a megabyte
    pipelined    requests that a client may send on one connection ahead of their answers
    """

    body_bytes: int = 64 * 1024 * 1024
    held_bytes: int = 256 * 1024 * 1024
    item_bytes: int = 1024 * 1024
    header_bytes: int = 16 * 1024
    headers: int = 100
    pipelined: int = 256
    header_seconds: float = 5.0
    body_seconds: float = 60.0
    idle_seconds: int = 75

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise SettingsError(f"the limit {name} must be positive, got {value}")
        if self.held_bytes < self.body_bytes:
            raise SettingsError(f"held_bytes ({self.held_bytes}) must admit one body of {self.body_bytes} bytes")


@dataclass(frozen=True)
class ServerSettings:
    """The front process.

    overlong          of compatibility routes that bring no choice of their own; None is each route's documented
                      default. Native routes default to `error`
    rendered_text     what happens to text that another model's template rendered
    deadline_seconds  of a request that names none; inside the 180 s that trainers' clients wait
    lameduck_seconds  how long a draining server still takes work, for balancers that learn of it late
    drain_seconds     how long accepted work may take after that
    encode_threads    tokenizer instances, each on its own thread
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    insecure: bool = False
    allowed_hosts: tuple[str, ...] = ()
    overlong: Overlong | None = None
    rendered_text: RenderedText = "refuse"
    deadline_seconds: float = 170.0
    lameduck_seconds: float = 0.0
    drain_seconds: float = 45.0
    encode_threads: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if self.api_key is not None and not _is_key(self.api_key):
            raise SettingsError("the API key must be at least 8 printable ASCII characters without spaces")
        if not self.is_loopback and self.api_key is None and not self.insecure:
            raise SettingsError(
                f"{self.host} is reachable from other machines: set --api-key (or PLAUDIT_API_KEY), or pass --insecure"
            )
        if self.overlong is not None and self.overlong not in get_args(Overlong):
            raise SettingsError(f"overlong must be one of {', '.join(get_args(Overlong))}, got {self.overlong!r}")
        if self.rendered_text not in get_args(RenderedText):
            choices = ", ".join(get_args(RenderedText))
            raise SettingsError(f"rendered-text must be one of {choices}, got {self.rendered_text!r}")
        if not 0 <= self.port <= 65535:
            raise SettingsError(f"port must lie in 0..65535, got {self.port}")
        if self.encode_threads < 1 or self.deadline_seconds <= 0 or self.drain_seconds < 0 or self.lameduck_seconds < 0:
            raise SettingsError("encode-threads and the deadline must be positive, the drain's times not negative")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def hosts(self) -> frozenset[str] | None:
        """The `Host` names that are answered; None is any.

        A server on loopback without a key could be reached by a web page whose name was pointed at 127.0.0.1
        (DNS rebinding), so there the names are limited unless others are allowed.
        """
        if self.allowed_hosts:
            return frozenset(self.allowed_hosts) | LOOPBACK_NAMES
        if self.is_loopback and self.api_key is None:
            return LOOPBACK_NAMES | {f"[{self.host}]" if ":" in self.host else self.host}
        return None


def _is_key(key: str) -> bool:
    return len(key) >= 8 and key.isascii() and key.isprintable() and " " not in key
