"""What `Client` and `AsyncClient` have in common: settings, plans, and the place where connections are kept.

A client can be made anywhere and used anywhere: connections are opened on first use, one set per process, and for
`AsyncClient` one set per event loop. It can be pickled, forked and shared among threads; a copy in another
process starts without connections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any, ClassVar, Self

from ._core import Core
from ._retry import RetryPolicy
from ._settings import Overlong, Priority, Settings, Transform, Transport, resolve
from .types import Attempt, OnError

DEFAULT_RETRIES = RetryPolicy()


class BaseClient:
    """What both clients are: settings, plans, and the place where connections are kept."""

    _store: ClassVar[type[MutableMapping[Any, Any]]]
    """Makes the mapping from a process or an event loop to its connections."""

    def __init__(
        self,
        url: str | Sequence[str] | None = None,
        *,
        api_key: str | None = None,
        model: str | None = None,
        revision: str | None = None,
        timeout: float | None = 600.0,
        attempt_timeout: float | None = None,
        connect_timeout: float = 5.0,
        retry: RetryPolicy = DEFAULT_RETRIES,
        concurrency: int = 32,
        on_error: OnError = "raise",
        overlong: Overlong | None = None,
        transform: Transform | None = None,
        priority: Priority | None = None,
        include: Iterable[str] = (),
        pin: bool = False,
        coalesce: int = 256,
        transport: Transport = "httpx",
        sticky: bool = False,
        on_attempt: Callable[[Attempt], object] | None = None,
    ) -> None:
        """See `Settings` for the options; `url` may be several servers of the same model. Without `url` and
        `api_key`, PLAUDIT_URL and PLAUDIT_API_KEY count."""
        given = {name: value for name, value in locals().items() if name != "self"}
        given["url"], given["api_key"] = resolve(url, api_key)
        self.__setstate__(Settings(**{**given, "include": tuple(include)}))

    @property
    def settings(self) -> Settings:
        return self._core.settings

    def with_options(self, **changes: Any) -> Self:
        """The same client with other `Settings`. Connections and slots are shared with this one and, unless another
        model may answer, what is known of the servers and what is pinned."""
        other = object.__new__(type(self))
        other.__setstate__(dataclasses.replace(self.settings, **changes))
        other._lines = self._lines
        if not changes.keys() & {"url", "model", "revision", "pin"}:
            other._core.endpoints = self._core.endpoints
        return other

    def __getstate__(self) -> Settings:
        return self.settings

    def __setstate__(self, settings: Settings) -> None:
        self._core = Core(settings)
        self._lines = self._store()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings})"
