"""How far a run has come: a line for people, and the trackers that people look at."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG = logging.getLogger("plaudit.progress")
_PLAIN_LINES = 20

Tracker = tuple[Callable[[int, Mapping[str, float]], object], Callable[[], object]]
"""What takes the numbers after a step, by name, and what says that no more will come."""


class _Lossy(io.TextIOWrapper):
    """A stream that loses what cannot be written, and keeps nothing of it to fail on later."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)


def outlive_log() -> None:
    """From now on, whatever this process says is written or lost: a log on a full disk, a reader that has left or a
    terminal that is closed is nothing to end a run of days for. Once there is room again, the log goes on."""
    for name in ("stdout", "stderr"):
        with suppress(AttributeError, OSError):  # none at all; one in memory
            old = getattr(sys, name)
            raw = io.FileIO(old.fileno(), "w", closefd=False)
            setattr(sys, name, _Lossy(raw, old.encoding, "backslashreplace", write_through=True))


class ProgressLine:
    """A progress bar with numbers beside it; a few plain lines where there is no terminal."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self._console, self._total, self._done = console, total, done
        self._started = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("training", total=total, completed=done, numbers="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def show(self, step: int, numbers: str) -> None:
        """The numbers of a step that is done, and the time left at the pace of the steps that this process took."""
        self._progress.update(self._task, completed=step, numbers=numbers)
        if not self._console.is_terminal and (step % max(1, self._total // _PLAIN_LINES) == 0 or step == self._total):
            left = (time.monotonic() - self._started) / max(step - self._done, 1) * (self._total - step)
            self._console.print(f"step {step}/{self._total}  {numbers}  {left:,.0f} s left")


class Trackers:
    """Where the numbers of a run go besides metrics.jsonl. None of them can stop a run: one that fails is named in a
    warning and left out from then on."""

    def __init__(self, names: Iterable[str], begin: Callable[[str], Tracker]) -> None:
        self._members: dict[str, Tracker] = {}
        for name in names:
            try:
                self._members[name] = begin(name)
            except Exception as error:  # a tracker must not cost a training run
                LOG.warning("%s could not be started and is left out: %s", name, error)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name, after optimiser step `step`."""
        for name, (log, _) in list(self._members.items()):
            try:
                log(step, values)
            except Exception as error:
                LOG.warning("%s failed and is left out from here: %s", name, error)
                del self._members[name]

    def close(self) -> None:
        for name, (_, close) in self._members.items():
            try:
                close()
            except Exception as error:
                LOG.warning("%s did not close: %s", name, error)
