"""How far a run has come, for people."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_LINES = 20


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
