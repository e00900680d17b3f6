"""Which jobs have run out of time."""

from __future__ import annotations

import heapq
from itertools import count

from .waiting import Job

_SLACK = 64


class Deadlines:
    """Jobs by deadline. Jobs that were answered first leave a husk in the heap; it is swept before husks
    outnumber jobs, so memory follows what waits and not what was served."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Job]] = []
        self._live: set[Job] = set()
        self._number = count()

    def add(self, job: Job) -> None:
        if job.deadline is not None:
            self._live.add(job)
            heapq.heappush(self._heap, (job.deadline, next(self._number), job))

    def discard(self, job: Job) -> None:
        self._live.discard(job)
        if len(self._heap) > 2 * len(self._live) + _SLACK:
            self._heap = [item for item in self._heap if item[2] in self._live]
            heapq.heapify(self._heap)

    def next(self) -> float | None:
        """The earliest deadline."""
        while self._heap and self._heap[0][2] not in self._live:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def expired(self, now: float) -> list[Job]:
        """Jobs whose deadline is not after `now`; they are forgotten."""
        jobs = []
        while (deadline := self.next()) is not None and deadline <= now:
            job = heapq.heappop(self._heap)[2]
            self._live.remove(job)
            jobs.append(job)
        return jobs
