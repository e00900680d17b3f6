"""Sleeping and waking: whoever shares the device has it meanwhile, and nobody who waits is forgotten."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from plaudit_server.domain import Scored
from plaudit_server.engine import Engine, EngineSettings
from plaudit_server.engine_errors import Asleep, DeadlineExceeded, Draining, Unavailable, WorkerFailed
from plaudit_server.worker import WorkerHost

from .engines import Oracle, Recorder, outcomes, running, samples, scores, stopped, until

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def started(tiny_model_dir: Path, host: WorkerHost) -> AsyncIterator[tuple[Engine, Recorder]]:
    async with running(tiny_model_dir, host, cache_bytes=0) as both:
        yield both


@pytest.fixture
async def engine(started: tuple[Engine, Recorder]) -> AsyncIterator[Engine]:
    """Awake, before and after."""
    started[1].__init__()  # type: ignore[misc]
    yield started[0]
    async with asyncio.timeout(60):
        await started[0].wake()


@pytest.fixture
def recorder(started: tuple[Engine, Recorder]) -> Recorder:
    return started[1]


async def test_sleep_ends_the_process_and_wake_brings_the_same_model_back(
    engine: Engine, recorder: Recorder, expected: Oracle, caplog: pytest.LogCaptureFixture
) -> None:
    info, pid = engine.info, engine.worker_pid
    assert pid is not None
    with caplog.at_level(logging.INFO, "plaudit.engine"):
        await engine.sleep()
    assert (engine.state, engine.worker_pid) == ("asleep", None)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert caplog.messages == [f"worker {pid} put to sleep"]
    status = Path(f"/proc/{pid}/stat")
    assert not status.exists() or ") Z " in status.read_text(), "it holds nothing any more"
    await engine.sleep()  # already
    await engine.wake()
    assert engine.state == "ready" and engine.worker_pid not in (None, pid)
    assert (engine.info.revision, engine.info.numerics) == (info.revision, info.numerics)
    await engine.wake()  # already
    work = samples(3, seed=30)
    assert await scores(engine.submit(work)) == expected(work)
    assert recorder.restarts == 0, "nobody was lost"


async def test_batch_work_waits_for_the_morning_and_other_work_is_refused(
    engine: Engine, recorder: Recorder, expected: Oracle
) -> None:
    await engine.sleep()
    work = samples(4, seed=31)
    with pytest.raises(Asleep):
        engine.submit(work)
    patient = engine.submit(work, priority="batch")
    late = engine.submit(samples(1, seed=32), priority="batch", deadline=time.monotonic() + 0.05)
    assert [type(error) for error in await outcomes(late)] == [DeadlineExceeded]
    assert engine.state == "asleep" and engine.open_items == 4
    await engine.wake()
    assert await scores(patient) == expected(work)


async def test_what_was_taken_is_finished_first_but_batch_work(
    engine: Engine, recorder: Recorder, expected: Oracle
) -> None:
    urgent, patient = [item for seed in (33, 34) for item in samples(9, seed=seed)], samples(9, seed=35)
    with stopped(engine):
        answers = engine.submit(urgent)
        waiting = engine.submit(patient, priority="batch")
        await until(lambda: bool(engine.lanes[0].flights))
        falling = asyncio.ensure_future(engine.sleep())
        await until(lambda: engine.state == "asleep")
        assert not falling.done()
        with pytest.raises(Asleep):
            engine.submit(samples(1, seed=36))
    await falling
    assert all(answer.done() for answer in answers)
    assert await scores(answers) == expected(urgent)
    assert engine.worker_pid is None
    await engine.wake()
    assert await scores(waiting) == expected(patient)


async def test_what_still_waits_for_company_is_finished_too(engine: Engine, expected: Oracle) -> None:
    work = samples(2, seed=42)
    answers = engine.submit(work)
    await engine.sleep()
    assert all(answer.done() for answer in answers)
    assert await scores(answers) == expected(work)


async def test_a_worker_that_dies_while_it_finishes_is_replaced_first(
    engine: Engine, recorder: Recorder, expected: Oracle
) -> None:
    work = samples(5, seed=37)
    with stopped(engine) as pid:
        answers = engine.submit(work)
        await until(lambda: bool(engine.lanes[0].flights))
        falling = asyncio.ensure_future(engine.sleep())
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: engine.worker_pid != pid)
    assert await scores(answers) == expected(work)
    async with asyncio.timeout(60):
        await falling
    assert (engine.state, engine.worker_pid, recorder.restarts) == ("asleep", None, 1)


async def test_a_sleep_that_is_called_off_returns(engine: Engine, expected: Oracle) -> None:
    work = samples(2, seed=38)
    with stopped(engine) as pid:
        answers = engine.submit(work)
        await until(lambda: bool(engine.lanes[0].flights))
        falling = asyncio.ensure_future(engine.sleep())
        await asyncio.sleep(0)
        await engine.wake()
        await falling
    assert (engine.state, engine.worker_pid) == ("ready", pid)
    assert await scores(answers) == expected(work)


async def test_a_model_that_cannot_be_woken_sleeps_on(tiny_model_dir: Path, host: WorkerHost, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_model_dir, directory)
    contract = directory / "reward.json"
    known = contract.read_text()
    async with running(directory, host) as (engine, _):
        await engine.sleep()
        for changed, why in (
            (json.dumps(json.loads(known) | {"max_length": 100}), "have changed"),
            ("{}", "reward.json"),
        ):
            contract.write_text(changed)
            held = engine.submit(samples(1, seed=39), priority="batch")
            with pytest.raises(WorkerFailed, match=why):
                await engine.wake()
            assert engine.state == "asleep"
        contract.write_text(known)
        await engine.wake()
        assert len(await scores(held)) == 1


async def test_leaving_does_not_wait_for_sleepers(tiny_model_dir: Path, host: WorkerHost) -> None:
    async with running(tiny_model_dir, host) as (engine, _):
        await engine.sleep()
        held = engine.submit(samples(2, seed=40), priority="batch")
        await engine.drain(1000.0)
        assert [type(error) for error in await outcomes(held)] == [Draining, Draining]


async def test_without_a_worker_there_is_nothing_to_switch(tiny_model_dir: Path, host: WorkerHost) -> None:
    engine = Engine(str(tiny_model_dir), EngineSettings(device="cpu"), Recorder(), host)
    for switch in (engine.sleep, engine.wake):
        with pytest.raises(Unavailable):
            await switch()
    await engine.start()
    answers = engine.submit(samples(1, seed=41))
    assert isinstance((await outcomes(answers))[0], Scored)
    await engine.close()
