"""One queue and several workers: who takes what, and that nothing is lost, doubled or changed, whoever answers."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from plaudit_server import engine as engine_module
from plaudit_server import messages
from plaudit_server.admission import Bounds
from plaudit_server.batcher import Batcher, BatchPolicy
from plaudit_server.cache import ScoreCache, ScoreKeys
from plaudit_server.domain import ModelInfo, Scored, Work
from plaudit_server.engine import Engine
from plaudit_server.engine_errors import Draining, Overloaded, Unavailable, WorkerCrashed, WorkerFailed
from plaudit_server.engine_settings import EngineSettings
from plaudit_server.lane import Lane, Phase, choose
from plaudit_server.ledger import Ledger
from plaudit_server.link import StreamLink
from plaudit_server.messages import LoadOrder, Scores
from plaudit_server.settings import SettingsError
from plaudit_server.supervision import RestartPolicy
from plaudit_server.worker import Worker, WorkerHost

from .engines import Oracle, Recorder, halted, outcomes, running, samples, scores, until

pytestmark = pytest.mark.anyio

TWO = "cpu,cpu"
INFO = ModelInfo("a", ("score",), "r", "n", "float32", "exact", "cpu", "torch", "packed", "shared", 512, 1, True)
NOBODY = 1 << 23
"""No process has such an id."""


class Bench:
    """Lanes whose workers' ends are held by the test, one ledger and one queue, which are ready for a batch at once."""

    def __init__(self) -> None:
        self.batcher = Batcher(BatchPolicy(token_budget=64, settle=0.0), share=True)
        bounds = Bounds(1 << 20, 1 << 30, 512)
        self.ledger = Ledger(self.batcher, ScoreCache(0), ScoreKeys(INFO), bounds, Recorder())
        self.numbers = count(5)
        self.lanes: list[Lane] = []
        self.workers: list[tuple[Worker, socket.socket]] = []

    async def add(self) -> Lane:
        self.lanes.append(Lane(LoadOrder("m", "cpu", None, None, None), self.ledger, await self.worker()))
        return self.lanes[-1]

    async def worker(self) -> Worker:
        ours, theirs = socket.socketpair()
        self.workers.append((Worker(await StreamLink.over(ours), NOBODY, INFO), theirs))
        return self.workers[-1][0]

    def work(self, n: int) -> list[asyncio.Future[Scored]]:
        """`n` new items that fill a batch each."""
        work = [Work(np.full(64, next(self.numbers), np.int32), 0) for _ in range(n)]
        return self.ledger.submit(work, 0.0, None, "interactive")

    def give(self) -> Lane | None:
        """The next batch to whoever is chosen; None if nobody is."""
        lane, slot = choose(self.lanes)
        batch = self.batcher.next_batch(1e9, slot)
        if lane is None or batch is None:
            return None
        lane.send(batch, time.monotonic())
        return lane

    def answer(self, lane: Lane, seconds: float = 0.0) -> None:
        rows = len(lane.flights[0].batch.entries)
        lane.answer(messages.scores_frame(Scores(np.full((rows, 1), 7.0, np.float32), seconds)))

    def die(self, lane: Lane) -> None:
        assert lane.worker is not None
        lane.bury(lane.worker)
        lane.phase = "restarting"


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    for worker, end in made.workers:
        await worker.close()
        end.close()


async def test_a_request_of_one_item_does_not_wait_for_all_of_one_that_came_before(bench: Bench) -> None:
    lane = await bench.add()
    long, short = bench.work(5), bench.work(1)
    for _ in range(3):
        assert bench.give() is lane
        bench.answer(lane)
    assert short[0].done() and [answer.done() for answer in long] == [True, True, False, False, False]


async def test_nobody_has_two_batches_while_somebody_has_none(bench: Bench) -> None:
    first, second, third = [await bench.add() for _ in range(3)]
    bench.work(9)
    assert [bench.give() for _ in range(4)] == [first, second, third, None], "nobody is known to be quick"
    for lane in (third, first):
        bench.answer(lane)  # within no time
        assert bench.give() is lane
    assert second.ahead is False
    bench.answer(second)
    assert bench.give() is second, "it has nothing to do, the others have one each"
    assert [bench.give() for _ in range(3)] == [third, first, second], "whose batch began first"
    assert (bench.give(), bench.batcher.queued_tokens("interactive")) == (None, 0)
    assert [len(lane.flights) for lane in bench.lanes] == [2, 2, 2]


