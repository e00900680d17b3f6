"""How a client is set up. The environment is read here and nowhere else."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, get_args
from urllib.parse import urlsplit

from ._retry import RetryPolicy
from .errors import ConfigurationError
from .types import Attempt, OnError

URL_VARIABLE = "PLAUDIT_URL"
KEY_VARIABLE = "PLAUDIT_API_KEY"
LENGTH_VARIABLE = "PLAUDIT_MAX_LENGTH"
TIMEOUT_VARIABLE = "PLAUDIT_TIMEOUT"
ENDPOINT_KEY_VARIABLE = "OPENAI_API_KEY"

Overlong = Literal["error", "truncate_prompt", "truncate_left"]
Transform = Literal["none", "normalized", "probability"]
Priority = Literal["interactive", "batch"]
Transport = Literal["httpx", "aiohttp"]


@dataclass(frozen=True)
class Settings:
    """What a client was told. Times in seconds; None for `timeout` means no deadline.

    url          one server, or several of the same model: a sequence, or a text with commas between them
    timeout      one deadline for a whole call: all its requests, retries and pauses
    attempt_timeout  of one attempt: without a complete answer by then it has failed, and is made again or elsewhere.
                 None: 120 s and 0.1 s an item, twice as long each time that this was too short
    concurrency  requests in flight at once, those that wait for their next attempt included
    on_error     `raise`, or `none`: what could not be scored is None beside the others' scores
    revision     scores of any other revision raise RevisionChanged
    pin          the same for the revision and numerics that answer first, whatever they are
    transport    what `AsyncClient` sends with; `aiohttp` is an extra, and faster with many requests on their way
    sticky       of several servers the same one for the same request, as long as it is there: its caches know it
    on_attempt   hears of every HTTP attempt, in the thread that made it; must not raise, and pickle if the client is to
    coalesce     single calls of `AsyncClient.score` that may share a request; 1 sends each alone
    None for `overlong`, `transform` and `priority` leaves the choice to the server.
    """

    url: str | Sequence[str]
    api_key: str | None = field(default=None, repr=False)
    model: str | None = None
    revision: str | None = None
    timeout: float | None = 600.0
    attempt_timeout: float | None = None
    connect_timeout: float = 5.0
    retry: RetryPolicy = RetryPolicy()
    concurrency: int = 32
    on_error: OnError = "raise"
    overlong: Overlong | None = None
    transform: Transform | None = None
    priority: Priority | None = None
    include: tuple[str, ...] = ()
    pin: bool = False
    coalesce: int = 256
    transport: Transport = "httpx"
    sticky: bool = False
    on_attempt: Callable[[Attempt], object] | None = None

    def __post_init__(self) -> None:
        for url in self.urls:
            if not url.startswith(("http://", "https://")) or not _has_host(url):
                raise ConfigurationError(f"the URL must be http:// or https:// and a host, got {url!r}")
        if len(set(self.urls)) != len(self.urls) or not self.urls:
            raise ConfigurationError(f"the servers must be different, and one at least; got {self.base_url!r}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigurationError("the API key must be printable ASCII; was a line break copied with it?")
        for name in ("concurrency", "coalesce"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, none in (("timeout", "no limit"), ("attempt_timeout", "an automatic one")):
            if (seconds := getattr(self, name)) is not None and not seconds > 0:
                raise ConfigurationError(f"{name} must be positive, or None for {none}; got {seconds}")
        known = {"overlong": Overlong, "transform": Transform, "priority": Priority}
        for name, choices in {"on_error": OnError, "transport": Transport, **known}.items():
            value = getattr(self, name)
            if value not in get_args(choices) and not (value is None and name in known):
                raise ConfigurationError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")

    @functools.cached_property
    def urls(self) -> tuple[str, ...]:
        """Every server's URL, without a slash at its end."""
        given = self.url.split(",") if isinstance(self.url, str) else self.url
        return tuple(url.strip().rstrip("/") for url in given)

    @property
    def base_url(self) -> str:
        """The servers as text, for messages."""
        return ",".join(self.urls)


def _has_host(url: str) -> bool:
    """Whether the URL names a host, and a port that can be one if it names a port."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def environment_length() -> int | None:
    """The trainer's longest prompt and response together, in tokens, where it is told in no other way."""
    length = os.environ.get(LENGTH_VARIABLE) or None
    if length is not None and not length.isdecimal():
        raise ConfigurationError(f"{LENGTH_VARIABLE} must be a number of tokens, got {length!r}")
    return None if length is None else int(length)


def environment_timeout() -> float | None:
    """Seconds for a trainer's call with its retries, where they are told in no other way; None, from 0, is no limit."""
    seconds = os.environ.get(TIMEOUT_VARIABLE) or "600"
    if not seconds.isdecimal():
        raise ConfigurationError(f"{TIMEOUT_VARIABLE} must be a number of seconds, 0 for no limit; got {seconds!r}")
    return float(seconds) or None


def environment_url() -> str | None:
    """The server's URL from the environment, None if it is not set."""
    return os.environ.get(URL_VARIABLE) or None


def endpoint_key() -> str:
    """The key for an OpenAI-compatible endpoint; empty, so that no other key is sent there, if it is not set."""
    return os.environ.get(ENDPOINT_KEY_VARIABLE, "")


def resolve(url: str | Sequence[str] | None, api_key: str | None) -> tuple[str | Sequence[str], str | None]:
    """URL(s) and API key, from the environment where they are not given. Raises ConfigurationError without a URL."""
    url = url or environment_url()
    if not url:
        raise ConfigurationError(f"no server is named: give --url (in Python: url=), or set {URL_VARIABLE}")
    key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE) or None
    return url if isinstance(url, str) else tuple(url), key


@functools.cache
def installed_version() -> str:
    """The version of this package; "unknown" if it runs from a source tree that was never installed."""
    try:
        return version("plaudit")
    except PackageNotFoundError:
        return "unknown"
