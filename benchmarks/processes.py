"""Servers as processes: started, waited for, stopped."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

_RUNNING: dict[str, int] = {}
"""Process ids of the running servers, by address."""


@contextlib.contextmanager
def serving(command: Sequence[str], port: int, *, limit: float = 180.0, ready: str = "/readyz") -> Iterator[str]:
    """Run a server until the block ends; yields its address once its `ready` route answers 200."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url + ready, process, limit)
        _RUNNING[url] = process.pid
        yield url
    finally:
        _RUNNING.pop(url, None)
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def peak_memory(url: str) -> int:
    """MiB: the largest resident sizes so far of the server at `url` and of its children, added up."""
    total = 0
    for pid in family(_RUNNING[url]):
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        total += int(status.split("VmHWM:")[1].split()[0])
    return total >> 10


def cpu_seconds(server: str | int) -> float:
    """User and system time so far of a server, by address or process id, and of its children."""
    ticks = 0
    for pid in family(_RUNNING[server] if isinstance(server, str) else server):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    return [pid, *(member for child in children for member in family(int(child)))]


def plaudit_command(model: Path, port: int, *options: str) -> list[str]:
    """`plaudit serve` with this interpreter's installation."""
    return [str(Path(sys.executable).with_name("plaudit")), "serve", str(model), "--port", str(port), *options]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(url: str, process: subprocess.Popen[bytes], limit: float) -> None:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the server on {url} stopped with exit code {process.returncode}")
        if _is_ready(url):
            return
        time.sleep(0.1)
    raise SystemExit(f"the server on {url} was not ready after {limit:.0f} s")


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
