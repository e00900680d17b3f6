"""The engine: what is submitted is scored, exactly once, whatever becomes of the workers.

One queue, and a lane with a worker for each device. The pump expires what is late and gives a free lane the next batch;
for each lane somebody takes answers in, and when its worker is lost puts what was in flight back and starts another.
What waits keeps waiting meanwhile, up to its deadline. Asleep, there is no worker: whoever shares the device has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

from .admission import Bounds
from .batcher import Batcher, BatchPolicy
from .cache import ScoreCache, ScoreKeys
from .domain import ModelInfo, Priority, Scored, Work
from .engine_errors import Asleep, Draining, Unavailable, WorkerFailed
from .engine_settings import EngineSettings
from .lane import Lane, Phase, choose
from .ledger import Ledger
from .messages import LoadOrder
from .observer import BatchReport, EngineObserver
from .worker import Worker, WorkerHost

__all__ = ["BatchReport", "Engine", "EngineObserver", "EngineSettings", "State"]

logger = logging.getLogger("plaudit.engine")

_RESPITE = 30.0
_NOBODY = f"no worker is running; another is tried every {_RESPITE:.0f} s"
_BROKEN = "the engine is broken: restart the server"

State = Literal["starting", "ready", "restarting", "asleep", "failed", "draining"]


class Engine:
    """One model behind a worker process for each device. All methods belong to the event loop that ran `start`.

    `host` is shared by engines that live beside each other and closed by whoever made it; None is one of its own.
    `info` and `lanes` are there once `start` has returned. `broken`: an error of its own has ended it.
    """

    info: ModelInfo
    _batcher: Batcher
    _ledger: Ledger

    def __init__(
        self, model: str, settings: EngineSettings, observer: EngineObserver, host: WorkerHost | None = None
    ) -> None:
        self._settings = settings
        self._orders = settings.orders(model)
        self._observer = observer
        self._host = host or WorkerHost(settings.wait)
        self._owns_host = host is None
        self.lanes: list[Lane] = []
        self.broken = False
        self._draining = False
        self._awake = True
        self._not_woken = ""
        self._bell = asyncio.Event()
        self._turned = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._attempts: set[asyncio.Task[Worker | None]] = set()

    async def start(self) -> ModelInfo:
        """Start the workers and wait until each has loaded the model and given a real score.

        Raises WorkerFailed with the reason; nothing is left running then.
        """
        try:
            workers = await self._host.launch_all(self._orders, self._settings.load_seconds)
        except BaseException:
            await self._close_host()
            raise
        first, devices = workers[0].info, [worker.info.device for worker in workers]
        self.info = dataclasses.replace(first, device=",".join(devices))
        self._prepare(first)
        self.lanes = [Lane(order, self._ledger, worker) for order, worker in zip(self._orders, workers, strict=True)]
        self._refit()
        self._tasks = [asyncio.create_task(self._pump()), asyncio.create_task(self._supervise())]
        for task in self._tasks:
            task.add_done_callback(self._stopped)
        return self.info

    def submit(
        self, work: Sequence[Work], *, deadline: float | None = None, priority: Priority = "interactive",
        client: str = "",
    ) -> list[asyncio.Future[Scored]]:  # fmt: skip
        """One future an item, in order. The request is taken whole or refused with Overloaded, TooLarge, Draining,
        Asleep or Unavailable. `deadline` is a moment of `time.monotonic()`; clients take turns. A future gives its
        item's scores or raises an EngineError; cancelling it withdraws the item."""
        if self._draining:
            raise Draining("the server is shutting down")
        self._require_worker()
        if not self._awake and priority == "interactive":
            raise Asleep("the model is asleep: ask again once it has been woken, or send work of the batch class")
        answers = self._ledger.submit(work, time.monotonic(), deadline, priority, client)
        self._bell.set()
        return answers

    @property
    def state(self) -> State:
        phase = self._phase
        if self._draining and phase != "failed":
            return "draining"
        return "asleep" if phase == "leaving" or (phase == "ready" and not self._awake) else phase

    @property
    def _phase(self) -> Phase | Literal["starting"]:
        """That of the lane that is best off."""
        phases = {lane.phase for lane in self.lanes}
        return next((phase for phase in get_args(Phase) if phase in phases), "starting")

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for a worker, a shared prompt counted in each item."""
        return self._ledger.queued_tokens if self.lanes else 0

    @property
    def token_budget(self) -> int:
        """Tokens of a batch: what was asked for, or what has turned out to fit into memory."""
        return self._batcher.token_budget if self.lanes else self._settings.token_budget

    @property
    def open_items(self) -> int:
        """Items that have no answer yet."""
        return self._ledger.items if self.lanes else 0

    @property
    def worker_pid(self) -> int | None:
        """Process id of the first worker that there is; None while there is none."""
        return next((lane.worker.pid for lane in self.lanes if lane.worker), None)

    async def sleep(self) -> None:
        """Finish interactive work and what runs, then end the workers: their memory is free when this returns, unless
        somebody called `wake` meanwhile. Batch work waits, up to its deadline; other work is refused with Asleep.
        Raises Unavailable."""
        self._require_worker()
        self._turn(awake=False)
        try:
            await self._until(lambda: self._awake or (self._phase == "asleep" and not self._attempts))
        except Unavailable:
            self._turn(awake=True)  # it is refused: no later worker shall fall asleep
            raise

    async def wake(self) -> None:
        """Start the workers with the same model; each has given a real score when this returns. Raises Unavailable, and
        WorkerFailed with the reason if one could not be started: the engine sleeps on then."""
        self._require_worker()
        self._turn(awake=True)
        await self._until(lambda: not self._awake or self._phase == "ready")
        if not self._awake:
            raise WorkerFailed(self._not_woken or "it was put to sleep again")

    async def drain(self, timeout: float) -> None:
        """Take nothing new and finish what was taken; after `timeout` seconds the rest is answered with Draining, and
        asleep at once."""
        self._draining, timeout = True, timeout * (self._phase != "asleep")
        if self.lanes and (answers := self._ledger.open):
            await asyncio.wait(answers, timeout=timeout)
            self._ledger.fail_all(Draining, "the server shut down before this item's turn came")

    async def close(self) -> None:
        """End the workers. Whatever has no answer yet is answered with Draining."""
        self._draining = True
        for task in self._tasks:
            task.remove_done_callback(self._stopped)
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.lanes:
            self._ledger.fail_all(Draining, "the server shut down before this item's turn came")
        await asyncio.gather(*(lane.worker.close() for lane in self.lanes if lane.worker))
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
            self._leave()
            await self._pause(now, self._dispatch(now))

    def _dispatch(self, now: float) -> float | None:
        """Seconds until there may be something to give out, or an expired job; None: not before something happens."""
        open_lanes = self.lanes if self._awake or self._ledger.urgent else []
        while True:
            lane, slot = choose(open_lanes)
            batch = self._batcher.next_batch(now, slot)
            if lane is None or batch is None:
                return self._batcher.wait(now, slot)
            lane.send(batch, now)

    @property
    def _at_rest(self) -> bool:
        """Asked to sleep, and nothing is left that cannot wait."""
        return not (self._awake or self._ledger.urgent or any(lane.flights for lane in self.lanes))

    def _leave(self) -> None:
        """At rest all workers leave, together; one that is being started is waited for."""
        if self._at_rest and not any(lane.phase == "restarting" for lane in self.lanes):
            for lane in self.lanes:
                if lane.phase == "ready":
                    lane.leave()

    async def _pause(self, now: float, seconds: float | None) -> None:
        """Until something happens, or until it is time for something."""
        waits = [seconds, *(lane.end_hang(now, self._settings.hang_seconds) for lane in self.lanes)]
        seconds = min((wait for wait in waits if wait is not None), default=None)
        timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, self._bell.set)
        await self._bell.wait()
        self._bell.clear()
        if timer:
            timer.cancel()

    async def _supervise(self) -> None:
        while True:
            async with asyncio.TaskGroup() as group:
                for lane in self.lanes:
                    group.create_task(self._serve(lane))
            await self._rouse([lane for lane in self.lanes if lane.phase == "asleep"])

    async def _serve(self, lane: Lane) -> None:
        """From one worker of a lane to the next, until one has left to sleep, or the others have and it has none."""
        while True:
            replacement = None
            if worker := lane.worker:
                await lane.collect(worker, self._refit)
                idle = not lane.flights
                lane.bury(worker)
                self._leave()
                if lane.phase == "leaving":
                    await worker.close()
                    await worker.ended()
                    return self._enter("asleep", [lane])
                self._enter("restarting", [lane])
                await worker.close()
                replacement = await lane.replace(self._launch, idle=idle)
            if not (replacement := replacement or await self._another(lane)):
                return
            self._take_on([lane], [replacement])
            self._observer.worker_restarted()

    async def _another(self, lane: Lane) -> Worker | None:
        """A worker for a lane that nobody waits for any more; None: the others have gone to sleep. What failed for a
        minute may be a file system or a neighbour on the device, and nobody is there to restart us."""
        logger.error("no worker can be kept on %s: another is tried every %.0f s", lane.device, _RESPITE)
        self._enter("failed", [lane])
        if self._phase == "failed":
            logger.critical("there is no worker at all: what waits and what comes is refused")
            self._ledger.fail_all(Unavailable, _NOBODY)
        while await self._due(time.monotonic() + _RESPITE):
            if replacement := await self._attempt(lane):
                return replacement
        return None

    @property
    def _wanted(self) -> bool:
        """Whether a worker more would be of use."""
        return self._awake or self._phase == "failed"

    async def _due(self, moment: float) -> bool:
        """Return at that moment, if another worker is wanted then; False once those that there are leave to sleep."""
        while self._phase not in ("leaving", "asleep"):
            seconds = moment - time.monotonic()
            if self._wanted and seconds <= 0:
                return True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds if self._wanted else None):
                    await self._turned.wait()
        return False

    async def _attempt(self, lane: Lane) -> Worker | None:
        """Try once to start a worker. Given up, and its memory free, as soon as the engine is to sleep."""
        attempt = asyncio.create_task(lane.attempt(self._launch))
        self._attempts.add(attempt)
        try:
            while not attempt.done():
                if not self._wanted:
                    attempt.cancel()
                turned = asyncio.create_task(self._turned.wait())
                await asyncio.wait((attempt, turned), return_when=asyncio.FIRST_COMPLETED)
                turned.cancel()
            return None if attempt.cancelled() else attempt.result()
        finally:
            attempt.cancel()
            await asyncio.gather(attempt, return_exceptions=True)
            self._attempts.discard(attempt)
            self._turn(self._awake)

    async def _rouse(self, lanes: list[Lane]) -> None:
        """Asleep until a `wake` succeeds, of all lanes or of none."""
        while True:
            self._enter("asleep", lanes)
            await self._until(lambda: self._awake)
            self._enter("restarting", lanes)
            try:
                return self._take_on(lanes, await self._launch([lane.order for lane in lanes]))
            except WorkerFailed as error:
                logger.error("the model could not be woken: %s", error)
                self._awake, self._not_woken = False, str(error)
                self._ledger.fail_all(Asleep, "the model could not be woken", "interactive")

    async def _launch(self, orders: Sequence[LoadOrder]) -> list[Worker]:
        try:
            return await self._host.launch_all(orders, self._settings.load_seconds, self.info)
        finally:
            self._bell.set()  # who has failed to come back is not waited for any longer

    def _take_on(self, lanes: Sequence[Lane], workers: Sequence[Worker]) -> None:
        for lane, worker in zip(lanes, workers, strict=True):
            lane.take_on(worker)
        self._enter("ready", lanes)

    def _refit(self) -> None:
        """Batches must fit every worker. Also wakes the pump."""
        lanes = [lane for lane in self.lanes if lane.phase != "failed"]
        caps = [lane.token_cap for lane in lanes if lane.token_cap is not None]
        budget = min([self._settings.token_budget, *caps])
        if budget < self.token_budget:
            logger.warning("out of memory: a batch holds %d tokens from now on", budget)
        self._ledger.limit(budget, len(lanes))
        self._bell.set()

    def _stopped(self, task: asyncio.Task[None]) -> None:
        """A task of ours ended by itself, with an error: nobody else would answer what waits, nor ever will."""
        if not task.cancelled():
            logger.critical("a task of the engine failed", exc_info=task.exception())
            for other in self._tasks:
                other.cancel()
            self.broken = True
            self._enter("failed", self.lanes)
            self._ledger.fail_all(Unavailable, _BROKEN)

    def _enter(self, phase: Phase, lanes: Iterable[Lane]) -> None:
        for lane in lanes:
            lane.phase = phase
        self._refit()
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
            raise Unavailable(_BROKEN if self.broken else _NOBODY)