async def test_what_a_lost_worker_had_is_taken_by_another(bench: Bench) -> None:
    first, second = [await bench.add() for _ in range(2)]
    answers = bench.work(2)
    for lane in (bench.give(), bench.give()):
        assert lane is not None
        bench.answer(lane)  # within no time: one more may be sent ahead
    answers += bench.work(3)
    assert [bench.give() for _ in range(4)] == [first, second, first, None]
    begun, waiting = first.flights
    bench.die(first)
    assert list(first.flights) == []
    assert bench.give() is None, "a suspect waits until somebody has nothing else"
    bench.answer(second)
    assert bench.give() is second and second.suspect
    assert second.flights[0].batch.entries == begun.batch.entries
    assert bench.give() is None, "and is alone"
    bench.answer(second)
    assert bench.give() is second and not second.suspect
    assert second.flights[0].batch.entries == waiting.batch.entries
    bench.answer(second)
    assert [answer.result().attributes for answer in answers] == [(7.0,)] * 5


@pytest.mark.parametrize(
    ("other", "why", "slot"),
    [
        ("ready", "", "idle"), ("ready", "suspect", "spared"), ("restarting", "", "spared"),
        ("restarting", "again", "idle"), ("failed", "", "idle"), ("asleep", "", "idle"),
    ],
)  # fmt: skip
async def test_the_last_one_standing_is_spared_what_has_ended_two(
    bench: Bench, other: Phase, why: str, slot: str
) -> None:
    one, another = await bench.add(), await bench.add()
    another.phase = other
    if why == "again":
        another._restarts.died(0.0)
    if why == "suspect":
        bench.work(1)
        batch = bench.batcher.next_batch(1e9, "idle")
        assert batch is not None
        another.send(dataclasses.replace(batch, suspect=True), 0.0)
    assert choose([another, one]) == ((another, "idle") if (other, why) == ("ready", "") else (one, slot))
    assert choose([one]) == (one, "idle"), "alone it takes everything, as ever"


@pytest.mark.parametrize("workers", [1, 2, 3])
async def test_one_that_kills_costs_no_more_workers_than_with_one_and_never_all_at_once_again(
    bench: Bench, workers: int
) -> None:
    """The poisoned item is among 16 of one batch; the others of the queue fill a batch each."""
    for _ in range(workers):
        await bench.add()
    prompt = np.arange(5, 45, dtype=np.int32)
    crowd = [Work(np.append(prompt, np.int32(100 + n)), 40) for n in range(16)]
    answers = bench.ledger.submit(crowd, 0.0, None, "interactive")
    innocent = bench.work(20)
    deaths, poison = 0, crowd[11]
    while not all(answer.done() for answer in (*answers, *innocent)):
        while bench.give():
            pass
        for lane in [lane for lane in bench.lanes if lane.flights]:
            if any(entry.work is poison for entry in lane.flights[0].batch.entries):
                bench.die(lane)
                deaths += 1
            else:
                bench.answer(lane)
        standing = sum(lane.phase == "ready" for lane in bench.lanes)
        assert standing or workers == 1 or deaths == 2
        down = next((lane for lane in bench.lanes if lane.phase == "restarting"), None)
        if down and (standing == 0 or bench.batcher.queued_tokens("interactive") == 0):  # restarts are slow
            down.take_on(await bench.worker())
    assert deaths == 2 + 4, "once more as it stood, then halved four times"
    failed = [answer.exception() for answer in (*answers, *innocent)]
    assert [type(error) for error in failed if error] == [WorkerCrashed]
    assert failed[11] is not None


async def test_a_deadline_that_two_can_meet_is_not_refused(bench: Bench) -> None:
    """One worker takes a second for 64 tokens, and as many wait."""
    lane = await bench.add()
    bench.work(1)
    assert bench.give() is lane
    bench.answer(lane, seconds=1.0)
    bench.work(1)
    work = [Work(np.full(64, 3, np.int32), 0)]
    with pytest.raises(Overloaded, match="deadline"):
        bench.ledger.submit(work, 0.0, 1.5, "interactive")
    bench.ledger.limit(64, workers=2)
    assert len(bench.ledger.submit(work, 0.0, 1.5, "interactive")) == 1


