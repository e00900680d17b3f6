from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fastapi import FastAPI, Request, Response

from plaudit_server import engine as engine_module
from plaudit_server import probe
from plaudit_server.domain import Scored, Work
from plaudit_server.engine import Engine, EngineSettings
from plaudit_server.engine_errors import (
    DeadlineExceeded,
    Draining,
    EngineError,
    NonFinite,
    Overloaded,
    ScoringFailed,
    TooLarge,
    Unavailable,
    WorkerCrashed,
    WorkerFailed,
)
from plaudit_server.messages import Scores, scores_frame
from plaudit_server.service import Service
from plaudit_server.worker import WorkerHost

from .engines import Oracle, Recorder, halted, outcomes, running, samples, scores, stopped, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The engine's, which is `ahead` of ours by so many seconds."""
    made = SimpleNamespace(ahead=0.0, monotonic=lambda: time.monotonic() + made.ahead)
    monkeypatch.setattr(engine_module, "time", made)
    return made


@pytest.fixture(scope="module")
async def started(tiny_model_dir: Path, host: WorkerHost) -> AsyncIterator[tuple[Engine, Recorder]]:
    """An engine without a cache, so that everything is computed."""
    async with running(tiny_model_dir, host, cache_bytes=0) as both:
        yield both


@pytest.fixture
def engine(started: tuple[Engine, Recorder]) -> Engine:
    return started[0]


@pytest.fixture
def recorder(started: tuple[Engine, Recorder]) -> Recorder:
    started[1].__init__()  # type: ignore[misc]
    return started[1]


async def test_a_score_does_not_depend_on_its_neighbours(engine: Engine, recorder: Recorder, expected: Oracle) -> None:
    work = [item for seed, prompt in enumerate((20, 100, 333)) for item in samples(7, seed=seed, prompt=prompt)]
    truth = expected(work)
    assert await scores(engine.submit(work)) == truth
    assert [await scores(engine.submit([item])) for item in work[::3]] == [[score] for score in truth[::3]]
    shuffled = np.random.default_rng(1).permutation(len(work)).tolist()
    answers = [engine.submit([work[i]], priority="batch" if i % 2 else "interactive")[0] for i in shuffled]
    assert await scores(answers) == [truth[i] for i in shuffled]
    assert sum(report.sequences for report in recorder.batches) == 2 * len(work) + len(work[::3])
    assert all(report.computed_tokens <= 600 for report in recorder.batches)


async def test_single_requests_for_one_prompt_cost_what_one_request_costs(engine: Engine, recorder: Recorder) -> None:
    work = samples(16, seed=3)
    await asyncio.gather(*engine.submit(work))
    grouped = recorder.computed
    recorder.batches.clear()
    answers = [engine.submit([item])[0] for item in work]
    assert all(answer.shared_tokens >= 100 for answer in await asyncio.gather(*answers))
    assert recorder.computed <= 1.3 * grouped
    assert sum(report.shared_tokens for report in recorder.batches) == sum(len(w.ids) for w in work) - recorder.computed


async def test_equal_items_in_flight_are_computed_once(engine: Engine, recorder: Recorder, expected: Oracle) -> None:
    work = samples(2, seed=4)
    with stopped(engine):
        first = engine.submit([work[0], work[1], work[0]])
        await until(lambda: engine.queued_tokens == 0)
        second = engine.submit([work[0]], priority="batch")
    answers = await asyncio.gather(*first, *second)
    truth = expected(work)
    assert [answer.attributes[0] for answer in answers] == [truth[0], truth[1], truth[0], truth[0]]
    assert [answer.cached for answer in answers] == [False, False, True, True]
    assert recorder.reused == {"duplicate": 2}
    assert sum(report.sequences for report in recorder.batches) == 2


async def test_what_is_cancelled_before_its_turn_is_not_computed(engine: Engine, recorder: Recorder) -> None:
    first, gone = samples(1, seed=5), samples(3, seed=6)
    with stopped(engine):
        running = engine.submit(first)
        await until(lambda: engine.queued_tokens == 0)
        waiting = engine.submit(gone)
        for answer in waiting:
            answer.cancel()
        await asyncio.sleep(0)
        assert (engine.queued_tokens, engine.open_items) == (0, 1)
    await asyncio.gather(*running)
    assert await scores(engine.submit(first))
    assert recorder.computed == 2 * len(first[0].ids)
    assert recorder.wasted == 0


