"""The process that workers are forked from.

Importing torch and transformers takes seconds; a worker that replaces a crashed one should not pay for them
again. The host imports them once, starts no threads, touches no device, and forks a worker for every socket
that the front sends it. It ends when the front closes its end, and its workers end with it.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from typing import NoReturn

import torch
import transformers.modeling_layers  # noqa: F401  what loading any model imports: seconds that no worker pays

from . import worker_process

logger = logging.getLogger("plaudit.worker")


def main(arguments: list[str]) -> NoReturn:
    """`python -P -m plaudit_server.worker_host FD PARENT`: fork a worker for each socket received on FD."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    worker_process.ignore_terminal()
    worker_process.die_with_parent(int(arguments[1]))
    signal.signal(signal.SIGCHLD, _reap)
    with socket.socket(fileno=int(arguments[0])) as control:
        control.set_inheritable(False)
        while True:
            _, sockets, _, _ = socket.recv_fds(control, 1, 1)
            if not sockets:
                os._exit(0)  # nothing to tidy up, and taking torch down in order takes seconds
            with socket.socket(fileno=sockets[0]) as end:
                _fork(end, control)


def _fork(end: socket.socket, control: socket.socket) -> None:
    host = os.getpid()
    if os.fork():
        return
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        worker_process.die_with_parent(host)
        control.close()
        status = _worker(end)
    finally:
        os._exit(status)  # the host's stack must not unwind a second time


def _worker(end: socket.socket) -> int:
    if torch.cuda._is_in_bad_fork():  # something touched the device at import: only a fresh process can use it
        end.set_inheritable(True)
        command = [sys.executable, "-P", "-m", worker_process.__name__, str(end.fileno())]
        os.execv(sys.executable, command)
    return worker_process.run(end)


def _reap(signum: int, frame: object) -> None:
    """Collect workers that ended; the front has seen it on the link already, the log says how."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        if os.WIFSIGNALED(status):
            logger.warning("worker %d was ended by %s", pid, signal.Signals(os.WTERMSIG(status)).name)
        elif code := os.WEXITSTATUS(status):
            logger.warning("worker %d exited with status %d", pid, code)


if __name__ == "__main__":
    main(sys.argv[1:])
