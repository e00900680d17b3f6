"""SIGTERM and Ctrl-C as a request to stop at the next safe place, with everything saved."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

LOG = logging.getLogger("plaudit.interrupt")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """The run was asked to stop and can be resumed."""

    exit_code = 75


class StopRequest:
    """While entered, the first SIGTERM or SIGINT is noted for `check`, its name in `received`; a second one acts as it
    always did.

    `patient` is for when there is something to save. Without it the signal raises Interrupted where it strikes.
    """

    _at_once = False

    def __init__(self) -> None:
        self.patient = True
        self.received = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        self._restore()

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.received:
            raise Interrupted(self.received)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that changes nothing and may take long: a signal, also one from before, ends it where it is."""
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()
        if not self.patient:
            raise Interrupted(f"{self.received} outside the training loop; go on with --resume")
        if self._at_once:
            self.check()
        LOG.warning("%s: stopping at the next safe place; once more to stop at once", self.received)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