async def test_what_is_cancelled_while_it_runs_is_counted_as_wasted(engine: Engine, recorder: Recorder) -> None:
    work = samples(1, seed=7)
    with stopped(engine):
        (answer,) = engine.submit(work)
        await until(lambda: engine.queued_tokens == 0)
        answer.cancel()
    await until(lambda: len(recorder.batches) == 1)
    assert recorder.wasted == len(work[0].ids)


async def test_a_deadline_is_kept_whether_the_item_waits_or_runs(
    engine: Engine, recorder: Recorder, clock: SimpleNamespace
) -> None:
    soon = time.monotonic() + 100
    with stopped(engine):
        running = engine.submit(samples(1, seed=8), deadline=soon)
        await until(lambda: engine.queued_tokens == 0)
        waiting = engine.submit(samples(1, seed=9), deadline=soon)
        late = engine.submit(samples(1, seed=10), deadline=time.monotonic() - 1)
        clock.ahead = 200
        patient = engine.submit(samples(1, seed=11), deadline=soon + 1000)
        failed = await outcomes([*waiting, *late, *running])
    assert [(type(error), getattr(error, "started", None)) for error in failed] == [
        (DeadlineExceeded, False), (DeadlineExceeded, False), (DeadlineExceeded, True),
    ]  # fmt: skip
    assert recorder.failed == {"deadline_exceeded": 3}
    assert len(await scores(patient)) == 1


@pytest.mark.parametrize("kills", [1, 3])
async def test_killing_the_worker_in_mid_batch_loses_nothing(
    engine: Engine, recorder: Recorder, expected: Oracle, kills: int
) -> None:
    """One kill is a batch run again. Three put its halves under suspicion, and acquit them."""
    work = [item for seed in range(12, 20) for item in samples(6, seed=seed)]
    answers: list[asyncio.Future[Scored]] = []
    engine.lanes[0]._last_seconds = 0.0  # batches are short: one is sent ahead
    for kill in range(kills):
        await until(lambda: engine.worker_pid is not None)
        with stopped(engine) as pid:
            answers = answers or engine.submit(work)
            await until(lambda kill=kill: len(engine.lanes[0].flights) == (1 if kill else 2))  # type: ignore[misc]
            os.kill(pid, signal.SIGKILL)
            await until(lambda pid=pid: engine.worker_pid != pid)  # type: ignore[misc]
        assert recorder.restarts <= kill + 1
    assert await scores(answers) == expected(work)
    assert (recorder.restarts, recorder.failed) == (kills, {})
    assert recorder.wasted > 0
    assert engine.state == "ready"


async def test_a_kernel_that_was_compiled_late_is_counted_and_named(
    host: WorkerHost, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tiny_model_dir, host, cache_bytes=0) as (engine, recorder):
        assert engine.worker_pid is not None
        os.kill(engine.worker_pid, signal.SIGSTOP)  # this answer is not the worker's: on a CPU it compiles nothing
        [answer] = engine.submit([Work(np.arange(5, 12, dtype=np.int32), 0)])
        await until(lambda: bool(engine.lanes[0].flights))
        engine.lanes[0].answer(scores_frame(Scores(np.ones((1, 1), np.float32), 0.1, ("norm._forward(rows: i32)",))))
        assert (await answer).attributes == (1.0,)
        os.kill(engine.worker_pid, signal.SIGKILL)
    assert recorder.batches[-1].late_jit == 1
    assert "compiled while 1 sequences, 7 tokens waited: norm._forward(rows: i32)" in caplog.text


async def test_work_is_held_while_the_worker_restarts(
    engine: Engine, recorder: Recorder, expected: Oracle, host: WorkerHost
) -> None:
    assert engine.worker_pid is not None
    work = samples(3, seed=15)
    with halted(host):
        os.kill(engine.worker_pid, signal.SIGKILL)
        await until(lambda: engine.state == "restarting")
        held = engine.submit(work)
        late = engine.submit(samples(1, seed=16), deadline=time.monotonic() + 0.05)
        assert isinstance((await outcomes(late))[0], DeadlineExceeded)
    assert await scores(held) == expected(work)
    assert recorder.restarts == 1


async def test_an_item_that_kills_the_worker_fails_alone(
    engine: Engine, recorder: Recorder, expected: Oracle, faults: dict[str, int]
) -> None:
    work = samples(5, seed=17, last=faults["exit_on_token"])
    *neighbours, poison = await outcomes(engine.submit(work))
    assert isinstance(poison, WorkerCrashed) and not poison.retryable
    assert [answer.attributes[0] for answer in neighbours if isinstance(answer, Scored)] == expected(work[:-1])
    assert recorder.restarts <= 2 + 3
    assert engine.state == "ready"


