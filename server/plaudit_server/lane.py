"""A lane: one device, the worker on it, and the batches that this worker has.

Lanes take their work from one queue and owe their answers to one ledger. None knows of the others, nor why it is given
a batch, told to leave or taken back; `choose` says which of them takes the next batch.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal

from . import messages
from .batcher import Slot
from .engine_errors import WorkerFailed
from .ledger import Flight, Ledger
from .link import Frame, LinkError
from .messages import Failure, LoadOrder
from .supervision import RestartPolicy
from .waiting import Batch
from .worker import Worker

logger = logging.getLogger("plaudit.engine")

Phase = Literal["ready", "restarting", "leaving", "asleep", "failed"]
Launch = Callable[[Sequence[LoadOrder]], Awaitable[list[Worker]]]

_SHORT_BATCH = 0.1
"""Seconds. Behind a batch shorter than this the next full one is sent ahead, so that the worker finds it when it is
done, or launches it while its device is busy. Where batches take longer the gap does not show, and urgent work had
better not wait for two."""


class Lane:
    """Begins with a worker that is ready. `flights` are the batches that it has; the first of them has run since
    `since`, a moment of `time.monotonic()`. `token_cap`: what it has found to fit into memory, in tokens."""

    def __init__(self, order: LoadOrder, ledger: Ledger, worker: Worker) -> None:
        self.order, self._ledger = order, ledger
        self.flights: deque[Flight] = deque()
        self.since = 0.0
        self._last_seconds = float("inf")
        self._restarts = RestartPolicy()
        self.take_on(worker)

    def take_on(self, worker: Worker) -> None:
        """Go on with a worker. What another has learnt may have been of its moment."""
        self.worker: Worker | None = worker
        self.device = worker.info.device
        self.phase: Phase = "ready"
        self.token_cap: int | None = None

    @property
    def suspect(self) -> bool:
        """Whether its worker may be about to die: what it computes has been lost, or has raised, before."""
        return bool(self.flights) and self.flights[0].batch.suspect

    @property
    def ahead(self) -> bool:
        """Whether it may be given a batch beside the one that it computes."""
        return len(self.flights) == 1 and not self.suspect and self._last_seconds < _SHORT_BATCH

    @property
    def returning(self) -> bool:
        """Lost its worker over a batch, and has not failed to start another yet."""
        return self.phase == "restarting" and not self._restarts.streak

    def send(self, batch: Batch, now: float) -> None:
        """Give the worker a batch."""
        assert self.worker is not None
        flight = Flight(batch, batch.groups())
        if not self.flights:
            self.since = now
        self.flights.append(flight)
        self.worker.send(flight.groups)

    def end_hang(self, now: float, hang_seconds: float) -> float | None:
        """Kill the worker if a batch has run for too long. Seconds until it will have; None: nothing runs."""
        if not (self.worker and self.flights):
            return None
        if now >= self.since + hang_seconds:
            logger.error("a batch has run for %.0f s; its worker is killed", now - self.since)
            self.worker.kill()
            self.since = now
        return self.since + hang_seconds - now

    async def collect(self, worker: Worker, answered: Callable[[], None]) -> None:
        """Take answers in until the worker is gone; call `answered` after each."""
        try:
            while (frame := await worker.receive()) is not None:
                self.answer(frame)
                answered()
        except LinkError as error:
            logger.error("the worker talks nonsense and is killed: %s", error)
            worker.kill()

    def answer(self, frame: Frame) -> None:
        """What the worker says of the oldest flight. Raises LinkError."""
        if not self.flights:
            raise LinkError("an answer came back to nothing")
        flight = self.flights[0]
        answer = messages.reply(frame, len(flight.batch.entries))
        self.flights.popleft()
        self.since = now = time.monotonic()
        self._restarts.served()
        if isinstance(answer, Failure):
            logger.error("the forward raised: %s", answer.reason)
            self._ledger.raised(flight)
            return
        for kernel in answer.late_jit:
            rows = len(flight.batch.entries)
            logger.warning("compiled while %d sequences, %d tokens waited: %s", rows, flight.tokens, kernel)
        self._last_seconds, self.token_cap = answer.seconds, answer.token_cap
        self._ledger.scored(flight, answer, now)

    def leave(self) -> None:
        """Have the worker exit, idle as it is, if it has not done so already."""
        if self.worker:
            self.worker.leave()
        self.phase = "leaving"

    def bury(self, worker: Worker) -> None:
        """The worker is lost. Its first batch is under suspicion, a second one waits again: had that one been launched
        too and done it, it is the first when it is sent the next time."""
        if self.phase == "leaving":
            logger.info("worker %d put to sleep", worker.pid)
        else:
            logger.warning("worker %d is gone with %d batches in flight", worker.pid, len(self.flights))
        self.worker = None
        flights = list(self.flights)
        self.flights.clear()
        for flight in reversed(flights[1:]):
            self._ledger.put_back(flight)
        if flights:
            self._ledger.lost(flights[0])

    async def replace(self, launch: Launch, *, idle: bool) -> Worker | None:
        """Another worker for the one that died, `idle` or over a batch; None: it is hopeless for now."""
        delay = self._restarts.died(time.monotonic()) if idle else 0.0
        while delay is not None:
            await asyncio.sleep(delay)
            if worker := await self.attempt(launch):
                return worker
            delay = self._restarts.died(time.monotonic())
        return None

    async def attempt(self, launch: Launch) -> Worker | None:
        """A worker, if one can be started now."""
        try:
            return (await launch([self.order]))[0]
        except WorkerFailed as error:
            logger.error("the worker could not be started again: %s", error)
            return None


def choose(lanes: Sequence[Lane]) -> tuple[Lane | None, Slot]:
    """Who takes the next batch, and what it may be. Nobody is given a second one while somebody has none. What has
    ended two workers is kept from the last one standing, if others are coming back or are put to the same test."""
    ready = [lane for lane in lanes if lane.phase == "ready"]
    for idle in (lane for lane in ready if not lane.flights):
        others = [lane for lane in lanes if lane is not idle and (lane.phase == "ready" or lane.returning)]
        safe = not others or any(lane.phase == "ready" and not lane.suspect for lane in others)
        return idle, "idle" if safe else "spared"
    ahead = min((lane for lane in ready if lane.ahead), key=lambda lane: lane.since, default=None)
    return ahead, "ahead" if ahead else "none"
