"""Every promise the engine has made and not kept yet. Each is kept exactly once: with a score or an error."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from plaudit_model.packing import Group

from .admission import Backlog, Bounds, Demand, Throughput, admit, item_bytes
from .batcher import Batcher
from .cache import ScoreCache, ScoreKeys
from .domain import Priority, Scored, Work
from .engine_errors import DeadlineExceeded, EngineError, NonFinite, OutOfMemory, ScoringFailed, WorkerCrashed
from .messages import Scores
from .observer import BatchReport, EngineObserver
from .waiting import Batch, Entry, Job

logger = logging.getLogger("plaudit.engine")

Answer = asyncio.Future[Scored]


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """A batch that a worker has, as it was sent."""

    batch: Batch
    groups: tuple[Group, ...]

    @property
    def tokens(self) -> int:
        """Tokens to compute."""
        return sum(group.tokens for group in self.groups)


class Ledger:
    """Owns the futures, the cache and the accounts; the batcher decides what is computed when."""

    def __init__(
        self, batcher: Batcher, cache: ScoreCache, keys: ScoreKeys, bounds: Bounds, observer: EngineObserver
    ) -> None:
        self._batcher = batcher
        self._cache = cache
        self._keys = keys
        self._bounds = bounds
        self._observer = observer
        self._throughput = Throughput(batcher.token_budget // 2)
        self._workers = 1
        self._answers: dict[Job, Answer] = {}
        self._bytes = 0

    @property
    def open(self) -> list[Answer]:
        """The futures that have no answer yet."""
        return list(self._answers.values())

    @property
    def items(self) -> int:
        """Items that have no answer yet."""
        return len(self._answers)

    @property
    def urgent(self) -> bool:
        """Whether somebody waits who is not of the batch class."""
        return any(job.priority == "interactive" for job in self._answers)

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for the worker, a shared prompt counted in each sequence."""
        return self._batcher.queued_tokens("interactive") + self._batcher.queued_tokens("batch")

    def submit(
        self, work: Sequence[Work], now: float, deadline: float | None, priority: Priority, client: str = ""
    ) -> list[Answer]:
        """One future an item, in order; all or none are taken. Raises Overloaded or TooLarge, and ValueError for
        what is no item: it would stop the engine later."""
        for item in work:
            if item.ids.dtype != np.int32 or item.ids.ndim != 1 or not 0 <= item.prompt_tokens <= len(item.ids) > 0:
                raise ValueError("an item is at least one token id (int32), with its prompt's tokens among them")
        keys = [self._keys.key(item) for item in work]
        known = [self._cache.get(key) for key in keys]
        unknown = [item for item, attributes in zip(work, known, strict=True) if attributes is None]
        if unknown:
            time_left = deadline - now if deadline is not None and deadline > now else None
            self._admit(unknown, time_left, priority, client)
        loop = asyncio.get_running_loop()
        answers = []
        size = sum(len(item.ids) for item in unknown)
        for item, key, attributes in zip(work, keys, known, strict=True):
            answer: Answer = loop.create_future()
            answers.append(answer)
            if attributes is not None:
                answer.set_result(_reused(item, attributes))
                self._observer.item_reused("cache", len(item.ids))
            else:
                self._promise(Job(item, key, priority, now, deadline, size, client), answer)
        return answers

    def expire(self, now: float) -> None:
        """Answer whoever has run out of time."""
        for job, started in self._batcher.expire(now):
            when = "while it was being computed" if started else "before its turn came"
            self._fail(job, DeadlineExceeded(f"the deadline passed {when}", started=started))

    def scored(self, flight: Flight, scores: Scores, now: float) -> None:
        """Hand out the scores of a batch."""
        logical = sum(entry.tokens for entry in flight.batch.entries)
        self._throughput.observe(flight.tokens, logical, scores.seconds)
        rows, unfit = enumerate(scores.attributes.tolist()), frozenset(scores.unfit)
        for family, group in zip(flight.batch.families, flight.groups, strict=True):
            for entry in family:
                row, attributes = next(rows)
                if row in unfit:
                    self.fail(entry, OutOfMemory, "this item does not fit into the device's memory, alone")
                elif all(map(math.isfinite, attributes)):
                    self._resolve(entry, tuple(attributes), len(group.prefix), scores.seconds, now)
                else:
                    self.fail(entry, NonFinite, "the model gives NaN or infinity for this item")
        computed = flight.tokens
        sequences, late = len(flight.batch.entries), len(scores.late_jit)
        self._observer.batch_done(BatchReport(sequences, computed, logical - computed, scores.seconds, late))

    def raised(self, flight: Flight) -> None:
        """The forward raised: what is to blame is found, and answered with ScoringFailed."""
        if culprit := self._batcher.failed(flight.batch):
            self.fail(culprit, ScoringFailed, "the model cannot compute this item")

    def lost(self, flight: Flight) -> None:
        """The worker died over it: what is to blame is found, and answered with WorkerCrashed."""
        self._observer.tokens_wasted(flight.tokens)
        if culprit := self._batcher.lost(flight.batch):
            self.fail(culprit, WorkerCrashed, "this item crashes the worker, alone")

    def put_back(self, flight: Flight) -> None:
        """The worker died before it began with it."""
        self._batcher.put_back(flight.batch)

    def limit(self, token_budget: int, workers: int) -> None:
        """Batches hold this many tokens from now on, and so many workers take them."""
        self._batcher.token_budget = token_budget
        self._throughput.full = token_budget // 2
        self._workers = workers

    def fail(self, entry: Entry, error: type[EngineError], message: str) -> None:
        """Answer everyone who waits for a sequence with an error."""
        for job in self._batcher.answered(entry):
            self._fail(job, error(message))

    def fail_all(self, error: type[EngineError], message: str, priority: Priority | None = None) -> None:
        """Answer everyone, or everyone of one class, with an error."""
        for job in [job for job in self._answers if priority in (None, job.priority)]:
            self._batcher.discard(job)
            self._fail(job, error(message))

    def _admit(self, work: Sequence[Work], time_left: float | None, priority: Priority, client: str) -> None:
        lengths = [len(item.ids) for item in work]
        first = self._batcher.queued_tokens("interactive") if priority == "batch" else 0
        ahead, share = first + self._batcher.queued_tokens(priority), self._batcher.share(priority, client)
        rate = (self._throughput.tokens_per_second or 0.0) * self._workers or None
        demand = Demand(len(work), sum(lengths), max(lengths))
        admit(demand, Backlog(ahead, self._bytes, *share, first), self._bounds, rate, time_left)

    def _promise(self, job: Job, answer: Answer) -> None:
        self._answers[job] = answer
        self._bytes += item_bytes(len(job.work.ids))
        answer.add_done_callback(partial(self._cancelled, job))
        if self._batcher.add(job):
            self._observer.item_reused("duplicate", len(job.work.ids))

    def _cancelled(self, job: Job, answer: Answer) -> None:
        """The client is gone. (Also called for answers that were given, which `_take` has struck off already.)"""
        if job in self._answers:
            self._take(job)
            self._batcher.discard(job)

    def _resolve(self, entry: Entry, attributes: tuple[float, ...], shared: int, seconds: float, now: float) -> None:
        self._cache.put(entry.key, attributes)
        jobs = self._batcher.answered(entry)
        if not jobs:
            self._observer.tokens_wasted(entry.tokens - shared)
        for number, job in enumerate(jobs):
            waited = max(now - job.arrived - seconds, 0.0)
            scored = Scored(attributes, entry.tokens, shared, number > 0, waited, seconds)
            answer = self._take(job)
            if not answer.done():
                answer.set_result(scored)

    def _fail(self, job: Job, error: EngineError) -> None:
        answer = self._take(job)
        if not answer.done():
            answer.set_exception(error)
            self._observer.item_failed(error.code)

    def _take(self, job: Job) -> Answer:
        self._bytes -= item_bytes(len(job.work.ids))
        return self._answers.pop(job)


def _reused(work: Work, attributes: tuple[float, ...]) -> Scored:
    return Scored(attributes, len(work.ids), 0, True, 0.0, 0.0)
