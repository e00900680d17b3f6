"""`AsyncClient`: carries out the plans of `_core.py` on the running event loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast
from weakref import WeakKeyDictionary

from ._base import BaseClient
from ._coalesce import Collector, Outcomes
from ._items import Piece, pieces
from ._plan import Gather, Heard, Plan, Send, Sleep, Step
from ._retry import Failure
from ._settings import Settings
from ._wire import Reply
from .types import Comparison, Item, Prompt, Ranking, ScoreResult, Scores, ServerInfo

if TYPE_CHECKING:
    from ._aiohttp import Transport
    from ._http import http

T = TypeVar("T")
Line = tuple["http.AsyncClient | Transport", asyncio.Semaphore]
"""Connections, and the slots of `_plan.Gather`."""


class AsyncClient(BaseClient):
    """The asynchronous client: the methods of `Client`, awaited. Use it with `async with`, or await `aclose`."""

    _store = WeakKeyDictionary
    _lines: WeakKeyDictionary[asyncio.AbstractEventLoop, Line]
    _collectors: WeakKeyDictionary[asyncio.AbstractEventLoop, Collector]

    async def score(self, prompt: Prompt, response: str) -> ScoreResult:
        """Score one response. Calls that are made at the same time share requests (`coalesce`), nothing else."""
        return await self.score_item({"prompt": prompt, "response": response})

    async def score_item(self, item: Item) -> ScoreResult:
        """`score` for any native shape that has one response."""
        (piece,) = pieces([item])
        if self.settings.coalesce == 1 or not piece.flat:
            return await self._run(self._core.score_item(item))
        loop, timeout = asyncio.get_running_loop(), self.settings.timeout
        if (collector := self._collectors.get(loop)) is None:
            collector = self._collectors[loop] = Collector(self._carry, self.settings.coalesce)
        deadline = None if timeout is None else time.monotonic() + timeout
        return self._core.settled(await collector.score(piece, deadline))[0]

    async def score_iter(
        self, items: Iterable[Item] | AsyncIterable[Item], ahead: int = 1024
    ) -> AsyncGenerator[ScoreResult, None]:
        """The results of single responses in the order of `items`, as they come, at most `ahead` of them waiting.

        `index` counts the items. For results as soon as they are there, whatever their order, `asyncio.as_completed`
        over `score` does it.
        """
        window: deque[asyncio.Task[ScoreResult]] = deque()
        count = itertools.count()
        try:
            async for item in items if isinstance(items, AsyncIterable) else _as_async(items):
                if len(window) >= ahead:
                    yield replace(await window.popleft(), index=next(count))
                window.append(asyncio.ensure_future(self.score_item(item)))
            while window:
                yield replace(await window.popleft(), index=next(count))
        finally:
            for task in window:
                task.cancel()
            await asyncio.gather(*window, return_exceptions=True)

    async def score_responses(self, prompt: Prompt, responses: Sequence[str]) -> Scores:
        return await self._run(self._core.score_responses(prompt, responses))

    async def score_items(self, items: Iterable[Item]) -> Scores:
        return await self._run(self._core.score_items(items))

    async def rank(self, prompt: Prompt, responses: Sequence[str], top_n: int | None = None) -> Ranking:
        return await self._run(self._core.rank(prompt, responses, top_n))

    async def compare(self, prompt: Prompt, response_a: str, response_b: str) -> Comparison:
        return await self._run(self._core.compare(prompt, response_a, response_b))

    async def info(self) -> ServerInfo:
        return await self._run(self._core.info())

    async def models(self) -> tuple[str, ...]:
        return await self._run(self._core.models())

    async def wait_until_ready(self, timeout: float | None = 300.0) -> None:
        await self._run(self._core.wait_until_ready(timeout))

    async def aclose(self) -> None:
        """Close the connections of the running event loop. The client may be used again."""
        self._collectors.pop(asyncio.get_running_loop(), None)
        if line := self._lines.pop(asyncio.get_running_loop(), None):
            await line[0].aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    def __setstate__(self, settings: Settings) -> None:
        super().__setstate__(settings)
        self._collectors = WeakKeyDictionary()

    async def _carry(self, collected: list[Piece], deadline: float | None) -> Outcomes:
        return await self._run(self._core.score_apart(collected, deadline))

    async def _run(self, plan: Plan[T]) -> T:
        heard = None
        with contextlib.closing(plan):
            while True:
                try:
                    step = plan.send(cast(Heard, heard))
                except StopIteration as stop:
                    return cast(T, stop.value)
                heard = Heard(value=await self._perform(step), now=time.monotonic())

    async def _perform(self, step: Step) -> Any:
        match step:
            case Sleep(seconds):
                return await asyncio.sleep(seconds) if seconds else None
            case Send():
                return await self._send(step)
            case Gather(plans, deadline):
                return await self._gather(plans, deadline)

    def _line(self) -> Line:
        loop = asyncio.get_running_loop()
        if (line := self._lines.get(loop)) is None:
            from . import _http

            for other in filter(None, [reference() for reference in self._lines.keyrefs()]):
                if other.is_closed():  # its connections hold it, and both would stay for ever
                    self._lines.pop(other, None)
            opened = _http.open_async(self.settings)
            self._lines[loop] = line = opened, asyncio.Semaphore(self.settings.concurrency)
        return line

    async def _send(self, step: Send) -> Reply | Failure:
        from . import _http

        try:
            async with asyncio.timeout(step.seconds):
                call = _http.call(self.settings, step)
                async with self._line()[0].stream(**call, extensions={"trace": _http.watch_async}) as response:
                    if _http.stale(call, response.headers):
                        return _http.STALE  # unread, which closes the connection
                    return _http.reply_of(response, await response.aread())
        except TimeoutError:
            return Failure("timeout", "no complete answer in time")
        except _http.RequestError as error:
            return _http.failure_of_error(error)

    async def _in_slot(self, plan: Plan[T], deadline: float | None) -> T:
        slots, held = self._line()[1], False
        try:
            async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic())):
                held = await slots.acquire()
        except TimeoutError:
            pass  # the plan finds its deadline passed and says so
        try:
            return await self._run(plan)
        finally:
            if held:
                slots.release()

    async def _gather(self, plans: Sequence[Plan[Any]], deadline: float | None) -> list[Any]:
        if len(plans) < 2:
            return [await self._in_slot(plan, deadline) for plan in plans]
        tasks = [asyncio.ensure_future(self._in_slot(plan, deadline)) for plan in plans]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _as_async(items: Iterable[Item]) -> AsyncGenerator[Item, None]:
    for item in items:
        yield item
