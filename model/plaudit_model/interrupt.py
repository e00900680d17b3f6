"""A signal as a request to stop at the next safe place, with everything saved: SIGTERM, Ctrl-C, SIGHUP of a terminal
that is closed, SIGUSR1, which Slurm users have sent ahead of their time limit."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

LOG = logging.getLogger("plaudit.interrupt")

_INSISTING = (signal.SIGTERM, signal.SIGINT)
_SIGNALS = (*_INSISTING, signal.SIGHUP, signal.SIGUSR1)


class Interrupted(Exception):
    """The run was asked to stop and can be resumed."""

    exit_code = 75


class StopRequest:
    """While entered, the first signal is noted for `check`, its name in `received`. After it SIGTERM and SIGINT act as
    they always did; SIGHUP, which a shell and the kernel both send, and SIGUSR1 do nothing, and nothing at all where
    they were ignored before, as `nohup` has it.

    `patient` is for when there is something to save. Without it the signal raises Interrupted where it strikes.
    """

    _at_once = False

    def __init__(self) -> None:
        self.patient = True
        self.received = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            heard = (n for n in _SIGNALS if n in _INSISTING or signal.getsignal(n) != signal.SIG_IGN)
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        self._restore(_SIGNALS)

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
        if self.received:
            return
        self.received = signal.Signals(number).name
        self._restore(_INSISTING)
        if not self.patient:
            raise Interrupted(f"{self.received} outside the training loop; go on with --resume")
        if self._at_once:
            self.check()
        LOG.warning("%s: stopping at the next safe place; SIGTERM or Ctrl-C now would stop at once", self.received)

    def _restore(self, numbers: Iterable[signal.Signals]) -> None:
        for number in {*numbers} & {*self._before}:
            signal.signal(number, self._before.pop(number))
