"""A device that runs out of memory: real workers, in which the allocator fails above a number of tokens."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from plaudit_server.domain import Scored
from plaudit_server.engine_errors import OutOfMemory
from plaudit_server.faults import VARIABLE
from plaudit_server.worker import WorkerHost

from .engines import Oracle, halted, outcomes, running, samples, scores, until

pytestmark = pytest.mark.anyio

FITS = 170
"""Tokens."""


@pytest.fixture(scope="module")
async def small_host(anyio_backend: str, started_host: Callable[..., Any]) -> AsyncIterator[WorkerHost]:
    """Its workers cannot compute more than FITS tokens at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, f"oom_over_tokens:{FITS}")
        host = await started_host()
        yield host
        await host.close()


async def test_a_batch_that_does_not_fit_is_scored_in_parts_and_the_cap_is_learnt(
    tiny_model_dir: Path, small_host: WorkerHost, expected: Oracle, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tiny_model_dir, small_host, cache_bytes=0) as (engine, recorder):
        assert engine.token_budget == 600
        work = [item for seed in range(6) for item in samples(5, seed=seed)]
        assert await scores(engine.submit(work)) == expected(work)
        learnt = engine.token_budget
        assert FITS / 2 <= learnt <= FITS
        assert f"out of memory: a batch holds {learnt} tokens from now on" in caplog.text
        recorder.batches.clear()
        again = samples(9, seed=9)
        assert await scores(engine.submit(again)) == expected(again)
        assert max(report.computed_tokens for report in recorder.batches) <= FITS
        assert (recorder.restarts, recorder.failed, engine.token_budget) == (0, {}, learnt)


async def test_an_item_that_does_not_fit_alone_is_an_error_beside_its_neighbours(
    tiny_model_dir: Path, small_host: WorkerHost, expected: Oracle
) -> None:
    async with running(tiny_model_dir, small_host, cache_bytes=0) as (engine, recorder):
        large, [longest] = samples(4, seed=1), samples(1, seed=2, prompt=FITS)
        *answers, failed = await outcomes(engine.submit([*large, longest]))
        assert isinstance(failed, OutOfMemory) and not failed.retryable and failed.code == "out_of_memory"
        assert [answer.attributes[0] for answer in answers if isinstance(answer, Scored)] == expected(large)
        [alone] = await outcomes(engine.submit([longest]))
        assert isinstance(alone, OutOfMemory)
        assert recorder.failed == {"out_of_memory": 2}
        assert (recorder.restarts, engine.state) == (0, "ready")


async def test_a_new_worker_finds_out_for_itself(tiny_model_dir: Path, small_host: WorkerHost) -> None:
    """What was learnt may have been a neighbour's doing who is gone."""
    async with running(tiny_model_dir, small_host, cache_bytes=0) as (engine, _):
        await asyncio.gather(*engine.submit(samples(12, seed=3)))
        assert engine.token_budget < FITS
        assert engine.worker_pid is not None
        with halted(small_host):
            os.kill(engine.worker_pid, signal.SIGKILL)
            await until(lambda: engine.state != "ready")
        await until(lambda: engine.state == "ready")
        assert engine.token_budget == 600
