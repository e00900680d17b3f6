"""Servers as processes: started, waited for, stopped."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def serving(command: Sequence[str], port: int, *, limit: float = 180.0) -> Iterator[str]:
    """Run a server until the block ends; yields its address once `/readyz` answers 200."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process, limit)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


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
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