async def test_an_item_that_raises_fails_alone_and_costs_no_worker(
    engine: Engine, recorder: Recorder, expected: Oracle, faults: dict[str, int]
) -> None:
    work = samples(5, seed=18, last=faults["raise_on_token"])
    *neighbours, culprit = await outcomes(engine.submit(work))
    assert isinstance(culprit, ScoringFailed)
    assert "token" not in str(culprit)
    assert [answer.attributes[0] for answer in neighbours if isinstance(answer, Scored)] == expected(work[:-1])
    assert recorder.restarts == 0


async def test_no_nan_becomes_a_score(engine: Engine, recorder: Recorder, faults: dict[str, int]) -> None:
    *neighbours, broken = await outcomes(engine.submit(samples(4, seed=19, last=faults["nan_on_token"])))
    assert isinstance(broken, NonFinite)
    assert all(isinstance(answer, Scored) for answer in neighbours)
    assert recorder.failed == {"non_finite_score": 1}


async def test_a_full_queue_refuses_with_a_time_to_come_back(tiny_model_dir: Path, host: WorkerHost) -> None:
    async with running(tiny_model_dir, host, queue_tokens=1000, cache_bytes=0) as (engine, recorder):
        await asyncio.gather(*engine.submit(samples(1, seed=20)))
        with stopped(engine):
            large = engine.submit(samples(100, seed=21))
            with pytest.raises(Overloaded) as refused:
                engine.submit(samples(1, seed=22))
            assert 0 < refused.value.retry_after <= 60
            await until(lambda: bool(engine.lanes[0].flights))
            assert engine.queued_tokens > 1000
            with pytest.raises(Overloaded):
                engine.submit(samples(1, seed=22), priority="batch")
        assert len(await scores(large)) == 100
        assert len(await scores(engine.submit(samples(1, seed=22)))) == 1
        with pytest.raises(TooLarge):
            engine.submit([Work(np.zeros(engine.info.max_length + 1, np.int32), 0)])
        for nothing in (Work(np.zeros(0, np.int32), 0), Work(np.zeros(2, np.int64), 0), Work(np.zeros(2, np.int32), 3)):  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="int32"):
                engine.submit([nothing])
        assert (engine.queued_tokens, engine.open_items) == (0, 0)


async def test_a_cached_score_is_the_computed(tiny_model_dir: Path, host: WorkerHost, faults: dict[str, int]) -> None:
    async with running(tiny_model_dir, host) as (engine, recorder):
        work = samples(3, seed=23, last=faults["nan_on_token"])
        computed = await outcomes(engine.submit(work))
        again = await outcomes(engine.submit(work))
        fresh, cached = computed[0], again[0]
        assert isinstance(fresh, Scored) and isinstance(cached, Scored)
        assert (cached.attributes, cached.cached, fresh.cached) == (fresh.attributes, True, False)
        assert [isinstance(answer, NonFinite) for answer in (*computed, *again)] == [False, False, True] * 2
        assert recorder.reused == {"cache": 2}
        moved = [Work(work[0].ids, work[0].prompt_tokens - 1)]
        assert [answer.cached for answer in await asyncio.gather(*engine.submit(moved))] == [False]


async def test_a_worker_that_hangs_is_replaced(
    tiny_model_dir: Path, host: WorkerHost, faults: dict[str, int], clock: SimpleNamespace
) -> None:
    async with running(tiny_model_dir, host, hang_seconds=200.0) as (engine, recorder):
        stuck = engine.submit(samples(1, seed=24, last=faults["hang_on_token"]))
        for restarts in (0, 1):
            await until(lambda: recorder.restarts == restarts and bool(engine.lanes[0].flights))  # noqa: B023
            clock.ahead += 300
            engine._bell.set()
        assert isinstance((await outcomes(stuck))[0], WorkerCrashed)
        clock.ahead = 0
        assert recorder.restarts == 2 or engine.state == "restarting"
        assert len(await scores(engine.submit(samples(2, seed=24)))) == 2


