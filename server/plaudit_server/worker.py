"""The front's side of a worker: start it, send it batches, notice that it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Literal

from plaudit_model.packing import Group

from . import messages
from .domain import ModelInfo
from .engine_errors import WorkerFailed
from .link import Frame, LinkError, StreamLink
from .messages import LoadOrder

logger = logging.getLogger("plaudit.engine")

_HOST_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",  # numpy's pool: a process that forks had better have one thread
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking whether there is a GPU must not open it before the fork
}
_GRACE = 5.0

Wait = Literal["active", "passive"]
"""How compute threads wait for work: `active` ones keep their cores, `passive` ones sleep (OMP_WAIT_POLICY)."""


class Worker:
    """One live worker with its model loaded. Its death shows as the end of the link."""

    def __init__(self, link: StreamLink, pid: int, info: ModelInfo) -> None:
        self._link = link
        self._process: int | None = None
        self.pid = pid
        self.info = info

    def send(self, groups: Sequence[Group]) -> None:
        """Give it a batch. Answers come in the order of the batches."""
        self._link.send(messages.batch_frame(groups))

    async def receive(self) -> Frame | None:
        """The next answer; None when the worker is gone. Raises LinkError if it talks nonsense."""
        return await self._link.receive()

    def kill(self) -> None:
        """End it at once. Call only while the link is open: then the process id is still its own."""
        _kill(self.pid)

    def leave(self) -> None:
        """Have it exit, idle as it is: `receive` will say that it is gone, `ended` when."""
        if sys.platform == "linux":
            with contextlib.suppress(ProcessLookupError):
                self._process = os.pidfd_open(self.pid)
        self._link.hang_up()

    async def close(self) -> None:
        """Close the link, upon which an idle worker exits."""
        await self._link.close()

    async def dismiss(self) -> None:
        """Have it exit, idle as it is, and return once it is gone."""
        self.leave()
        await self.close()
        await self.ended()

    async def ended(self) -> None:
        """Return once the process is gone, and with it the memory that it held."""
        if self._process is None:
            return
        loop, gone = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._process, gone.set)
        try:
            async with asyncio.timeout(_GRACE):
                await gone.wait()
        except TimeoutError:
            _kill(self.pid)
            await gone.wait()
        finally:
            loop.remove_reader(self._process)
            os.close(self._process)


class WorkerHost:
    """The process that imports torch once and forks workers. It is started with the first worker and started
    again if it dies itself."""

    def __init__(self, wait: Wait | None = None) -> None:
        self._environment = _HOST_ENVIRONMENT | ({"OMP_WAIT_POLICY": wait} if wait else {})
        self._process: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None
        self._lock = asyncio.Lock()

    async def launch(self, order: LoadOrder, load_seconds: float | None = None) -> Worker:
        """A worker that has loaded its model and passed its self-test within `load_seconds` (None: no limit).
        Raises WorkerFailed with the reason."""
        try:
            async with asyncio.timeout(load_seconds):
                return await self._launch(order)
        except TimeoutError:
            raise WorkerFailed(f"the model was not loaded within {load_seconds} s") from None
        except OSError as error:  # no file descriptor, process or memory to be had
            raise WorkerFailed(f"the worker could not be started: {error}") from error

    async def launch_all(
        self, orders: Sequence[LoadOrder], load_seconds: float, known: ModelInfo | None = None
    ) -> list[Worker]:
        """A worker for each order, side by side, all or none: of the model that is `known`, and all of the same.
        Raises WorkerFailed with the reason."""
        launches = [asyncio.create_task(self.launch(order, load_seconds)) for order in orders]
        try:
            workers = await asyncio.gather(*launches)
            _agree([worker.info for worker in workers], known)
        except BaseException:
            for launch in launches:
                launch.cancel()
            ended = await asyncio.gather(*launches, return_exceptions=True)
            await asyncio.gather(*(worker.dismiss() for worker in ended if isinstance(worker, Worker)))
            raise
        return workers

    async def close(self) -> None:
        """End the host; its workers end with it."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is None:
            return
        try:
            async with asyncio.timeout(_GRACE):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        self._process = None

    async def _launch(self, order: LoadOrder) -> Worker:
        started = time.monotonic()
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                async with self._lock:
                    await self._hand_over(theirs)
        except BaseException:
            ours.close()
            raise
        link = await StreamLink.over(ours)
        try:
            return await _load(link, order, started)
        except LinkError as error:
            await link.close()
            raise WorkerFailed(f"the worker talks nonsense: {error}") from error
        except BaseException:
            await link.close()
            raise

    async def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as on_failure:
            on_failure.callback(ours.close)
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "plaudit_server.worker_host", str(theirs.fileno()), str(os.getpid()),
                stdin=asyncio.subprocess.DEVNULL, stdout=2, pass_fds=(theirs.fileno(),),
                env=os.environ | self._environment,
            )  # fmt: skip
            on_failure.pop_all()
        self._control = ours

    async def _hand_over(self, end: socket.socket) -> None:
        if self._control is None:
            await self._start()
        try:
            self._send(end)
        except OSError:
            logger.warning("the worker host is gone; starting another")
            await self.close()
            await self._start()
            self._send(end)

    def _send(self, end: socket.socket) -> None:
        assert self._control is not None
        socket.send_fds(self._control, [b"w"], [end.fileno()])


async def _load(link: StreamLink, order: LoadOrder, started: float) -> Worker:
    link.send(messages.load_frame(order))
    born = await link.receive()
    if born is None:
        raise WorkerFailed("the worker ended before it began; its log says why")
    pid, imported = messages.born_pid(born), round(time.monotonic() - started, 3)
    try:
        info = await _loaded(link)
        return Worker(link, pid, dataclasses.replace(info, ready_s={"imports": imported, **info.ready_s}))
    except asyncio.CancelledError:
        _kill(pid)  # one that loads does not see its link close
        raise


async def _loaded(link: StreamLink) -> ModelInfo:
    while (frame := await link.receive()) is not None and (line := messages.note(frame)) is not None:
        logger.info("%s", line)
    if frame is None:
        raise WorkerFailed("the worker ended while it loaded the model: out of memory, or a crash; its log says which")
    if (reason := messages.refusal(frame)) is not None:
        raise WorkerFailed(reason)
    return messages.model_info(frame)


def _agree(infos: Sequence[ModelInfo], known: ModelInfo | None) -> None:
    """Raises WorkerFailed unless it makes no difference which worker scores."""
    if known not in (None, infos[0]):
        raise WorkerFailed("the model's files have changed since the server was started; restart it to serve them")
    first = infos[0]
    for other in infos[1:]:
        names = [field.name for field in dataclasses.fields(ModelInfo) if field.compare]
        if apart := [name for name in names if getattr(first, name) != getattr(other, name)]:
            said = "; ".join(f"{name} {getattr(first, name)} and {getattr(other, name)}" for name in apart)
            devices = f"the workers on {first.device} and {other.device}"
            raise WorkerFailed(f"{devices} would not score alike, but differ in {said}: serve them apart")


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
