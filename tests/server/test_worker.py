from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton

from plaudit_model.encode import Encoded
from plaudit_model.infer import contract_for
from plaudit_model.packing import group_items
from plaudit_model.reward_model import RewardModel
from plaudit_server import messages
from plaudit_server.engine_errors import WorkerFailed
from plaudit_server.faults import VARIABLE
from plaudit_server.link import SocketLink
from plaudit_server.messages import Failure, LoadOrder, Scores
from plaudit_server.worker import Worker, WorkerHost
from plaudit_server.worker_process import Scorer

pytestmark = pytest.mark.anyio


def order(directory: Path, **other: object) -> LoadOrder:
    return LoadOrder(**{"model": str(directory), "device": "cpu", "dtype": None, "mode": None, "threads": 1, **other})  # type: ignore[arg-type]


def items(n: int, *, seed: int = 0, last: int | None = None) -> list[Encoded]:
    """Items of three prompts; the last item may end in a certain token."""
    random = np.random.default_rng(seed)
    prompts = [random.integers(5, 600, length, dtype=np.int32) for length in (16, 70, 100)]
    responses = [random.integers(5, 600, random.integers(1, 60), dtype=np.int32) for _ in range(n)]
    made = [np.concatenate([prompts[i % 3], response]) for i, response in enumerate(responses)]
    if last is not None:
        made[-1][-1] = last
    return [Encoded(ids, len(prompts[i % 3])) for i, ids in enumerate(made)]


async def ask(worker: Worker, asked: list[Encoded]) -> tuple[list[int], Scores | Failure]:
    """The caller's index of each row, and the answer."""
    groups = group_items(asked, share=worker.info.shares_prompt)
    worker.send(groups)
    frame = await worker.receive()
    assert frame is not None
    return [index for group in groups for index in group.indices], messages.reply(frame, len(asked))


@pytest.mark.parametrize("family", ["qwen3", "bert"])
async def test_it_scores_as_the_model_does(
    host: WorkerHost, reward_model_dir: Callable[[str], Path], family: str
) -> None:
    directory = reward_model_dir(family)
    model = RewardModel.load(directory, device="cpu")
    worker = await host.launch(order(directory))
    asked = items(9)
    rows, answer = await ask(worker, asked)
    await worker.close()
    assert isinstance(answer, Scores) and answer.seconds > 0
    assert answer.attributes.tobytes() == model.score_encoded(asked)[rows].tobytes()
    assert worker.info.numerics == model.numerics
    assert worker.info.shares_prompt == model.shares_prompt == (family == "qwen3")
    assert worker.info.attributes == ("score",)


