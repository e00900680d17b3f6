"""Who is let in. Pure: what waits, what is asked and how fast we are go in; nothing or a refusal comes out.

The bound in tokens looks at what already waits, not at the size of the request: while the queue is below it, one
more request is taken whole, large or small. So a burst of thousands of items stands the same chance as a
single one, and the bound is exceeded by at most one request. A queue that others have filled is not full for a client
that has less than its share, up to twice the bound: their turns come as often as its own. The bound in bytes keeps
memory in check and is never exceeded: close to it a large request is refused where a small one is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

from .engine_errors import Overloaded, TooLarge

_TOKEN_BYTES = 8
_ITEM_BYTES = 1500
"""What an item holds while it waits, besides its tokens (as ids and as a sort key): objects, future, heap slot."""

_LEAST_WAIT, _MOST_WAIT = 0.5, 60.0
_SMOOTHING = 0.2


@dataclass(frozen=True)
class Bounds:
    """`tokens`: of one class, waiting. `bytes`: of everything that has no answer yet. `item_tokens`: what the
    model takes at most."""

    tokens: int
    bytes: int
    item_tokens: int


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request asks for; `longest` is its longest item, in tokens."""

    items: int
    tokens: int
    longest: int

    @property
    def bytes(self) -> int:
        return item_bytes(self.tokens, self.items)


@dataclass(frozen=True, slots=True)
class Backlog:
    """`tokens` is what goes before or beside the request at most: `first` of them are of a class that does in any case,
    `own` of its class and client, one of `clients` that take turns. `bytes` is what is held altogether."""

    tokens: int
    bytes: int
    own: int
    clients: int = 1
    first: int = 0

    def until(self, tokens: int) -> int:
        """What will have been computed when so many more of the client's have been."""
        return min(self.tokens + tokens, self.first + self.clients * (self.own + tokens))


def item_bytes(tokens: int, items: int = 1) -> int:
    """An estimate of the memory that waiting items hold."""
    return items * _ITEM_BYTES + tokens * _TOKEN_BYTES


class Throughput:
    """Tokens answered per second of compute: an exponentially weighted mean of batches that computed at least
    `full` tokens. The time of a small batch is mostly overhead: it says nothing of what the worker can do. A
    shared prompt counts in each sequence, as it does in the queue."""

    def __init__(self, full: int) -> None:
        self.full = full
        self.tokens_per_second: float | None = None

    def observe(self, computed: int, tokens: int, seconds: float) -> None:
        """`computed` tokens went through the model in `seconds`, and answered `tokens` of the queue."""
        if computed < self.full:
            return
        rate = tokens / max(seconds, 1e-9)
        known = self.tokens_per_second
        self.tokens_per_second = rate if known is None else known + _SMOOTHING * (rate - known)


def admit(demand: Demand, backlog: Backlog, bounds: Bounds, rate: float | None, time_left: float | None) -> None:
    """Return if the request is let in, whole. `rate` is in tokens per second, `time_left` in seconds.

    Raises TooLarge for what can never fit, Overloaded at capacity or when the deadline cannot be met.
    """
    if demand.longest > bounds.item_tokens:
        raise TooLarge(f"an item has {demand.longest} tokens; the model takes {bounds.item_tokens}")
    if demand.bytes > bounds.bytes:
        raise TooLarge(f"the request would hold {demand.bytes} bytes; the queue may hold {bounds.bytes}: split it")
    full = backlog.until(0) >= bounds.tokens or backlog.tokens >= 2 * bounds.tokens
    if full or backlog.bytes + demand.bytes > bounds.bytes:
        raise Overloaded(f"the queue is full ({backlog.tokens} tokens wait)", _retry_after(backlog, bounds, rate))
    if backlog.tokens and rate and time_left is not None and backlog.until(demand.tokens) / rate > time_left:
        raise Overloaded("the queue is too long for this deadline", _retry_after(backlog, bounds, rate))


def _retry_after(backlog: Backlog, bounds: Bounds, rate: float | None) -> float:
    """Seconds until about half of the queue's bound is free again."""
    if not rate:
        return 1.0
    return min(max((backlog.tokens - bounds.tokens / 2) / rate, _LEAST_WAIT), _MOST_WAIT)
