"""Engines with real workers, what they are asked, and what the model itself says to that."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from plaudit_server.domain import Scored, Work
from plaudit_server.engine import BatchReport, Engine, EngineSettings
from plaudit_server.worker import WorkerHost

Oracle = Callable[[list[Work]], list[float]]


@dataclass
class Recorder:
    """An observer that remembers."""

    batches: list[BatchReport] = field(default_factory=list)
    reused: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    wasted: int = 0

    def batch_done(self, report: BatchReport) -> None:
        self.batches.append(report)

    def item_reused(self, source: Literal["cache", "duplicate"], tokens: int) -> None:
        self.reused[source] += 1

    def tokens_wasted(self, tokens: int) -> None:
        self.wasted += tokens

    def item_failed(self, code: str) -> None:
        self.failed[code] += 1

    def worker_restarted(self) -> None:
        self.restarts += 1

    @property
    def computed(self) -> int:
        return sum(report.computed_tokens for report in self.batches)


@asynccontextmanager
async def running(directory: Path, host: WorkerHost, **settings: float | str) -> AsyncIterator[tuple[Engine, Recorder]]:
    recorder = Recorder()
    known = {"device": "cpu", "threads": 1, "token_budget": 600, **settings}
    engine = Engine(str(directory), EngineSettings(**known), recorder, host)  # type: ignore[arg-type]
    await engine.start()
    try:
        yield engine, recorder
    finally:
        await engine.close()


def samples(n: int, *, seed: int = 0, prompt: int = 100, response: int = 30, last: int | None = None) -> list[Work]:
    """`n` responses to one prompt; the last item may end in a certain token."""
    random = np.random.default_rng(seed)
    head = random.integers(5, 600, prompt, dtype=np.int32)
    tails = [random.integers(5, 600, random.integers(1, response + 1), dtype=np.int32) for _ in range(n)]
    work = [Work(np.concatenate([head, tail]), prompt) for tail in tails]
    if last is not None:
        work[-1].ids[-1] = last
    return work


async def scores(answers: list[asyncio.Future[Scored]]) -> list[float]:
    async with asyncio.timeout(60):
        return [answer.attributes[0] for answer in await asyncio.gather(*answers)]


async def outcomes(answers: list[asyncio.Future[Scored]]) -> list[Scored | BaseException]:
    async with asyncio.timeout(60):
        return await asyncio.gather(*answers, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < 60
        await asyncio.sleep(0.005)


@contextmanager
def stopped(engine: Engine) -> Iterator[int]:
    """The worker stands still, so that what it was given stays in flight."""
    pid = engine.worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        if engine.worker_pid == pid:
            os.kill(pid, signal.SIGCONT)


@contextmanager
def halted(host: WorkerHost) -> Iterator[None]:
    """What starts workers stands still, so that no worker is back before it was seen to be gone."""
    assert host._process is not None
    os.kill(host._process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(host._process.pid, signal.SIGCONT)