async def test_a_lane_that_died_idle_counts_its_own_deaths(bench: Bench) -> None:
    lane = await bench.add()
    tries = 0

    async def refuse(orders: object) -> list[Worker]:
        nonlocal tries
        tries += 1
        raise WorkerFailed("no")

    for _ in range(3):
        lane._restarts.died(time.monotonic())
    bench.die(lane)
    lane._restarts.served()
    assert await lane.replace(refuse, idle=True) is None
    assert tries == 1


# With workers.


async def submitted(engine: Engine, work: list[Work], seed: int) -> list[float]:
    """Their scores, asked for in requests of some to thirty items, in an order of their own."""
    random = np.random.default_rng(seed)
    order, answers = random.permutation(len(work)).tolist(), {}
    while order:
        part, order = order[: (n := int(random.integers(1, 30)))], order[n:]
        answers |= dict(zip(part, engine.submit([work[i] for i in part]), strict=True))
        await asyncio.sleep(0)
    return await scores([answers[i] for i in range(len(work))])


def conversations(n: int) -> list[Work]:
    return [item for seed in range(n // 5) for item in samples(5, seed=100 + seed, prompt=7 + 13 * seed % 90)]


@asynccontextmanager
async def held(engine: Engine) -> AsyncIterator[list[int]]:
    """All workers stand still."""
    pids = pids_of(engine)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield pids
    finally:
        for pid in set(pids) & set(pids_of(engine)):
            os.kill(pid, signal.SIGCONT)


def pids_of(engine: Engine) -> list[int]:
    return [lane.worker.pid for lane in engine.lanes if lane.worker]


def ready(engine: Engine) -> int:
    return sum(lane.phase == "ready" for lane in engine.lanes)


def wear_out(*lanes: Lane) -> None:
    """The next failure to start a worker of theirs is the one after which nobody waits."""
    for lane in lanes:
        for _ in range(4):
            lane._restarts.died(time.monotonic())


async def gone(*pids: int) -> None:
    await until(lambda: not any(alive(pid) for pid in pids))


def alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.soak)])
async def test_the_bits_are_the_same_whoever_answers(tiny_model_dir: Path, host: WorkerHost, dtype: str) -> None:
    work = conversations(300)
    async with running(tiny_model_dir, host, cache_bytes=0, dtype=dtype) as (alone, _):
        truth = await submitted(alone, work, 1)
    async with running(tiny_model_dir, host, cache_bytes=0, dtype=dtype, device=TWO) as (engine, recorder):
        async with held(engine) as pids:
            answers = asyncio.ensure_future(submitted(engine, work, 2))
            await until(lambda: all(lane.flights for lane in engine.lanes))
            assert len(set(pids)) == 2
        assert await answers == truth
        assert await submitted(engine, work, 3) == truth
        assert engine.info.device == TWO and engine.info == alone.info
        assert sum(report.sequences for report in recorder.batches) == 2 * len(work)
        assert (recorder.restarts, recorder.failed) == (0, {})


async def test_a_prompt_stays_in_one_batch_and_equal_items_are_computed_once(
    tiny_model_dir: Path, host: WorkerHost, expected: Oracle
) -> None:
    async with running(tiny_model_dir, host, device=TWO) as (engine, recorder):
        work = samples(8, seed=40)
        answers = [engine.submit([item])[0] for item in [*work, *work]]
        assert await scores(answers) == 2 * expected(work)
        assert [report.sequences for report in recorder.batches] == [8]
        assert await scores(engine.submit(work)) == expected(work)
        assert recorder.reused == {"duplicate": 8, "cache": 8}