async def test_in_a_crash_loop_work_is_refused_until_a_worker_stays(
    tiny_model_dir: Path, host: WorkerHost, expected: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_RESPITE", 0.5)
    async with running(tiny_model_dir, host) as (engine, recorder):
        for _ in range(4):
            engine.lanes[0]._restarts.died(time.monotonic())
        assert engine.worker_pid is not None
        os.kill(engine.worker_pid, signal.SIGKILL)
        await until(lambda: engine.state != "ready")
        held = await outcomes(engine.submit(samples(2, seed=25))) if engine.state == "restarting" else []
        assert all(isinstance(error, Unavailable) for error in held)
        await until(lambda: engine.state == "failed")
        with pytest.raises(Unavailable, match="another is tried every 30 s"):
            engine.submit(samples(1, seed=25))
        for turn in (engine.wake, engine.sleep):
            with pytest.raises(Unavailable):
                await turn()
        with halted(host):
            await until(lambda: bool(engine._attempts))
            assert engine.state == "failed", "until it has come"
        await until(lambda: engine.state == "ready")
        assert recorder.restarts == 1 and not engine.broken
        work = samples(2, seed=25)
        assert await scores(engine.submit(work)) == expected(work)


async def test_files_that_changed_are_not_served_until_they_are_back(
    tiny_model_dir: Path,
    host: WorkerHost,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(engine_module, "_RESPITE", 0.5)
    directory = tmp_path / "model"
    directory.mkdir()
    for path in tiny_model_dir.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    async with running(directory, host) as (engine, _):
        for _ in range(4):
            engine.lanes[0]._restarts.died(time.monotonic())
        contract = json.loads((directory / "reward.json").read_text())
        (directory / "reward.json").write_text(json.dumps(contract | {"max_length": 100}))
        with stopped(engine) as pid:
            answers = engine.submit(samples(1, seed=26))
            await until(lambda: bool(engine.lanes[0].flights))
            os.kill(pid, signal.SIGKILL)
            assert [type(error) for error in await outcomes(answers)] == [Unavailable]
        assert engine.state == "failed"
        for tries in (1, 2):
            await until(lambda: caplog.text.count("the model's files have changed") >= tries)  # noqa: B023
        (directory / "reward.json").write_text(json.dumps(contract))
        await until(lambda: engine.state == "ready")


async def livez(engine: Engine) -> Response:
    """What the probe says of a server with this engine."""
    app = FastAPI()
    app.state.service = Service(None, [SimpleNamespace(engine=engine)], None)  # type: ignore[arg-type]
    return await probe.livez(Request({"type": "http", "app": app}))


async def test_an_error_of_the_engines_own_is_final(
    tiny_model_dir: Path, host: WorkerHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tiny_model_dir, host) as (engine, _):
        assert (await livez(engine)).status_code == 200
        monkeypatch.setattr(engine._batcher, "next_batch", None)
        [error] = await outcomes(engine.submit(samples(1, seed=27)))
        assert isinstance(error, Unavailable) and "restart the server" in str(error)
        assert engine.broken and engine.state == "failed"
        assert (await livez(engine)).status_code == 503
        with pytest.raises(Unavailable, match="restart the server"):
            engine.submit(samples(1, seed=27))


async def test_draining_finishes_what_was_taken_and_takes_nothing_new(tiny_bert_dir: Path, host: WorkerHost) -> None:
    async with running(tiny_bert_dir, host) as (engine, recorder):
        assert engine.info.shares_prompt is False
        taken = engine.submit(samples(30, seed=26))
        drained = asyncio.ensure_future(engine.drain(60.0))
        await asyncio.sleep(0)
        assert engine.state == "draining"
        with pytest.raises(Draining):
            engine.submit(samples(1, seed=27))
        await drained
        assert all(answer.done() and not answer.exception() for answer in taken)
        assert [answer.result().shared_tokens for answer in taken] == [0] * 30
        assert (engine.queued_tokens, engine.open_items) == (0, 0)


@pytest.mark.parametrize("end", ["drain", "close"])
async def test_what_cannot_be_finished_is_answered(tiny_model_dir: Path, host: WorkerHost, end: str) -> None:
    async with running(tiny_model_dir, host) as (engine, _):
        with stopped(engine) as pid:
            answers = engine.submit(samples(3, seed=28))
            finish: Awaitable[None] = engine.drain(0.05) if end == "drain" else engine.close()
            await finish
            assert all(isinstance(error, Draining) and error.retryable for error in await outcomes(answers))
        os.kill(pid, signal.SIGKILL)


async def test_a_model_that_cannot_be_served_fails_the_start(tmp_path: Path, host: WorkerHost) -> None:
    engine = Engine(str(tmp_path / "nowhere"), EngineSettings(), Recorder(), host)
    assert engine.state == "starting"
    with pytest.raises(Unavailable):
        engine.submit(samples(1))
    with pytest.raises(WorkerFailed, match="nowhere"):
        await engine.start()
    await engine.close()
    assert issubclass(WorkerFailed, EngineError) and WorkerFailed.exit_code == 78
