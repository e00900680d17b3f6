"""The sandbox and the term that runs programs in it."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from plaudit.rewards import sandbox
from plaudit.rewards.code import code, program_of
from plaudit.rewards.compose import Candidate, Composer
from plaudit.rewards.config import Code, Rewards
from plaudit.rewards.sandbox import Ended, Sandbox, works
from plaudit.rewards.terms import TermError

TERM = Code(name="c", seconds=10.0, memory_mb=256)
isolated = pytest.mark.skipif(not works(), reason="no namespaces can be made here")


def run(program: str, seconds: float = 10.0, isolated: bool = True) -> Ended:
    return Sandbox(seconds, 256, isolated).run(program)


@pytest.mark.parametrize("alone", [pytest.param(True, marks=isolated), False])
def test_loops_memory_forks_and_floods_end(alone: bool) -> None:
    assert run("print(1)", isolated=alone) == Ended(0, b"1\n")
    assert run("while True: pass", 1.0, alone).code is None
    assert run("import time\ntime.sleep(60)", 1.0, alone).code is None
    hog = run("x = bytearray(10**9); print('held')", isolated=alone)
    assert hog.code == 1 and hog.output == b""
    flood = run("while True: print('x' * 10_000)", isolated=alone)
    assert flood.code != 0 and len(flood.output) <= 1 << 20
    assert run("import sys; sys.exit(3)", isolated=alone).code == 3
    assert run("\0", isolated=alone).code == 1 and run("\ud800", isolated=alone).code == 1


@isolated
def test_nothing_outside_can_be_written_and_nobody_called(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    for place in (target, Path(__file__), Path.home() / "plaudit-probe", Path("/var/tmp/plaudit-probe")):
        assert run(f"open({str(place)!r}, 'a').write('x')").code == 1
        assert run(f"import os; os.remove({str(place)!r})").code == 1
    assert target.read_text() == "mine"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)").code == 1
    assert run("open('own', 'w').write('x'); print(open('own').read())").output == b"x\n"
    assert run("import os; print(os.listdir('/tmp'), sorted(os.environ))").output == b"[] ['HOME', 'LANG', 'PATH']\n"


@isolated
def test_what_shuts_it_in_cannot_be_undone() -> None:
    remount = "import ctypes; libc = ctypes.CDLL(None); {}print(libc.mount(None, b'/', None, 4128, None))"
    assert run(remount.format("")).output == b"-1\n"
    assert run(remount.format("libc.unshare(0x10020000); ")).output == b"-1\n"  # in a namespace of its own making
    assert run("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))").code == 1


@isolated
def test_what_a_program_leaves_behind_dies_with_it() -> None:
    """A grandchild in a session of its own: its command line would still be there in /proc."""
    marker = "plaudit-sandbox-left-behind"
    program = f"""
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)', '{marker}'])
    os._exit(0)
time.sleep(60)
"""
    assert run(program, 3.0).code is None
    while any("time.sleep(60)" in text and marker in text for text in map(_text, Path("/proc").glob("[0-9]*/cmdline"))):
        time.sleep(0.01)  # the kernel ends them in its own time; pytest's limit is ours


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def test_a_sandbox_that_fails_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_UNSHARE", ("false",))
    assert not works()
    with pytest.raises(TermError) as failure:
        code(TERM, "print(1)", "assert True", Event(), isolated=True)
    assert failure.value.code == "unavailable"


ADD = "Here:\n```python\na, b = map(int, input().split())\nprint(a + b)\n```\nDone."
TESTS = [{"input": "1 2\n", "output": "3"}, {"input": "5 5", "output": "10\n"}, {"input": "1 1", "output": "3"}]


@pytest.mark.parametrize(
    ("response", "reference", "value"),
    [
        (ADD, TESTS[:2], 1.0),
        (ADD, TESTS, 2 / 3),
        ("print(3)", TESTS, 2 / 3),
        ("I cannot write programs.", TESTS, 0.0),
        ("def f(x): return x + 1", "assert f(1) == 2", 1.0),
        ("def f(x): return x", "assert f(1) == 2", 0.0),
        ("import os, sys\ndef f(x): os._exit(0)", "assert f(1) == 2", 0.0),  # leaving early is not passing
        ("raise SystemExit(0)", "assert f(1) == 2", 0.0),
        ("import sys; print(sys.argv); print(open('/proc/self/cmdline').read())", "assert False", 0.0),
        ("x" * 200_000, "assert False", 0.0),
    ],
)
def test_the_share_of_tests_that_pass(response: str, reference: Any, value: float) -> None:
    assert code(TERM, response, reference, Event(), isolated=works()) == pytest.approx(value)


@pytest.mark.parametrize("reference", [[], [{"input": "x"}], " ", 7, {"input": "a", "output": "b"}, [3]])
def test_a_reference_without_tests_is_an_error(reference: Any) -> None:
    with pytest.raises(TermError) as failure:
        code(TERM, "print(1)", reference, Event(), isolated=works())
    assert failure.value.code == "bad_reference"


def test_nothing_is_run_any_more_for_a_caller_that_has_gone(tmp_path: Path) -> None:
    """A trainer that gives up asks again: what its first request left running would be in the way of the second."""
    runs = tmp_path / "runs"
    response = f"open({str(runs)!r}, 'a').write('x')"
    asked = Candidate({"prompt": "p", "response": response}, response, TESTS * 20)

    async def give_up() -> None:
        composer = Composer(Rewards((TERM,)), allow_code=True, isolated=False)
        asking = asyncio.create_task(composer.rewards_of([asked]))
        while not runs.exists():
            await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(give_up())  # returns once its threads have ended
    assert len(runs.read_text()) < len(TESTS * 20)


def test_the_program_is_the_last_block() -> None:
    assert program_of("```\na\n```\n```py\nb\n```") == "b\n" and program_of("c") == "c"
    assert json.dumps(program_of("```python\nd")) == json.dumps("```python\nd")
