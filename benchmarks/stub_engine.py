"""A server in plaudit's wire format that computes nothing: it paces itself, and a score is a function of its item.

    python benchmarks/stub_engine.py PORT [--rate 2000] [--die-after ITEMS] [--max-items 4096]

Items are answered at `rate` per second, first come first served, as a device would; answers carry their request's id.
With `--die-after` the process ends without a word in the middle of its work, connections open.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import time
import zlib
from typing import Any

IDENTITY = {"model": "stub", "revision": "1", "numerics": "stub"}
MAX_BODY_BYTES = 64 * 1024 * 1024


def score_of(prompt: str, response: str) -> float:
    """Exact in JSON, and different for any two items of a benchmark."""
    return zlib.crc32(f"{prompt}\0{response}".encode()) / 2**20


class Engine:
    def __init__(self, rate: float, die_after: float, max_items: int) -> None:
        self.rate = rate
        self.about = {**IDENTITY, "limits": {"max_items": max_items, "max_body_bytes": MAX_BODY_BYTES}}
        self.left = die_after
        self.free = 0.0

    async def score(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        pairs = [(item["prompt"], r) for item in items for r in item.get("responses") or [item["response"]]]
        now = time.monotonic()
        self.free = max(self.free, now) + len(pairs) / self.rate
        await asyncio.sleep(self.free - now)
        self.left -= len(pairs)
        if self.left < 0:
            os._exit(1)
        scores = [score_of(*pair) for pair in pairs]
        results = [{"index": index, "score": score, "tokens": 1} for index, score in enumerate(scores)]
        return {**IDENTITY, "request_id": "stub", "scores": scores, "results": results}

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                body = await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r\n")[0] or 0))
                answer = await self.score(json.loads(body)["items"]) if body else self.about
                payload = json.dumps(answer).encode()
                echo = head.partition(b"x-request-id: ")[2].partition(b"\r\n")[0]
                lines = b"content-length: %d\r\nx-request-id: %b\r\n" % (len(payload), echo)
                writer.write(b"HTTP/1.1 200 OK\r\n%b\r\n%b" % (lines, payload))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("--rate", type=float, default=2000.0, help="items per second")
    parser.add_argument("--die-after", type=float, default=math.inf, help="end in the middle, after so many items")
    parser.add_argument("--max-items", type=int, default=4096, help="of a request")
    arguments = parser.parse_args()
    engine = Engine(arguments.rate, arguments.die_after, arguments.max_items)
    server = await asyncio.start_server(engine.connection, "127.0.0.1", arguments.port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
