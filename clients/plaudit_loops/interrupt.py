"""SIGTERM and Ctrl-C as a request to stop at the next safe place, with everything saved."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from .errors import Interrupted

LOG = logging.getLogger("plaudit.loops")


class StopRequest:
    """While entered, the first SIGTERM or SIGINT is noted for `check`; a second one acts as it always did."""

    def __init__(self) -> None:
        self._received = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        self._restore()

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self._received:
            raise Interrupted(self._received)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received = signal.Signals(number).name
        self._restore()
        LOG.warning("%s: stopping at the next safe place; once more to stop at once", self._received)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
