"""What the server adds to one short item when nothing else is going on.

One client on one kept connection, the next request once the last is answered; no two items alike, the score cache off.
After each answer the same item is scored by a model in this process, with the same threads and dtype. `engine_ms` is
what the worker says of its forward (`timing.compute_ms`), `queue_ms` what passed besides between the item's submission
and its score, `direct_ms` the call of `RewardModel` here; `over_*` are the differences, item by item. Target: no more
than 3 ms over the engine.

    python benchmarks/idle_latency.py --requests 500
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import inputs
import rows
import torch
from parity import write_minilm
from processes import free_port, plaudit_command, serving
from shapes import write_decoder_25m

from plaudit_model.reward_model import RewardModel
from plaudit_model.starter import directory as starter_directory
from plaudit_model.starter import preference_records

WARM_UP = 20
"""Requests that are not counted; by their end the batcher knows that nobody comes for a lone item."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--models", nargs="+", choices=["starter", "decoder", "minilm"], default=["starter", "decoder", "minilm"]
    )
    arguments = parser.parse_args()
    inputs.check(*arguments.models)
    torch.set_num_threads(arguments.threads)
    makers = {"starter": lambda _: starter_directory(), "decoder": write_decoder_25m, "minilm": write_minilm}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            measure(name, makers[name](Path(folder) / name), arguments)


def measure(name: str, directory: Path, arguments: argparse.Namespace) -> None:
    model = RewardModel.load(directory, dtype="float32")
    port = free_port()
    options = ("--dtype", "float32", "--threads", str(arguments.threads), "--cache-mb", "0")
    with serving(plaudit_command(directory, port, *options), port), Connection(port) as connection:
        samples = [sample(connection, model, item) for item in short_items(WARM_UP + arguments.requests)][WARM_UP:]
    spreads: dict[str, float] = {}
    for column in samples[0]:
        spread = rows.spread([values[column] for values in samples])
        spreads |= {f"{column}_{at}": value for at, value in spread.items()}
    rows.append("idle_latency", {"model": name, "threads": arguments.threads, **spreads, "requests": len(samples)})


def sample(connection: Connection, model: RewardModel, item: dict[str, str]) -> dict[str, float]:
    """One item over HTTP, then here."""
    seconds, answer = connection.score(item)
    encoded = model.encoder.encode(item["prompt"], item["response"])
    start = time.perf_counter()
    model.score_encoded([encoded])
    http, direct = 1000 * seconds, 1000 * (time.perf_counter() - start)
    engine, queue = answer["timing"]["compute_ms"], answer["timing"]["queue_ms"]
    return {
        "tokens": answer["usage"]["total_tokens"],
        "http_ms": http,
        "queue_ms": queue,
        "engine_ms": engine,
        "direct_ms": direct,
        "over_engine_ms": http - engine,
        "over_direct_ms": http - direct,
    }


def short_items(count: int) -> list[dict[str, str]]:
    """Prompts and responses of the starter tasks, none like another."""
    records = preference_records(count, seed=11)
    order = random.Random(0).sample(range(count), count)
    return [
        {"prompt": f"{number}. {records[number].prompt[-1].content}", "response": records[number].responses[0]}
        for number in order
    ]


class Connection:
    """A kept connection with a client that costs next to nothing."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._socket.close()

    def score(self, item: dict[str, str]) -> tuple[float, dict[str, Any]]:
        """Seconds from the request to the last byte of its answer, and the answer."""
        body = json.dumps(item).encode()
        head = "POST /score HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        start = time.perf_counter()
        self._socket.sendall(request)
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._receive()
        top, _, text = received.partition(b"\r\n\r\n")
        length = int(top.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        while len(text) < length:
            text += self._receive()
        seconds = time.perf_counter() - start
        if not top.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"the server answered {text.decode()}")
        return seconds, cast("dict[str, Any]", json.loads(text))

    def _receive(self) -> bytes:
        chunk = self._socket.recv(65536)
        if not chunk:
            raise SystemExit("the server closed the connection")
        return chunk


if __name__ == "__main__":
    main()
