"""What a run says, where nobody can hear it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

_TALKS = """
import sys
from rich.console import Console
from plaudit_model.progress import ProgressLine, outlive_log
outlive_log()
with ProgressLine(Console(), 4, 0) as line:
    print("begun", flush=True)
    sys.stdin.readline()
    for step in (1, 2, 3, 4):
        line.show(step, "\\udcff")
print("a warning", file=sys.stderr)
sys.exit(75)
"""


def start(stream: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", _TALKS], stdin=subprocess.PIPE, stdout=stream, stderr=stream)


@pytest.mark.parametrize("gone", ["full", "closed", "terminal"])
def test_a_run_ends_as_it_would_where_its_log_takes_no_more(gone: str) -> None:
    ends = {"full": lambda: (0, os.open("/dev/full", os.O_WRONLY)), "closed": os.pipe, "terminal": pty.openpty}[gone]()
    process = start(ends[1])
    os.close(ends[1])
    if ends[0]:
        assert os.read(ends[0], 5)
        os.close(ends[0])
    process.communicate(b"\n")
    assert process.returncode == 75


def test_a_log_that_can_be_written_is_written() -> None:
    process = start(subprocess.PIPE)
    said = process.communicate(b"\n")[0].decode()
    assert said.startswith("begun\nstep 1/4  \\udcff  0 s left\n") and said.count("step") == 4
