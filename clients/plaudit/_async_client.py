"""`AsyncClient`: carries out the plans of `_core.py` on the running event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast
from weakref import WeakKeyDictionary

from ._base import BaseClient
from ._plan import Gather, Heard, Plan, Send, Sleep, Step
from ._retry import Failure
from ._wire import Reply
from .types import Comparison, Item, Prompt, Ranking, ScoreResult, Scores, ServerInfo

if TYPE_CHECKING:
    from ._http import http

T = TypeVar("T")
Line = tuple["http.AsyncClient", asyncio.Semaphore]
"""Connections, and the slots of `_plan.Gather`."""


class AsyncClient(BaseClient):
    """The asynchronous client: the methods of `Client`, awaited. Use it with `async with`, or await `aclose`."""

    _store = WeakKeyDictionary
    _lines: WeakKeyDictionary[asyncio.AbstractEventLoop, Line]

    async def score(self, prompt: Prompt, response: str) -> ScoreResult:
        return await self._run(self._core.score(prompt, response))

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
        if line := self._lines.pop(asyncio.get_running_loop(), None):
            await line[0].aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def _run(self, plan: Plan[T]) -> T:
        heard = None
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

            opened = _http.http.AsyncClient(limits=_http.limits(self.settings))
            self._lines[loop] = line = opened, asyncio.Semaphore(self.settings.concurrency)
        return line

    async def _send(self, step: Send) -> Reply | Failure:
        from . import _http

        try:
            async with asyncio.timeout(step.seconds):
                response = await self._line()[0].request(**_http.call(self.settings, step.request, step.seconds))
                return _http.reply_of(response, response.content)
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