@pytest.mark.parametrize("kills", [pytest.param(1, marks=pytest.mark.soak), 2])
async def test_workers_are_killed_under_load_and_nothing_is_lost(
    tiny_model_dir: Path, host: WorkerHost, expected: Oracle, kills: int
) -> None:
    async with running(tiny_model_dir, host, cache_bytes=0, device=TWO) as (engine, recorder):
        work = conversations(200)
        for lane in engine.lanes:
            lane._last_seconds = 0.0  # batches are short: one is sent ahead
        async with held(engine) as pids:
            victims, survivors = pids[:kills], pids[kills:]
            answers = engine.submit(work)
            await until(lambda: all(len(lane.flights) == 2 for lane in engine.lanes))
            with halted(host):
                for victim in victims:
                    os.kill(victim, signal.SIGKILL)
                await until(lambda: pids_of(engine) == survivors)
                assert engine.state == ("ready" if survivors else "restarting")
                assert engine.worker_pid == next(iter(survivors), None)
        assert await scores(answers) == expected(work)
        assert sum(report.sequences for report in recorder.batches) == len(work), "each once"
        await until(lambda: ready(engine) == 2)
        assert set(survivors) <= set(pids_of(engine)) and set(victims).isdisjoint(pids_of(engine))
        assert (recorder.restarts, recorder.failed) == (kills, {})
        assert 0 < recorder.wasted <= 600 * kills


async def test_what_was_lost_does_not_wait_for_a_restart(
    tiny_model_dir: Path, host: WorkerHost, expected: Oracle
) -> None:
    async with running(tiny_model_dir, host, cache_bytes=0, device=TWO) as (engine, _):
        work = samples(6, seed=44)
        victim = pids_of(engine)[0]
        os.kill(victim, signal.SIGSTOP)
        answers = engine.submit(work)
        await until(lambda: bool(engine.lanes[0].flights))
        with halted(host):
            os.kill(victim, signal.SIGKILL)
            assert await scores(answers) == expected(work)
            assert engine.lanes[0].phase == "restarting" and engine.state == "ready"


async def test_an_item_that_kills_its_workers_fails_alone(
    tiny_model_dir: Path, host: WorkerHost, expected: Oracle, faults: dict[str, int]
) -> None:
    async with running(tiny_model_dir, host, cache_bytes=0, device=TWO) as (engine, recorder):
        others, crowd = conversations(60), samples(5, seed=41, last=faults["exit_on_token"])
        answers = engine.submit(crowd)
        await until(lambda: engine.queued_tokens == 0)
        innocent = engine.submit(others)
        *neighbours, poison = await outcomes(answers)
        assert isinstance(poison, WorkerCrashed)
        assert [answer.attributes[0] for answer in neighbours if isinstance(answer, Scored)] == expected(crowd[:-1])
        assert await scores(innocent) == expected(others)
        assert recorder.failed == {"worker_crashed": 1}
        await until(lambda: ready(engine) == 2)
        assert recorder.restarts <= 2 + 3, "as many as one worker alone would have needed"


class Patient(RestartPolicy):
    """Tries once an hour, for ever."""

    def died(self, now: float) -> float:
        super().died(now)
        return 3600.0


@pytest.mark.soak
async def test_those_who_do_not_come_back_are_not_waited_for(
    tiny_model_dir: Path, host: WorkerHost, expected: Oracle, faults: dict[str, int]
) -> None:
    async with running(tiny_model_dir, host, cache_bytes=0, device="cpu,cpu,cpu") as (engine, recorder):
        for lane in engine.lanes[:2]:
            lane.order, lane._restarts = LoadOrder("nowhere", "cpu", None, None, 1), Patient()
        crowd = samples(4, seed=43, last=faults["exit_on_token"])
        *neighbours, poison = await outcomes(engine.submit(crowd))
        assert isinstance(poison, WorkerCrashed)
        assert [answer.attributes[0] for answer in neighbours if isinstance(answer, Scored)] == expected(crowd[:-1])
        assert [lane.phase for lane in engine.lanes[:2]] == ["restarting"] * 2
        assert recorder.restarts <= 2


