"""A TCP proxy that loses: resets, cuts, delays, and sends responses twice, as broken middle boxes do."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter
from typing import Literal

Fate = Literal["whole", "refuse", "reset", "cut", "delay", "interim", "twice", "late", "swallow"]


class LossyProxy:
    """Between a client and the server on `port`. Every exchange meets a fate.

    refuse  the request never arrives           reset    it arrives, the answer does not
    cut     half of the answer                  delay    the answer comes later
    interim 103 Early Hints, twice, before it   twice    the answer, and at once the answer again
    late    the answer, and later again, on a connection that may be in use for another request by then
    swallow it arrives, the answer never does, and the connection stays open until the client leaves

    `met` counts the fates.
    """

    def __init__(self, port: int, fates: dict[Fate, int], seed: int = 0) -> None:
        self.met: Counter[str] = Counter()
        self._target = port
        self._fates = fates
        self._deck: list[Fate] = []
        self._random = random.Random(seed)
        self._open: set[asyncio.Task[None] | None] = set()  # a loop alone does not keep them alive
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        opened = asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024)
        self._server = asyncio.run_coroutine_threadsafe(opened, self._loop).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        async def stop() -> None:
            self._server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _draw(self) -> Fate:
        """From a shuffled deck with each fate as often as its weight: every one of them is met before long."""
        if not self._deck:
            self._deck = [fate for fate, weight in self._fates.items() for _ in range(weight)]
            self._random.shuffle(self._deck)
        return self._deck.pop()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind = None
        self._open.add(asyncio.current_task())
        try:
            behind = await asyncio.open_connection("127.0.0.1", self._target)
            while await self._exchange(reader, writer, *behind):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._open.discard(asyncio.current_task())
            writer.transport.abort()
            if behind is not None:
                behind[1].transport.abort()

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        answers: asyncio.StreamReader,
        server: asyncio.StreamWriter,
    ) -> bool:
        request = await _message(reader)
        fate = self._draw()
        self.met[fate] += 1
        if fate == "refuse":
            return False
        server.write(request)
        if fate == "reset":
            await server.drain()
            return False
        answer = await _message(answers)
        if fate == "swallow":
            await reader.read()
            return False
        if fate == "delay":
            await asyncio.sleep(self._random.random() * 0.1)
        if fate == "interim":
            writer.write(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" * 2)
        writer.write(answer[: len(answer) // 2] if fate == "cut" else answer * 2 if fate == "twice" else answer)
        await writer.drain()
        if fate == "late":
            with contextlib.suppress(ConnectionError):
                await asyncio.sleep(0.002)
                writer.write(answer)
                await writer.drain()
        return fate != "cut"


async def _message(reader: asyncio.StreamReader) -> bytes:
    """One HTTP message with a content-length, or without a body."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return head + await reader.readexactly(int(length or 0))
