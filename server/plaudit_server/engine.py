"""The engine: what is submitted is scored, exactly once, whatever becomes of the worker.

Two tasks share one event loop. The pump expires what is late and gives the worker its next batch; the
supervisor takes answers in, and when the worker is lost it puts what was in flight back and starts another.
What waits keeps waiting meanwhile, up to its deadline. Asleep, there is no worker: whoever shares the device has it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from . import messages
from .admission import Bounds
from .batcher import Batcher, BatchPolicy, Slot
from .cache import ScoreCache, ScoreKeys
from .domain import ModelInfo, Priority, Scored, Work
from .engine_errors import (
    Asleep,
    Draining,
    EngineError,
    ScoringFailed,
    Unavailable,
    WorkerCrashed,
    WorkerFailed,
)
from .engine_settings import EngineSettings
from .ledger import Flight, Ledger
from .link import Frame, LinkError
from .messages import Failure, LoadOrder
from .observer import BatchReport, EngineObserver
from .supervision import RestartPolicy
from .waiting import Entry
from .worker import Worker, WorkerHost

__all__ = ["BatchReport", "Engine", "EngineObserver", "EngineSettings", "State"]

logger = logging.getLogger("plaudit.engine")

Phase = Literal["starting", "ready", "restarting", "asleep", "failed"]
State = Phase | Literal["draining"]

_SHORT_BATCH = 0.05
"""Seconds. Behind a batch shorter than this the next full one is sent ahead, so that the worker finds it when
it is done. Where batches take longer the gap does not show, and urgent work had better not wait for two."""


class Engine:
    """One model behind one worker process. All methods belong to the event loop that ran `start`.

    `host` is shared by engines that live beside each other and closed by whoever made it; None is one of its own.
    `info` is there once `start` has returned.
    """

    info: ModelInfo
    _batcher: Batcher
    _ledger: Ledger

    def __init__(
        self, model: str, settings: EngineSettings, observer: EngineObserver, host: WorkerHost | None = None
    ) -> None:
        self._settings = s = settings
        self._order = LoadOrder(model, s.device, s.dtype, s.mode, s.threads, s.token_budget, s.cpus, s.memory_cap)
        self._observer = observer
        self._host = host or WorkerHost(settings.wait)
        self._owns_host = host is None
        self._worker: Worker | None = None
        self._restarts = RestartPolicy()
        self._running: deque[Flight] = deque()
        self._running_since = 0.0
        self._last_seconds = float("inf")
        self._phase: Phase = "starting"
        self._draining = False
        self._awake = True
        self._not_woken = ""
        self._bell = asyncio.Event()
        self._turned = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> ModelInfo:
        """Start the worker and wait until it has loaded the model and given a real score.

        Raises WorkerFailed with the reason; nothing is left running then.
        """
        try:
            worker = await self._host.launch(self._order, self._settings.load_seconds)
        except BaseException:
            await self._close_host()
            raise
        self.info = worker.info
        self._prepare(worker.info)
        self._take_on(worker)
        self._tasks = [asyncio.create_task(self._pump()), asyncio.create_task(self._supervise(worker))]
        for task in self._tasks:
            task.add_done_callback(self._stopped)
        return worker.info

    def submit(
        self, work: Sequence[Work], *, deadline: float | None = None, priority: Priority = "interactive"
    ) -> list[asyncio.Future[Scored]]:
        """One future an item, in order. The request is taken whole or refused with Overloaded, TooLarge, Draining,
        Asleep or Unavailable. `deadline` is a moment of `time.monotonic()`. A future gives its item's scores or raises
        an EngineError; cancelling it withdraws the item."""
        if self._draining:
            raise Draining("the server is shutting down")
        self._require_worker()
        if not self._awake and priority == "interactive":
            raise Asleep("the model is asleep: ask again once it has been woken, or send work of the batch class")
        answers = self._ledger.submit(work, time.monotonic(), deadline, priority)
        self._bell.set()
        return answers

    @property
    def state(self) -> State:
        if self._draining and self._phase != "failed":
            return "draining"
        return self._phase if self._awake or self._phase != "ready" else "asleep"

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for the worker, a shared prompt counted in each item."""
        return 0 if self._phase == "starting" else self._ledger.queued_tokens

    @property
    def token_budget(self) -> int:
        """Tokens of a batch: what was asked for, or what has turned out to fit into memory."""
        return self._settings.token_budget if self._phase == "starting" else self._batcher.token_budget

    @property
    def open_items(self) -> int:
        """Items that have no answer yet."""
        return 0 if self._phase == "starting" else self._ledger.items

    @property
    def worker_pid(self) -> int | None:
        """Process id of the worker; None while there is none."""
        return self._worker.pid if self._worker else None

    async def sleep(self) -> None:
        """Finish interactive work and what runs, then end the worker: its memory is free when this returns, unless
        somebody called `wake` meanwhile. Batch work waits, up to its deadline; other work is refused with Asleep.
        Raises Unavailable."""
        self._require_worker()
        self._turn(awake=False)
        await self._until(lambda: self._awake or self._phase == "asleep")

    async def wake(self) -> None:
        """Start a worker with the same model; it has given a real score when this returns. Raises Unavailable, and
        WorkerFailed with the reason if it could not be started: the engine sleeps on then."""
        self._require_worker()
        self._turn(awake=True)
        await self._until(lambda: not self._awake or self._phase == "ready")
        if not self._awake:
            raise WorkerFailed(self._not_woken or "it was put to sleep again")

    async def drain(self, timeout: float) -> None:
        """Take nothing new and finish what was taken; after `timeout` seconds the rest is answered with Draining, and
        asleep at once."""
        self._draining, timeout = True, timeout * (self._phase != "asleep")
        if self._phase != "starting" and (answers := self._ledger.open):
            await asyncio.wait(answers, timeout=timeout)
            self._ledger.fail_all(Draining, "the server shut down before this item's turn came")

    async def close(self) -> None:
        """End the worker. Whatever has no answer yet is answered with Draining."""
        self._draining = True
        for task in self._tasks:
            task.remove_done_callback(self._stopped)
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._phase != "starting":
            self._ledger.fail_all(Draining, "the server shut down before this item's turn came")
        if self._worker is not None:
            await self._worker.close()
            self._worker = None
        await self._close_host()

    async def _close_host(self) -> None:
        if self._owns_host:
            await self._host.close()

    def _prepare(self, info: ModelInfo) -> None:
        s = self._settings
        policy = BatchPolicy(s.token_budget, s.max_wait_ms / 1e3, s.settle_ms / 1e3, s.look_ahead)
        self._batcher = Batcher(policy, share=info.shares_prompt)
        bounds = Bounds(s.queue_tokens, s.queue_bytes, info.max_length)
        cache = ScoreCache(s.cache_bytes)
        self._ledger = Ledger(self._batcher, cache, ScoreKeys(info), bounds, self._observer)

    async def _pump(self) -> None:
        while True:
            now = time.monotonic()
            self._ledger.expire(now)
            self._end_hang(now)
            self._dispatch(now)
            if self._worker and self._at_rest:
                self._worker.leave()
                self._worker = None
            await self._pause(now)

    def _dispatch(self, now: float) -> None:
        while self._worker and (batch := self._batcher.next_batch(now, self._slot())):
            flight = Flight(batch, batch.groups())
            if not self._running:
                self._running_since = now
            self._running.append(flight)
            self._worker.send(flight.groups)

    @property
    def _at_rest(self) -> bool:
        """Asked to sleep, and nothing is left that cannot wait."""
        return not self._awake and not self._running and not self._ledger.urgent

    def _slot(self) -> Slot:
        if self._worker is None or not (self._awake or self._ledger.urgent):
            return "none"
        if not self._running:
            return "idle"
        ahead = len(self._running) == 1 and not self._running[0].batch.suspect and self._last_seconds < _SHORT_BATCH
        return "ahead" if ahead else "none"

    def _end_hang(self, now: float) -> None:
        if self._worker and self._running and now >= self._running_since + self._settings.hang_seconds:
            logger.error("a batch has run for %.0f s; its worker is killed", now - self._running_since)
            self._worker.kill()
            self._running_since = now

    async def _pause(self, now: float) -> None:
        """Until something happens, or until it is time for something."""
        waits = [self._batcher.wait(now, self._slot())]
        if self._running:
            waits.append(self._running_since + self._settings.hang_seconds - now)
        seconds = min((wait for wait in waits if wait is not None), default=None)
        timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, self._bell.set)
        await self._bell.wait()
        self._bell.clear()
        if timer:
            timer.cancel()

    async def _supervise(self, worker: Worker | None) -> None:
        while worker is not None:
            await self._collect(worker)
            idle = not self._running
            await self._bury(worker)
            if self._at_rest:
                await worker.ended()
                self._take_on(worker := await self._woken())
            elif (worker := await self._replace(self._restarts.died(time.monotonic()) if idle else 0.0)) is not None:
                self._take_on(worker)
                self._observer.worker_restarted()
        self._give_up("the worker crashes again and again")

    async def _collect(self, worker: Worker) -> None:
        """Take answers in until the worker is gone."""
        try:
            while (frame := await worker.receive()) is not None:
                self._answer(frame)
                self._bell.set()
        except LinkError as error:
            logger.error("the worker talks nonsense and is killed: %s", error)
            worker.kill()

    def _answer(self, frame: Frame) -> None:
        if not self._running:
            raise LinkError("an answer came back to nothing")
        flight = self._running[0]
        answer = messages.reply(frame, len(flight.batch.entries))
        self._running.popleft()
        self._running_since = now = time.monotonic()
        self._restarts.served()
        if isinstance(answer, Failure):
            logger.error("the forward raised: %s", answer.reason)
            self._convict(self._batcher.failed(flight.batch), ScoringFailed, "the model cannot compute this item")
        else:
            for kernel in answer.late_jit:
                rows = len(flight.batch.entries)
                logger.warning("compiled while %d sequences, %d tokens waited: %s", rows, flight.tokens, kernel)
            self._last_seconds = answer.seconds
            if answer.token_cap is not None and answer.token_cap < self.token_budget:
                logger.warning("out of memory: a batch holds %d tokens from now on", answer.token_cap)
                self._ledger.limit(answer.token_cap)
            self._ledger.scored(flight, answer, now)

    async def _bury(self, worker: Worker) -> None:
        """The worker is lost. What it had begun is under suspicion, what it had not waits again."""
        level = logging.INFO if self._at_rest else logging.WARNING
        logger.log(level, "worker %d is gone with %d batches in flight", worker.pid, len(self._running))
        self._phase, self._worker = "restarting", None
        flights = list(self._running)
        self._running.clear()
        for flight in reversed(flights[1:]):
            self._batcher.put_back(flight.batch)
        if flights:
            self._observer.tokens_wasted(flights[0].tokens)
            self._convict(self._batcher.lost(flights[0].batch), WorkerCrashed, "this item crashes the worker, alone")
        await worker.close()

    def _convict(self, entry: Entry | None, error: type[EngineError], message: str) -> None:
        if entry is not None:
            self._ledger.fail(entry, error, message)

    async def _replace(self, delay: float | None) -> Worker | None:
        """Another worker with the same model, after `delay` seconds; None: it is time to give up."""
        while delay is not None:
            await asyncio.sleep(delay)
            try:
                return await self._relaunch()
            except WorkerFailed as error:
                logger.error("the worker could not be started again: %s", error)
            delay = self._restarts.died(time.monotonic())
        return None

    async def _woken(self) -> Worker:
        """Asleep until a `wake` succeeds."""
        while True:
            self._enter("asleep")
            await self._until(lambda: self._awake)
            self._enter("restarting")
            try:
                return await self._relaunch()
            except WorkerFailed as error:
                logger.error("the worker could not be woken: %s", error)
                self._awake, self._not_woken = False, str(error)
                self._ledger.fail_all(Asleep, "the model could not be woken", "interactive")

    async def _relaunch(self) -> Worker:
        worker = await self._host.launch(self._order, self._settings.load_seconds)
        if worker.info == self.info:
            return worker
        await worker.close()
        raise WorkerFailed("the model's files have changed since the server was started; restart it to serve them")

    def _take_on(self, worker: Worker) -> None:
        self._worker = worker
        self._enter("ready")
        self._ledger.limit(self._settings.token_budget)  # what another worker has learnt may have been of its moment
        self._bell.set()

    def _give_up(self, reason: str) -> None:
        logger.critical("the engine gives up: %s", reason)
        self._enter("failed")
        self._ledger.fail_all(Unavailable, "no worker is running")

    def _stopped(self, task: asyncio.Task[None]) -> None:
        """A task of ours ended by itself: with an error, nobody else would answer what waits."""
        if not task.cancelled() and task.exception() is not None:
            logger.critical("a task of the engine failed", exc_info=task.exception())
            for other in self._tasks:
                other.cancel()
            self._give_up("an error of its own")

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._turn(self._awake)

    def _turn(self, awake: bool) -> None:
        """Tell whoever waits in `_until`, and the pump."""
        self._awake, turned, self._turned = awake, self._turned, asyncio.Event()
        turned.set()
        self._bell.set()

    async def _until(self, true: Callable[[], bool]) -> None:
        while not true():
            await self._turned.wait()
            self._require_worker()

    def _require_worker(self) -> None:
        if self._phase in ("starting", "failed"):
            raise Unavailable("no worker is running")