@pytest.mark.soak
async def test_one_that_hangs_holds_up_nobody_else_and_has_a_clock_of_its_own(
    tiny_model_dir: Path, host: WorkerHost, expected: Oracle, faults: dict[str, int]
) -> None:
    async with running(tiny_model_dir, host, cache_bytes=0, hang_seconds=1.5, device=TWO) as (engine, recorder):
        [stuck] = engine.submit(samples(1, seed=42, last=faults["hang_on_token"]))
        await until(lambda: any(lane.flights for lane in engine.lanes))
        [hung] = [lane for lane in engine.lanes if lane.flights]
        others = conversations(20)
        assert await scores(engine.submit(others)) == expected(others)
        assert hung.flights and not stuck.done()
        [error] = await outcomes([stuck])
        assert isinstance(error, WorkerCrashed)
        await until(lambda: ready(engine) == 2)
        assert recorder.restarts == 2, "once each time that it hung"


async def test_a_lane_that_cannot_restart_is_left_out_until_it_can(
    tiny_model_dir: Path,
    host: WorkerHost,
    tmp_path: Path,
    expected: Oracle,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_module, "_RESPITE", 0.5)
    directory = tmp_path / "model"
    shutil.copytree(tiny_model_dir, directory)
    async with running(directory, host, cache_bytes=0, device=TWO) as (engine, recorder):
        (directory / "reward.json").write_text("{}")
        wear_out(*engine.lanes)
        work = conversations(50)
        async with held(engine) as (victim, survivor):
            answers = engine.submit(work)
            await until(lambda: all(lane.flights for lane in engine.lanes))
            os.kill(victim, signal.SIGKILL)
            await until(lambda: engine.lanes[0].phase == "failed")
            assert engine.state == "ready" and pids_of(engine) == [survivor] and engine._ledger._workers == 1
            assert "no worker can be kept on cpu" in caplog.text
        assert await scores(answers) == expected(work), "with what the other had begun"
        await engine.sleep()
        with pytest.raises(WorkerFailed):
            await engine.wake()
        shutil.copytree(tiny_model_dir, directory, dirs_exist_ok=True)
        await engine.wake()
        assert engine.lanes[1].phase == "ready", "the one that was left out is not waited for"
        await until(lambda: ready(engine) == 2)
        assert recorder.restarts == 1 and len(set(pids_of(engine))) == 2
        again = conversations(51)
        assert await scores(engine.submit(again)) == expected(again)


@asynccontextmanager
async def one_left_out(directory: Path, model: Path, host: WorkerHost) -> AsyncIterator[Engine]:
    """An engine of two lanes of which the first has no worker and cannot have one; `directory` holds its model."""
    shutil.copytree(model, directory)
    async with running(directory, host, cache_bytes=0, device=TWO) as (engine, _):
        (directory / "reward.json").write_text("{}")
        wear_out(engine.lanes[0])
        os.kill(pids_of(engine)[0], signal.SIGKILL)
        await until(lambda: [lane.phase for lane in engine.lanes] == ["failed", "ready"])
        yield engine


