"""Single calls of one event loop, collected into few requests.

There is no window to wait for: what is asked for in one turn of the loop leaves together at its end. Once `AHEAD`
such requests are on their way, callers are collected until one of them is back, so that requests grow with the load
and a single call on a quiet loop travels at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from ._items import Piece
from .errors import PlauditError
from .types import Scores

AHEAD = 8
"""Collected requests on their way at the same time."""

Outcomes = Sequence[Scores | PlauditError]


@dataclass(slots=True)
class _Caller:
    """Who waits for what. `together` is the request it left with, and those who share it."""

    piece: Piece
    deadline: float | None
    future: asyncio.Future[Scores]
    together: tuple[asyncio.Task[None], list[_Caller]] | None = None


class Collector:
    """`carry(pieces, deadline)` scores what was collected: at most `most` single responses, an outcome for each."""

    def __init__(self, carry: Callable[[list[Piece], float | None], Awaitable[Outcomes]], most: int) -> None:
        self._carry = carry
        self._most = most
        self._waiting: deque[_Caller] = deque()
        self._on_their_way: set[asyncio.Task[None]] = set()
        self._called = False

    async def score(self, piece: Piece, deadline: float | None) -> Scores:
        """The scores (one) of a single response. Raises PlauditError. A caller who leaves cancels nobody else."""
        loop = asyncio.get_running_loop()
        caller = _Caller(piece, deadline, loop.create_future())
        self._waiting.append(caller)
        self._soon(loop)
        try:
            return await caller.future
        except asyncio.CancelledError:
            if caller.together and all(other.future.cancelled() for other in caller.together[1]):
                caller.together[0].cancel()
            raise

    def _soon(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._waiting and not self._called:
            self._called = True
            loop.call_soon(self._send)

    def _send(self) -> None:
        self._called = False
        while self._waiting and len(self._on_their_way) < AHEAD:
            count = min(self._most, len(self._waiting))
            callers = [c for c in (self._waiting.popleft() for _ in range(count)) if not c.future.done()]
            if callers:
                self._depart(callers)

    def _depart(self, callers: list[_Caller]) -> None:
        task = asyncio.get_running_loop().create_task(self._travel(callers))
        self._on_their_way.add(task)
        task.add_done_callback(self._back)
        for caller in callers:
            caller.together = task, callers

    async def _travel(self, callers: list[_Caller]) -> None:
        """Whatever happens, every caller hears of it: nobody waits for a request that is no more."""
        outcomes: Sequence[Scores | Exception]
        try:
            outcomes = await self._carry([caller.piece for caller in callers], callers[0].deadline)
        except asyncio.CancelledError:
            for caller in callers:
                caller.future.cancel()
            raise
        except Exception as error:  # a bug of ours
            outcomes = [error] * len(callers)
        for caller, outcome in zip(callers, outcomes, strict=True):
            if caller.future.done():
                continue
            if isinstance(outcome, Exception):
                caller.future.set_exception(outcome)
            else:
                caller.future.set_result(outcome)

    def _back(self, task: asyncio.Task[None]) -> None:
        self._on_their_way.discard(task)
        self._soon(task.get_loop())
