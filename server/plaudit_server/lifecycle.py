"""From the first byte to the last: listen, load, serve, drain.

The socket listens before the models are loaded, so that probes are answered from the start. SIGTERM (or Ctrl-C):
not ready any more, then nothing new is taken, what was taken is finished, exit 0. A second signal exits at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from . import protocol
from .served import Models
from .settings import ServerSettings, SettingsError

logger = logging.getLogger("plaudit.server")

_BACKLOG = 4096
_WRITE_SECONDS = 5
"""For writing the last answers out, once all scores are there."""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: `Lifecycle` has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Lifecycle:
    """Runs one application with its models. Owns the decision to stop."""

    def __init__(self, settings: ServerSettings, app: ASGIApp, models: Models, listener: socket.socket) -> None:
        self._settings = settings
        self._models = models
        self._listener = listener
        self._stop = asyncio.Event()
        arguments = protocol.arguments(settings.limits)
        self._server = _Server(
            uvicorn.Config(app, backlog=_BACKLOG, timeout_graceful_shutdown=_WRITE_SECONDS, **arguments)
        )

    async def run(self, announce: Callable[[], None]) -> None:
        """Serve until told to stop; `announce` is called once every model is ready. Raises WorkerFailed."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` has it
                loop.add_signal_handler(number, self._on_signal, number)
        listening = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        try:
            if await self._load():
                announce()
                freeze()
                await self._stop.wait()
                await self._drain()
        finally:
            self._server.should_exit = True
            await listening
            await asyncio.gather(*(model.close() for model in self._models))

    async def _load(self) -> bool:
        """Start every model; False if told to stop meanwhile."""
        stopped: asyncio.Task[object] = asyncio.create_task(self._stop.wait())
        loading: asyncio.Task[object] = asyncio.create_task(self._load_all())
        await asyncio.wait((stopped, loading), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if loading.done():
            await loading
            return True
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        return False

    async def _load_all(self) -> None:
        tasks = [asyncio.create_task(model.start()) for model in self._models]
        try:
            await asyncio.gather(*tasks)
        finally:  # one that cannot be loaded ends the others
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _drain(self) -> None:
        logger.info("leaving: finishing what was taken; a second signal exits at once")
        self._models.leaving = True
        await asyncio.sleep(self._settings.lameduck_seconds)
        await asyncio.gather(*(model.engine.drain(self._settings.drain_seconds) for model in self._models))

    def _on_signal(self, number: int) -> None:
        if self._stop.is_set() and number != signal.SIGHUP:  # which a shell and the kernel both send
            logger.warning("second signal: exiting now")
            os._exit(128 + number)  # the worker ends with this process
        self._stop.set()


def listen(settings: ServerSettings) -> socket.socket:
    """A bound socket. Raises SettingsError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # A client that has vanished, or reads nothing of its answer for three minutes, is gone: its request holds memory.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 180_000)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise SettingsError(f"cannot listen on {settings.host}:{settings.port}: {reason}; try --port 0") from error
    return listener


def allow_connections() -> None:
    """Let this process have as many open sockets as the system allows: trainers open one a sample."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def freeze() -> None:
    """Take everything that is there to stay out of the garbage collector's sight: its full passes stop the loop.
    What requests in flight hold is no reason to look either: a request's objects are freed without the collector."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