async def test_one_that_hangs_while_it_is_started_again_holds_up_no_sleep(
    tiny_model_dir: Path, host: WorkerHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_RESPITE", 0.2)
    async with one_left_out(tmp_path / "model", tiny_model_dir, host) as engine:
        config = tmp_path / "model" / "config.json"
        config.unlink()
        os.mkfifo(config)  # reading it never ends
        await until(lambda: bool(engine._attempts))
        assert (engine.state, engine.lanes[0].phase) == ("ready", "failed"), "nobody waits for it"
        async with asyncio.timeout(20):
            await engine.sleep()
        assert not engine._attempts and [lane.phase for lane in engine.lanes] == ["failed", "asleep"]
        config.unlink()
        shutil.copytree(tiny_model_dir, tmp_path / "model", dirs_exist_ok=True)
        await engine.wake()
        await until(lambda: ready(engine) == 2)


async def test_a_wake_that_overtakes_a_sleep_brings_all_back(
    tiny_model_dir: Path, host: WorkerHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Oracle
) -> None:
    monkeypatch.setattr(engine_module, "_RESPITE", 0.2)
    async with one_left_out(tmp_path / "model", tiny_model_dir, host) as engine:
        shutil.copytree(tiny_model_dir, tmp_path / "model", dirs_exist_ok=True)
        [survivor] = pids_of(engine)
        os.kill(survivor, signal.SIGSTOP)  # it will be slow to leave
        asleep = asyncio.create_task(engine.sleep())
        await until(lambda: engine.lanes[1].phase == "leaving")
        await asyncio.sleep(0.5)  # another attempt is due
        awake = asyncio.create_task(engine.wake())
        await asyncio.sleep(0)
        os.kill(survivor, signal.SIGCONT)
        await asyncio.gather(asleep, awake)
        await until(lambda: ready(engine) == 2)
        work = conversations(53)
        assert await scores(engine.submit(work)) == expected(work)


@pytest.mark.soak
async def test_the_last_one_that_cannot_restart_refuses_work_and_the_first_to_come_back_takes_it(
    tiny_model_dir: Path, host: WorkerHost, tmp_path: Path, expected: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_RESPITE", 0.5)
    directory = tmp_path / "model"
    shutil.copytree(tiny_model_dir, directory)
    async with running(directory, host, cache_bytes=0, device=TWO) as (engine, _):
        (directory / "reward.json").write_text("{}")
        wear_out(*engine.lanes)
        for pid in pids_of(engine):
            os.kill(pid, signal.SIGKILL)
        await until(lambda: [lane.phase for lane in engine.lanes] == ["failed"] * 2)
        with pytest.raises(Unavailable):
            await engine.sleep()
        shutil.copytree(tiny_model_dir, directory, dirs_exist_ok=True)
        await until(lambda: ready(engine) == 2)
        work = conversations(52)
        assert await scores(engine.submit(work)) == expected(work)
        await engine.sleep()
        await engine.wake()
        assert ready(engine) == 2


async def test_all_sleep_and_all_wake_or_none(tiny_model_dir: Path, host: WorkerHost, expected: Oracle) -> None:
    async with running(tiny_model_dir, host, cache_bytes=0, device=TWO) as (engine, recorder):
        work, pids = conversations(30), pids_of(engine)
        answers = engine.submit(work)
        await engine.sleep()
        assert await scores(answers) == expected(work), "what was taken is finished"
        assert (engine.state, pids_of(engine), any(map(alive, pids))) == ("asleep", [], False)
        patient = engine.submit(work, priority="batch")
        known, engine.lanes[1].order = engine.lanes[1].order, LoadOrder("nowhere", "cpu", None, None, 1)
        with pytest.raises(WorkerFailed, match="nowhere"):
            await engine.wake()
        assert (engine.state, pids_of(engine), engine.open_items) == ("asleep", [], len(work))
        assert host._process is not None
        children = Path(f"/proc/{host._process.pid}/task/{host._process.pid}/children").read_text().split()
        await gone(*map(int, children))  # the other was started in vain
        engine.lanes[1].order = known
        await engine.wake()
        assert (ready(engine), engine.state, recorder.restarts) == (2, "ready", 0)
        assert await scores(patient) == expected(work)


@pytest.mark.parametrize("called_off", [True, pytest.param(False, marks=pytest.mark.soak)])
async def test_one_that_is_being_started_is_waited_for_by_those_who_would_sleep(
    tiny_model_dir: Path, host: WorkerHost, called_off: bool
) -> None:
    async with running(tiny_model_dir, host, device=TWO) as (engine, _):
        victim, survivor = pids_of(engine)
        with halted(host):
            os.kill(victim, signal.SIGKILL)
            await until(lambda: engine.lanes[0].phase == "restarting")
            falling = asyncio.ensure_future(engine.sleep())
            for _ in range(9):
                await asyncio.sleep(0)  # the pump has its turn
            assert [lane.phase for lane in engine.lanes] == ["restarting", "ready"]
        if called_off:
            await engine.wake()
            await falling
            await until(lambda: ready(engine) == 2)
            assert survivor in pids_of(engine)
        else:
            await falling
            assert [lane.phase for lane in engine.lanes] == ["asleep", "asleep"] and not alive(survivor)


async def test_batches_fit_every_worker(tiny_model_dir: Path, host: WorkerHost) -> None:
    async with running(tiny_model_dir, host, cache_bytes=0, device=TWO) as (engine, _):
        one, other = engine.lanes
        for lane, cap in ((one, 300), (other, 200)):
            lane.token_cap = cap
        engine._refit()
        assert (engine.token_budget, engine._ledger._workers) == (200, 2)
        with halted(host):
            os.kill(pids_of(engine)[1], signal.SIGKILL)
            await until(lambda: other.phase == "restarting")
        await until(lambda: ready(engine) == 2)
        assert engine.token_budget == 300, "a new worker finds out for itself, the old one knows"


@pytest.mark.parametrize("end", ["drain", "close"])
async def test_leaving_leaves_no_process(tiny_model_dir: Path, host: WorkerHost, end: str) -> None:
    async with running(tiny_model_dir, host, device=TWO) as (engine, _):
        pids, answers = pids_of(engine), engine.submit(conversations(100))
        if end == "drain":
            await engine.drain(60.0)
            assert not any(answer.exception() for answer in answers)
        await engine.close()
        assert all(answer.done() for answer in answers)
        left_over = [answer.exception() for answer in answers if answer.exception()]
        assert (end == "drain") is not bool(left_over)
        assert all(isinstance(error, Draining) for error in left_over)
        await gone(*pids)


def test_over_http(serve: Callable[..., Any], tiny_model_dir: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))[:2]
    chosen = ["--cpus", ",".join(map(str, cpus))] if len(cpus) == 2 else []
    server = serve(f"rm={tiny_model_dir}", "--device", TWO, "--token-budget", "256", "--cache-mb", "0", *chosen)
    items = [{"prompt": f"prompt {n // 4}", "response": f"response {n} " + "word " * (n % 17)} for n in range(200)]
    [host] = children(server.process.pid)
    workers = children(host)
    assert len(workers) == 2 and "device  cpu,cpu" in server.said
    if chosen:
        allowed = [Path(f"/proc/{p}/status").read_text().split("Cpus_allowed_list:")[1].split()[0] for p in workers]
        assert sorted(allowed) == [str(cpu) for cpu in cpus]
    with httpx2.Client(base_url=server.url, timeout=60) as client:

        def ask() -> list[float]:
            answer = client.post("/score", content=json.dumps({"items": items}))
            assert answer.status_code == 200
            got: list[float] = answer.json()["scores"]
            return got

        first = ask()
        assert None not in first and len(set(first)) == len(items)
        assert client.get("/info").json()["workers"] == [{"device": "cpu", "state": "ready"}] * 2
        assert 'plaudit_workers_ready{model="rm"} 2.0' in client.get("/metrics").text
        os.kill(workers[0], signal.SIGKILL)
        assert ask() == first
        assert client.get("/readyz").json() == {"status": "ready", "models": {"rm": "ready"}}
        while 'plaudit_worker_restarts_total{model="rm"} 1.0' not in client.get("/metrics").text:
            pass
        assert 'plaudit_workers_ready{model="rm"} 2.0' in client.get("/metrics").text
        assert ask() == first
    left = children(host)
    assert server.end() == 0
    while any(map(alive, (host, *left))):
        pass


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if alive(int(child))]


