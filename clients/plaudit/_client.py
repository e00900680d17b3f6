"""`Client`: carries out the plans of `_core.py` with blocking calls."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from ._base import BaseClient
from ._plan import Gather, Heard, Plan, Send, Sleep, Step
from ._retry import Failure
from ._settings import Settings
from ._wire import Reply
from .types import Comparison, Item, Prompt, Ranking, ScoreResult, Scores, ServerInfo

if TYPE_CHECKING:
    from ._http import http

T = TypeVar("T")
Line = tuple["http.Client", threading.Semaphore]
"""Connections, and the slots of `_plan.Gather`."""


class Client(BaseClient):
    """A synchronous client. Use it as a context manager, or call `close`.

    with Client("http://127.0.0.1:8000") as client:
        client.wait_until_ready()
        float(client.score("What is 2+2?", "4"))
    """

    _store = dict  # by process id: what a parent opened is never used in its child
    _lines: dict[int, Line]

    def score(self, prompt: Prompt, response: str) -> ScoreResult:
        """Score one response; `float(result)` is the number."""
        return self._run(self._core.score(prompt, response))

    def score_item(self, item: Item) -> ScoreResult:
        """`score` for any native shape that has one response."""
        return self._run(self._core.score_item(item))

    def score_responses(self, prompt: Prompt, responses: Sequence[str]) -> Scores:
        """Score several responses to one prompt, which is then computed once where the model allows it."""
        return self._run(self._core.score_responses(prompt, responses))

    def score_items(self, items: Iterable[Item]) -> Scores:
        """Score any number of items of any native shape; cut by the server's limits, joined in order."""
        return self._run(self._core.score_items(items))

    def rank(self, prompt: Prompt, responses: Sequence[str], top_n: int | None = None) -> Ranking:
        """Score the responses and sort them, best first. Equal scores keep the order of the input."""
        return self._run(self._core.rank(prompt, responses, top_n))

    def compare(self, prompt: Prompt, response_a: str, response_b: str) -> Comparison:
        """The probability that response A is better than response B."""
        return self._run(self._core.compare(prompt, response_a, response_b))

    def info(self) -> ServerInfo:
        """What is served, how it computes, and the limits of a request."""
        return self._run(self._core.info())

    def models(self) -> tuple[str, ...]:
        """The models that are served."""
        return self._run(self._core.models())

    def wait_until_ready(self, timeout: float | None = 300.0) -> None:
        """Return as soon as a real score has passed through the server. Raises TimedOut after `timeout` seconds."""
        self._run(self._core.wait_until_ready(timeout))

    def close(self) -> None:
        """Close this process's connections. The client may be used again; it then opens new ones."""
        if line := self._lines.pop(os.getpid(), None):
            line[0].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(self, plan: Plan[T]) -> T:
        conductor = _Conductor(self.settings, *self._line())
        try:
            return conductor.run(plan)
        finally:
            conductor.over = True

    def _line(self) -> Line:
        if (line := self._lines.get(os.getpid())) is None:
            from . import _http

            opened = _http.http.Client(limits=_http.limits(self.settings))
            line = self._lines.setdefault(os.getpid(), (opened, threading.Semaphore(self.settings.concurrency)))
        return line


class _Conductor:
    """Carries out the plans of one call. Once the call is `over`, threads that still work for it stop at their
    next step: they neither try again nor open a connection that nobody would close."""

    def __init__(self, settings: Settings, http_client: http.Client, slots: threading.Semaphore) -> None:
        self._settings = settings
        self._http = http_client
        self._slots = slots
        self.over = False

    def run(self, plan: Plan[T]) -> T:
        heard = None
        with contextlib.closing(plan):
            while not self.over:
                try:
                    step = plan.send(cast(Heard, heard))
                except StopIteration as stop:
                    return cast(T, stop.value)
                heard = Heard(value=self._perform(step), now=time.monotonic())
        raise InterruptedError("the call is over")

    def _perform(self, step: Step) -> Any:
        match step:
            case Sleep(seconds):
                return time.sleep(seconds) if seconds else None
            case Send():
                return self._send(step)
            case Gather(plans, deadline):
                return self._gather(plans, deadline)

    def _send(self, step: Send) -> Reply | Failure:
        from . import _http

        ends = time.monotonic() + step.seconds
        call = _http.call(self._settings, step)
        try:
            with self._http.stream(**call, extensions={"trace": _http.watch}) as response:
                if _http.stale(call, response.headers):
                    return _http.STALE  # unread, which closes the connection
                body = []
                for part in response.iter_bytes():
                    body.append(part)
                    if time.monotonic() > ends:
                        return Failure("timeout", "the answer was still coming when the time was up")
                return _http.reply_of(response, b"".join(body))
        except _http.RequestError as error:
            return _http.failure_of_error(error)

    def _in_slot(self, plan: Plan[T], deadline: float | None) -> T:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        held = self._slots.acquire(timeout=left)
        try:
            return self.run(plan)
        finally:
            if held:
                self._slots.release()

    def _gather(self, plans: Sequence[Plan[Any]], deadline: float | None) -> list[Any]:
        """Daemon threads: an interrupted caller does not wait for requests whose answers nobody wants."""
        if len(plans) < 2:
            return [self._in_slot(plan, deadline) for plan in plans]
        todo = deque(enumerate(plans))
        done: SimpleQueue[tuple[int, Any, BaseException | None]] = SimpleQueue()

        def work() -> None:
            while todo and not self.over:
                try:
                    index, plan = todo.popleft()
                except IndexError:
                    return
                try:
                    done.put((index, self._in_slot(plan, deadline), None))
                except BaseException as error:  # raised again in the caller's thread
                    done.put((index, None, error))

        for _ in range(min(len(plans), self._settings.concurrency)):
            threading.Thread(target=work, daemon=True, name="plaudit-client").start()
        results: list[Any] = [None] * len(plans)
        for _ in plans:
            index, result, error = done.get()
            if error is not None:
                raise error
            results[index] = result
        return results
