"""How a client is set up. The environment is read here and nowhere else."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, get_args
from urllib.parse import urlsplit

from ._retry import RetryPolicy
from .errors import ConfigurationError
from .types import OnError

URL_VARIABLE = "PLAUDIT_URL"
KEY_VARIABLE = "PLAUDIT_API_KEY"
ENDPOINT_KEY_VARIABLE = "OPENAI_API_KEY"

Overlong = Literal["error", "truncate_prompt", "truncate_left"]
Transform = Literal["none", "normalized", "probability"]
Priority = Literal["interactive", "batch"]


@dataclass(frozen=True)
class Settings:
    """What a client was told. Times in seconds; None for `timeout` means no deadline.

    timeout      one deadline for a whole call: all its requests, retries and pauses
    concurrency  requests in flight at once, those that wait for their next attempt included
    on_error     `raise`, or `none`: what could not be scored is None beside the others' scores
    revision     scores of any other revision raise RevisionChanged
    None for `overlong`, `transform` and `priority` leaves the choice to the server.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    model: str | None = None
    revision: str | None = None
    timeout: float | None = 600.0
    connect_timeout: float = 5.0
    retry: RetryPolicy = RetryPolicy()
    concurrency: int = 32
    on_error: OnError = "raise"
    overlong: Overlong | None = None
    transform: Transform | None = None
    priority: Priority | None = None
    include: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")) or not _has_host(self.url):
            raise ConfigurationError(f"the URL must be http:// or https:// and a host, got {self.url!r}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigurationError("the API key must be printable ASCII; was a line break copied with it?")
        if self.concurrency < 1:
            raise ConfigurationError(f"concurrency must be at least 1, got {self.concurrency}")
        if self.timeout is not None and not self.timeout > 0:
            raise ConfigurationError(f"timeout must be positive, or None for no limit; got {self.timeout}")
        for name, choices in (
            ("on_error", OnError),
            ("overlong", Overlong),
            ("transform", Transform),
            ("priority", Priority),
        ):
            value = getattr(self, name)
            if value not in get_args(choices) and not (value is None and name != "on_error"):
                raise ConfigurationError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")

    @property
    def base_url(self) -> str:
        return self.url.rstrip("/")


def _has_host(url: str) -> bool:
    """Whether the URL names a host, and a port that can be one if it names a port."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def environment_url() -> str | None:
    """The server's URL from the environment, None if it is not set."""
    return os.environ.get(URL_VARIABLE) or None


def endpoint_key() -> str:
    """The key for an OpenAI-compatible endpoint; empty, so that no other key is sent there, if it is not set."""
    return os.environ.get(ENDPOINT_KEY_VARIABLE, "")


def resolve(url: str | None, api_key: str | None) -> tuple[str, str | None]:
    """URL and API key, from the environment where they are not given. Raises ConfigurationError without a URL."""
    url = url or environment_url()
    if not url:
        raise ConfigurationError(f"no server is named: pass url=, or set {URL_VARIABLE}")
    return url, api_key if api_key is not None else os.environ.get(KEY_VARIABLE) or None


@functools.cache
def installed_version() -> str:
    """The version of this package; "unknown" if it runs from a source tree that was never installed."""
    try:
        return version("plaudit")
    except PackageNotFoundError:
        return "unknown"
