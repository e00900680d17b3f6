"""Which of several servers gets the next request, and whose answers count. Times come in, decisions go out.

The one with the least outstanding work that is neither ejected nor known to serve something else. One that cannot be
reached, or says that it is full, is left alone for a while, longer each time; then one request tries it again. One
whose revision or numerics differ from the others' is treated the same: scores of two models must not be mixed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from dataclasses import dataclass, field, replace

from ._retry import Failure, full
from .types import Identity

LEFT_ALONE = (1.0, 30.0)
"""Seconds that a server is left alone after its first failure in a row, and at most."""

log = logging.getLogger("plaudit")


@dataclass(slots=True)
class _Endpoint:
    """What is known of one server in this process. `work`: items on their way; `back`: when it may be asked again."""

    url: str
    work: int = 0
    requests: int = 0
    failures: int = 0
    back: float = -float("inf")
    serves: Identity | None = None

    def open_at(self, now: float) -> bool:
        """Whether it may be asked: one that failed gets a single request to prove itself."""
        return now >= self.back and not (self.failures and self.requests)


@dataclass(slots=True)
class _Group:
    """The servers as this process knows them. Threads share it; a child process starts with its own."""

    endpoints: dict[str, _Endpoint]
    turn: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Endpoints:
    """The servers of one client. `revision` is pinned if given; `pin` holds on to what answers first."""

    def __init__(self, urls: tuple[str, ...], revision: str | None = None, pin: bool = False) -> None:
        self.urls = urls
        self._revision = revision
        self._pin = pin
        self._held: Identity | None = None
        self._groups: dict[int, _Group] = {}

    def take(self, now: float, tried: set[str], items: int, key: bytes | None = None) -> str:
        """The server for a request of so many items; `give` must follow. If none is open, the first to come back.
        With a key it is the same one for the same key, as long as the same ones are open (Thaler and Ravishankar,
        "Using name-based mappings to increase hit rates", 1998)."""
        with (group := self._group()).lock:
            group.turn += 1
            ring = list(group.endpoints.values())
            ring = ring[group.turn % len(ring) :] + ring[: group.turn % len(ring)]
            open_ones = [e for e in ring if e.open_at(now)]
            fresh = [e for e in open_ones if e.url not in tried] or open_ones
            if not fresh:
                chosen = min(ring, key=lambda e: e.back)
            elif key is None:
                chosen = min(fresh, key=lambda e: e.work)
            else:
                chosen = max(fresh, key=lambda e: hashlib.blake2b(key, key=e.url.encode()[:64]).digest())
            chosen.work += items
            chosen.requests += 1
            return chosen.url

    def give(self, url: str, items: int) -> None:
        """The request is over, however it ended."""
        with (group := self._group()).lock:
            endpoint = group.endpoints[url]
            endpoint.work, endpoint.requests = max(0, endpoint.work - items), max(0, endpoint.requests - 1)

    def heard(self, url: str, failure: Failure | None, now: float) -> None:
        """What became of a request: whether its server is left alone from now on."""
        with (group := self._group()).lock:
            endpoint = group.endpoints[url]
            if failure is None:
                endpoint.failures, endpoint.back = 0, -float("inf")
            elif failure.kind != "status" or full(failure):
                first, longest = LEFT_ALONE
                wait = min(longest, first * 2.0 ** min(endpoint.failures, 64))
                endpoint.back = now + (failure.retry_after or wait)
                endpoint.failures += 1
                if failure.kind == "connect":
                    endpoint.serves = None  # it may come back as something else

    def elsewhere(self, tried: set[str], now: float) -> bool:
        """Whether a server is open that has not been tried."""
        with (group := self._group()).lock:
            return any(e.open_at(now) for e in group.endpoints.values() if e.url not in tried)

    def objection(self, url: str, identity: Identity) -> Failure | None:
        """Why an answer of this identity does not count, None if it does.

        Without a pin a new revision counts as soon as no server is known to serve the old one; that is logged.
        """
        with (group := self._group()).lock:
            endpoint, held = group.endpoints[url], self._held
            news, endpoint.serves = endpoint.serves != identity, identity
            if self._revision is not None and identity.revision != self._revision:
                reason = f"revision {self._revision} is pinned"
            elif held in (None, identity):
                self._held = identity
                return None
            elif self._pin:
                reason = f"{held} answered first and is pinned"
            elif all(e.serves in (None, identity) for e in group.endpoints.values()):
                self._held = identity
                log.warning("%s now answers as %s, before as %s", url, identity, held)
                return None
            else:
                reason = f"the others answer as {held}"
            message = f"answers as {identity}, but {reason}"
            if news:
                log.warning("%s %s; its answers are not used", url, message)
            return Failure("identity", message)

    def all_object(self) -> bool:
        """Whether every server is known to serve something that does not count."""
        with (group := self._group()).lock:
            wanted = replace(self._held, revision=self._revision) if self._held and self._revision else self._held
            return all(e.serves not in (None, wanted) for e in group.endpoints.values())

    def _group(self) -> _Group:
        pid = os.getpid()
        if (group := self._groups.get(pid)) is None:
            fresh = _Group({url: _Endpoint(url) for url in self.urls})
            group = self._groups.setdefault(pid, fresh)
        return group
