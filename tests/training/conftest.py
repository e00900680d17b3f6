"""Preference data that a tiny model can learn, and examples made from it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from plaudit_model.records import Comparison, Message, Origin, Record

Toy = Callable[[int, int], list[Record]]

_WORDS = ["red", "green", "blue", "tree", "house", "water", "stone", "wind", "fire", "light"]


def _toy_record(number: int, draw: random.Random) -> Record:
    """Two to four responses; of two, the one with more `indeed` in it is better."""
    prompt = " ".join(draw.choices(_WORDS, k=draw.randint(5, 30))) + "?"
    grades = draw.sample(range(4), draw.choice((2, 2, 2, 3, 4)))
    responses = tuple(" ".join([*draw.choices(_WORDS, k=draw.randint(1, 9)), *["indeed"] * grade]) for grade in grades)
    comparisons = tuple(
        Comparison(i, j, "first" if grades[i] > grades[j] else "second")
        for i in range(len(grades)) for j in range(i)
    )  # fmt: skip
    return Record(f"toy-{number}", (Message("user", prompt),), responses, comparisons, Origin("toy", number + 1))


@pytest.fixture(scope="session")
def toy() -> Toy:
    """`toy(n, seed)` is n records that a tiny model learns in seconds."""

    def make(n: int, seed: int) -> list[Record]:
        draw = random.Random(seed)
        return [_toy_record(number, draw) for number in range(n)]

    return make


@pytest.fixture(scope="session")
def as_jsonl() -> Callable[[Sequence[Record]], str]:
    """Records as the lines of a TRL preference file, one comparison a line."""

    def write(records: Sequence[Record]) -> str:
        lines = []
        for record in records:
            for c in record.comparisons:
                chosen, rejected = (c.first, c.second) if c.outcome == "first" else (c.second, c.first)
                row = {"prompt": record.prompt[0].content, "chosen": record.responses[chosen],
                       "rejected": record.responses[rejected]}  # fmt: skip
                lines.append(json.dumps(row))
        return "\n".join(lines) + "\n"

    return write


# A process that has imported everything and forks one child for each command line: a training run then starts in
# a moment, in a process of its own that can be killed. It runs single-threaded until it forks.
_COMMANDS = """
import gc, json, os, sys
import peft, torch, transformers.models.qwen3.modeling_qwen3, torch.utils.tensorboard
import plaudit_training.run, plaudit_training.quality, plaudit_training.starter_fit
from plaudit.cli import main
torch.set_num_threads(1)
gc.freeze()
for line in sys.stdin:
    arguments, folder = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
        sys.argv = ["plaudit", *arguments]
        try:
            main()
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code)  # taking torch down in good order costs a second
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Commands:
    """Runs `plaudit` command lines, one at a time, each in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMANDS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=os.environ | {"PLAUDIT_HOME": str(folder / "home")},
        )

    def start(self, *arguments: str | Path) -> int:
        """The process id of the command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([[str(a) for a in arguments], str(self.folder)]) + "\n")
        self._process.stdin.flush()
        return self._number()

    def wait(self) -> int:
        """Its exit code, negative for a signal."""
        return self._number()

    def run(self, *arguments: str | Path) -> int:
        self.start(*arguments)
        return self.wait()

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def close(self) -> None:
        self._process.communicate()

    def _number(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


@pytest.fixture(scope="session")
def plaudit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """The `plaudit` command, in a directory and with a PLAUDIT_HOME of its own."""
    commands = Commands(tmp_path_factory.mktemp("plaudit"))
    yield commands
    commands.close()