async def test_what_cannot_be_loaded_is_refused(host: WorkerHost, tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(WorkerFailed, match="there is no directory .*nowhere"):
        await host.launch(order(tmp_path / "nowhere"))
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in tiny_model_dir.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    (changed / "config.json").write_text((changed / "config.json").read_text() + " ")
    with pytest.raises(WorkerFailed, match=r"config\.json.*sha256"):
        await host.launch(order(changed))


async def test_the_revision_is_the_contracts_which_the_front_reads_too(host: WorkerHost, tiny_bert_dir: Path) -> None:
    worker = await host.launch(order(tiny_bert_dir))
    await worker.close()
    assert worker.info.revision == contract_for(tiny_bert_dir).revision()


async def test_a_raising_forward_is_an_answer_and_the_worker_goes_on(
    host: WorkerHost, tiny_model_dir: Path, faults: dict[str, int]
) -> None:
    worker = await host.launch(order(tiny_model_dir))
    _, answer = await ask(worker, items(3, last=faults["raise_on_token"]))
    assert isinstance(answer, Failure) and "came by" in answer.reason
    _, answer = await ask(worker, [Encoded(np.array([5000], np.int32), 0)])
    assert isinstance(answer, Failure) and "index" in answer.reason
    rows, answer = await ask(worker, items(3, last=faults["nan_on_token"]))
    assert isinstance(answer, Scores)
    assert [bool(np.isnan(answer.attributes[rows.index(i)])) for i in range(3)] == [False, False, True]
    await worker.close()


def test_a_kernel_that_is_compiled_after_warm_up_goes_with_the_next_scores(tiny_model_dir: Path) -> None:
    """Through Triton's own hook; that compiling calls it is seen in tests/kernels/test_compilations.py."""
    build = {"signature": {"rows": "i32"}, "constants": {}, "configs": [{}], "num_warps": 4}
    function = type("Function", (), {"module": "m", "name": "kernel"})
    notes: list[str] = []
    with triton.knobs.runtime.scope():
        scorer = Scorer(order(tiny_model_dir), note=notes.append)
        groups = group_items(items(2), share=True)
        quiet = scorer.score(groups)
        triton.knobs.runtime.jit_post_compile_hook(key="", repr="", fn=function, compile=build, is_manual_warmup=False)
        late, after = scorer.score(groups), scorer.score(groups)
    assert [one.late_jit for one in (quiet, late, after) if isinstance(one, Scores)] == [
        (), ("m.kernel[4 warps](rows: i32)",), (),
    ]  # fmt: skip
    assert len(notes) == 1 and "M parameters loaded and proven in" in notes[0]


async def test_it_says_how_long_it_took_and_keeps_to_its_cpus(host: WorkerHost, tiny_model_dir: Path) -> None:
    [cpu, *_] = sorted(os.sched_getaffinity(0))
    worker = await host.launch(order(tiny_model_dir, cpus=(cpu,)))
    status = Path(f"/proc/{worker.pid}/status").read_text()
    await worker.close()
    assert status.split("Cpus_allowed_list:")[1].split()[0] == str(cpu)
    assert list(worker.info.ready_s) == ["imports", "load", "proof", "warm_up"]
    assert all(seconds >= 0 for seconds in worker.info.ready_s.values())


def test_several_divide_the_threads_among_them(tiny_model_dir: Path) -> None:
    before = torch.get_num_threads()
    try:
        for named, workers, threads in ((None, 1, 5), (None, 2, 2), (None, 9, 1), (3, 2, 3)):
            torch.set_num_threads(5)
            Scorer(order(tiny_model_dir, threads=named, workers=workers))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_products_of_fp32_keep_their_bits_whatever_a_container_allows(tiny_model_dir: Path) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 does
        Scorer(order(tiny_model_dir))
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


async def test_workers_that_would_not_score_alike_are_refused_together(host: WorkerHost, tiny_model_dir: Path) -> None:
    before = children_of_the(host)  # some of which may be leaving
    orders = [order(tiny_model_dir), order(tiny_model_dir, dtype="bfloat16")]
    with pytest.raises(
        WorkerFailed, match=r"on cpu and cpu would not score alike, but differ in numerics .*float32.*;"
    ):
        await host.launch_all(orders, 60.0)
    assert children_of_the(host) <= before
    with pytest.raises(WorkerFailed, match="nowhere"):
        await host.launch_all([*orders, order(Path("nowhere"))], 60.0)
    while not children_of_the(host) <= before:
        await asyncio.sleep(0.02)  # those that were loading are killed


async def test_death_is_the_end_of_the_link(host: WorkerHost, tiny_model_dir: Path) -> None:
    worker = await host.launch(order(tiny_model_dir))
    worker.kill()
    assert await worker.receive() is None
    await worker.close()


async def test_a_worker_leaves_when_its_link_closes(host: WorkerHost, tiny_model_dir: Path) -> None:
    worker = await host.launch(order(tiny_model_dir))
    await worker.close()
    await gone(worker.pid)


async def test_a_worker_ignores_signals_meant_for_the_front(host: WorkerHost, tiny_model_dir: Path) -> None:
    worker = await host.launch(order(tiny_model_dir))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(worker.pid, number)
    _, answer = await ask(worker, items(2))
    await worker.close()
    assert isinstance(answer, Scores)


async def test_a_lost_host_takes_its_workers_along_and_is_started_again(
    started_host: Callable[..., Any], tiny_model_dir: Path
) -> None:
    host = await started_host()
    worker = await host.launch(order(tiny_model_dir))
    os.kill(parent_of(worker.pid), signal.SIGKILL)
    assert await worker.receive() is None
    await worker.close()
    second = await host.launch(order(tiny_model_dir))
    assert isinstance((await ask(second, items(2)))[1], Scores)
    await second.close()
    await host.close()


async def test_a_worker_that_does_not_finish_loading_is_killed(
    host: WorkerHost, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(tmp_path / "config.json")  # reading it never ends
    before = children_of_the(host)
    with pytest.raises(WorkerFailed, match=r"not loaded within 0\.5 s"):
        await host.launch(order(tmp_path), load_seconds=0.5)
    while not children_of_the(host) <= before:
        await asyncio.sleep(0.02)


async def test_what_the_system_refuses_is_a_failed_start(host: WorkerHost, tiny_model_dir: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(WorkerFailed, match=r"could not be started: .*Too many open files"):
            await host.launch(order(tiny_model_dir))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    worker = await host.launch(order(tiny_model_dir))
    await worker.close()


def test_a_worker_can_be_a_process_of_its_own(tiny_bert_dir: Path) -> None:
    """As on a machine where importing opens the device, which must not be forked."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-P", "-m", "plaudit_server.worker_process", str(theirs.fileno())]
    with ours, subprocess.Popen(command, pass_fds=(theirs.fileno(),)) as process:
        theirs.close()
        link = SocketLink(ours)
        link.send(messages.load_frame(order(tiny_bert_dir)))
        born, note, ready = (link.receive() for _ in range(3))
        assert born is not None and messages.born_pid(born) == process.pid
        assert note is not None and messages.note(note)
        assert ready is not None and messages.model_info(ready).device == "cpu"
        ours.shutdown(socket.SHUT_RDWR)
        assert process.wait() == 0


FRONT = """
import asyncio, sys
import numpy as np
from plaudit_model.packing import Group
from plaudit_server.messages import LoadOrder
from plaudit_server.worker import WorkerHost

async def front():
    host = WorkerHost()
    worker = await host.launch(LoadOrder(sys.argv[1], "cpu", None, None, 1))
    worker.send([Group(np.zeros(0, np.int32), (np.array([7], np.int32),), (0,), (0,))])
    await asyncio.sleep(0.2)
    print(worker.pid, "torch" in sys.modules, flush=True)
    await asyncio.sleep(60)

asyncio.run(front())
"""


async def test_a_killed_front_leaves_no_orphan_and_never_imported_torch(tiny_model_dir: Path) -> None:
    """Its worker is in the middle of a batch that never ends, so it will not read the end of its link."""
    command = [sys.executable, "-P", "-c", FRONT, str(tiny_model_dir)]
    environment = os.environ | {VARIABLE: "hang_on_token:7"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as front:
        assert front.stdout is not None
        pid, torch_imported = front.stdout.readline().split()
        host = parent_of(int(pid))
        assert running(host) and running(int(pid))
        front.kill()
    await gone(host)
    await gone(int(pid))
    assert torch_imported == "False"


def children_of_the(host: WorkerHost) -> set[int]:
    """Its workers that have not ended."""
    assert host._process is not None
    pid = host._process.pid
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if running(int(child))}


def parent_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("PPid:")[1].split()[0])


async def gone(pid: int) -> None:
    """Wait until the process has ended; the test's own time limit is the limit."""
    started = time.monotonic()
    while running(pid):
        assert time.monotonic() - started < 60
        await asyncio.sleep(0.02)


def running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
