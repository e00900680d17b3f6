"""Clients that cross processes, and what importing one costs. Each test runs Python anew."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conftest import WireServer

CROSSING = """
import concurrent.futures, multiprocessing, os, sys
from plaudit import Client

def main(url):
    client = Client(url)
    first = float(client.score("p", "parent"))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, repr(float(client.score("p", "forked"))).encode())
        os._exit(0)
    os.waitpid(child, 0)
    print(first, float(client.score("p", "parent")), float(os.read(reading, 99)))
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        print(float(pool.submit(client.score, "p", "pickled").result()))
        error = pool.submit(client.with_options(api_key=None).compare, "p", "a", None).exception()
        print(type(error).__name__, error.exit_code)

if __name__ == "__main__":
    main(sys.argv[1])
"""


def python(*arguments: str, cwd: Path | None = None) -> str:
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=cwd, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_client_crosses_fork_and_pickle(server: WireServer, tmp_path: Path) -> None:
    script = tmp_path / "crossing.py"
    script.write_text(CROSSING, encoding="utf-8")
    parent, forked, pickled = (server.score_of("p", response) for response in ("parent", "forked", "pickled"))
    lines = python(str(script), server.url).splitlines()
    assert [float(word) for word in lines[0].split()] == [parent, parent, forked]
    assert float(lines[1]) == pickled and lines[2] == "InvalidInput 65"
    assert server.connections == 3  # the parent's one, kept over the fork, and one for each other process


def test_importing_the_client_imports_nothing_heavy() -> None:
    ours = [f"plaudit_{package}" for package in ("kernels", "model", "server", "training")]
    heavy = ["torch", "numpy", "pydantic", "transformers", "httpx2", "httpx", "typer", "rich", *ours]
    assert python("-c", f"import plaudit, sys; print([m for m in {heavy} if m in sys.modules])").strip() == "[]"


def test_the_client_works_with_httpx_where_httpx2_is_missing(server: WireServer) -> None:
    code = f"""
        import sys
        sys.modules["httpx2"] = None
        import asyncio
        from plaudit import AsyncClient, Client, ConnectionFailed, RetryPolicy
        with Client({server.url!r}) as client:
            print(float(client.score("p", "r")))
        async def run():
            async with AsyncClient({server.url!r}) as client:
                return float(await client.score("p", "r"))
        print(asyncio.run(run()))
        try:
            Client("http://127.0.0.1:9", retry=RetryPolicy(retries=0)).score("p", "r")
        except ConnectionFailed as error:
            print(error.exit_code, "httpx" in sys.modules)
    """
    score = str(server.score_of("p", "r"))
    assert python("-c", textwrap.dedent(code)).splitlines() == [score, score, "69 True"]


def test_an_interrupted_call_does_not_wait_for_its_requests(server: WireServer) -> None:
    code = f"""
        from plaudit import Client
        try:
            Client({server.url!r}).score_responses("p", ["x" * 300_000, "y" * 300_000])
        except KeyboardInterrupt:
            print("interrupted")
    """
    server.limits["max_body_bytes"] = 400_000
    server.fail({"delay": 300.0}, {"delay": 300.0})
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while server.paths().count("/score") < 2:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0].strip() == "interrupted"
    assert server.paths() == ["/info", "/score", "/score"]
