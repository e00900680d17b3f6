"""A host of workers that stands by: it has imported what a host imports, and takes the place of the first that a server
or a test starts. That import is most of what starting a server costs, and it is always the same.

One process a session imports (`python standing_by.py import FD`) and forks: a host for the tests themselves, or a host
and, in its parent, `python standing_by.py front ...`, which is `plaudit serve` in a fresh interpreter. Whoever starts
the host is its parent, and what a host does from `worker_host.main` on is what it always does. A second host, or
one after a loss, is started as everywhere. What libraries read of the environment as they are imported, as of
OMP_WAIT_POLICY or TRITON_INTERPRET, is the session's: a test of such a variable starts its server `alone`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import json
import os
import platform
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

VARIABLE = "PLAUDIT_TESTS_HOST"
CLONE_PARENT, CLONE = 0x8000, {"x86_64": 56, "aarch64": 220}
"""The child of a process has the same parent as that; the number of the system call that can say so."""


def possible() -> bool:
    return sys.platform == "linux" and platform.machine() in CLONE


class Forked:
    """A child of this process that another has forked, as far as `subprocess.Popen`."""

    def __init__(self, pid: int, stdout: Any) -> None:
        self.pid, self.stdout = pid, stdout
        self.returncode: int | None = None
        self._collecting = threading.Lock()  # a wait that is given up goes on in its thread, beside the next

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            end = os.pidfd_open(self.pid)
            try:
                if not select.select([end], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired("plaudit", timeout or 0.0)
            finally:
                os.close(end)
            with self._collecting:
                if self.returncode is None:
                    self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


class Host:
    """As far as `asyncio.subprocess.Process`."""

    def __init__(self, pid: int) -> None:
        self._forked = Forked(pid, None)
        self.pid = pid

    def kill(self) -> None:
        self._forked.kill()

    async def wait(self) -> int:
        return await asyncio.to_thread(self._forked.wait)


@contextlib.contextmanager
def taking_the_place_of_the_first(hand_over: Callable[[bytes, list[int]], int]) -> Any:
    """`hand_over` gives a host its environment and its end, and says which process it is."""
    start, spare = asyncio.create_subprocess_exec, [hand_over]

    async def create(*command: str, **options: Any) -> Any:
        if command[3] != "plaudit_server.worker_host" or not spare:
            return await start(*command, **options)
        request = json.dumps({"parent": command[5], "environment": options["env"]}).encode()
        return Host(spare.pop()(request, [int(command[4])]))

    asyncio.create_subprocess_exec = create  # type: ignore[assignment]
    try:
        yield
    finally:
        asyncio.create_subprocess_exec = start


class StandingBy:
    """The process that imports and forks."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-P", __file__, "import", str(theirs.fileno())]
            # As a host's: numpy's threads would be lost in what is forked here, which would wait for them for ever.
            environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)

    def host(self, request: bytes, ends: list[int]) -> int:
        socket.send_fds(self._control, [request], ends)
        if not (pid := self._control.recv(16)):
            raise ChildProcessError("the process that stands by is gone; its traceback is on the tests' stderr")
        return int(pid)

    def serve(self, arguments: list[str], environment: dict[str, str], log: int) -> Forked:
        reading, writing = os.pipe()
        request = json.dumps({"arguments": arguments, "environment": environment}).encode()
        stdout = os.fdopen(reading)
        try:
            return Forked(self.host(request, [writing, log]), stdout)
        finally:
            os.close(writing)

    def close(self) -> None:
        self._control.close()
        self._process.wait()


# -- the process that imports, and what it forks ---------------------------------------------------------------


def load() -> None:
    """Import what loading and computing a tiny model imports, and have set up what transformers and numba set up once;
    then there is no thread yet."""
    for module in ("plaudit_server.worker_host", *(f"transformers.models.{f}.modeling_{f}" for f in ("bert", "qwen3"))):
        importlib.import_module(module)
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("qwen3")
    with contextlib.suppress(ImportError):  # no numba
        for module in ("attention", "pairs", "rows"):
            importlib.import_module(f"plaudit_kernels.cpu_{module}")
        target = importlib.import_module("numba.core.registry").cpu_target
        target.typing_context.refresh()
        target.target_context.refresh()
    gc.freeze()


def stand_by(control: socket.socket) -> None:
    load()
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, "a fork without its handlers, as of `sibling`, may copy one thread alone"
    while True:
        request, ends, _, _ = socket.recv_fds(control, 1 << 20, 2)
        if not request:
            return
        if child := sibling():
            control.send(str(child).encode())
            for end in ends:
                os.close(end)
            continue
        try:
            control.close()
            begin(json.loads(request), ends)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)


def sibling() -> int:
    """Fork a child of this process's own parent."""
    import ctypes

    flags = CLONE_PARENT | signal.SIGCHLD
    pid = int(ctypes.PyDLL(None).syscall(CLONE[platform.machine()], flags, 0, 0, 0, 0))
    if pid < 0:  # whoever was told so would later kill "process -1", which is all of them
        raise OSError("no process to be had")
    return pid


def begin(request: dict[str, Any], ends: list[int]) -> NoReturn:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if "parent" in request:
        os.dup2(2, 1)
        be_host(request, ends[0])
    os.dup2(ends[0], 1)
    os.dup2(ends[1], 2)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    host = os.fork()
    if not host:
        ours.close()
        os.dup2(2, 1)  # or who reads what the server says would wait for the host too
        for end in ends:
            os.close(end)
        given, received, _, _ = socket.recv_fds(theirs, 1 << 20, 1)
        if not given:
            os._exit(0)
        be_host(json.loads(given), received[0])
    os.set_inheritable(ours.fileno(), True)
    os.execve(
        sys.executable,
        [sys.executable, "-P", __file__, "front", *request["arguments"]],
        request["environment"] | {VARIABLE: f"{ours.fileno()} {host}"},
    )


def be_host(request: dict[str, Any], end: int) -> NoReturn:
    from plaudit_server import worker_host

    os.environ.clear()
    os.environ.update(request["environment"])
    worker_host.main([str(end), request["parent"]])


def front(arguments: list[str]) -> None:
    end, host = map(int, os.environ.pop(VARIABLE).split())
    spare = socket.socket(fileno=end)
    os.set_inheritable(end, False)

    def hand_over(request: bytes, ends: list[int]) -> int:
        with spare:
            socket.send_fds(spare, [request], ends)
        return host

    sys.argv = ["plaudit", *arguments]
    from plaudit.cli import main

    with taking_the_place_of_the_first(hand_over):
        main()


if __name__ == "__main__":
    if sys.argv[1] == "front":
        front(sys.argv[2:])
    else:
        stand_by(socket.socket(fileno=int(sys.argv[2])))