# What is asked for.


def test_workers_split_what_there_is() -> None:
    settings = EngineSettings(device="cpu,cpu , cpu", cpus=(0, 1, 2, 3, 8, 9, 10), memory_cap=1 << 30)
    orders = settings.orders("m")
    assert [order.cpus for order in orders] == [(0, 1), (2, 3), (8, 9, 10)]
    assert {order.device for order in orders} == {"cpu"} and {order.workers for order in orders} == {3}
    assert {order.memory_cap for order in orders} == {1 << 30}, "each has that much"
    assert [order.device for order in EngineSettings(device="cuda:0,cuda:1").orders("m")] == ["cuda:0", "cuda:1"]
    [alone] = EngineSettings(device="cuda", cpus=(4, 5)).orders("m")
    assert (alone.device, alone.cpus, alone.workers) == ("cuda", (4, 5), 1)


@pytest.mark.parametrize(
    ("device", "why"),
    [("cuda:0,cuda:0", "would only share it"), ("auto,cpu", "each is named"), ("cuda,cuda:1", "each is named"),
     ("cpu,", "each is named")],
)  # fmt: skip
def test_devices_that_make_no_sense_are_refused(device: str, why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        EngineSettings(device=device)


def test_more_workers_than_cpus_are_refused() -> None:
    with pytest.raises(SettingsError, match="2 workers cannot split 1 of the CPUs"):
        EngineSettings(device=TWO, cpus=(3,))
