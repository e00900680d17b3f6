"""The front alone: HTTP, validation, tokenising, batching and answers, with a worker that answers at once.

One server process, and the load from a process of its own on the other core: raw sockets that each keep one request in
flight, so that the client costs next to nothing. Bodies: about 120 tokens of text, no two alike, and the same as
token ids. The score cache is off. With --wrk the load is wrk's, where that is installed.

    python benchmarks/front.py --seconds 5 --rounds 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rows
import uvloop
from processes import free_port, serving
from shapes import text_of, write_decoder_25m

from plaudit_model.encode import Encoder
from plaudit_model.packing import Group
from plaudit_server import messages
from plaudit_server.domain import ModelInfo
from plaudit_server.link import Frame
from plaudit_server.messages import LoadOrder, Scores
from plaudit_server.worker import Worker, WorkerHost

CONNECTIONS = 32
BODIES = 256


class InstantWorker(Worker):
    """Takes batches and answers each at once."""

    def __init__(self, info: ModelInfo) -> None:
        self.pid, self.info, self._process = os.getpid(), info, None
        self._answers: asyncio.Queue[Frame | None] = asyncio.Queue()

    def send(self, groups: Sequence[Group]) -> None:
        count = sum(len(group.suffixes) for group in groups)
        self._answers.put_nowait(messages.scores_frame(Scores(np.zeros((count, 1), np.float32), 0.0)))

    async def receive(self) -> Frame | None:
        return await self._answers.get()

    def kill(self) -> None:
        self._answers.put_nowait(None)

    leave = kill

    async def close(self) -> None:
        self.kill()


class InstantHost(WorkerHost):
    """In the place of the process that forks workers."""

    async def launch(self, order: LoadOrder, load_seconds: float | None = None) -> InstantWorker:
        info = ModelInfo(
            "none", ("score",), "0", "none", "float32", "exact", "none", "none", "none", "prompts", 2048, 0
        )
        return InstantWorker(info)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--wrk", action="store_true", help="let wrk send the requests")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve, arguments.port)
    if arguments.load:
        return uvloop.run(load(arguments.load, arguments.port, arguments.seconds))
    with tempfile.TemporaryDirectory() as folder:
        model = write_decoder_25m(Path(folder) / "decoder-25m")
        measure(model, write_bodies(model, Path(folder)), arguments)


def measure(model: Path, bodies: dict[str, Path], arguments: argparse.Namespace) -> None:
    port = free_port()
    with serving([*_pinned(0), sys.executable, __file__, "--serve", str(model), "--port", str(port)], port):
        for kind, path in bodies.items():
            rates = [rate(path, port, arguments) for _ in range(arguments.rounds + 1)][1:]
            rows.append(
                "front",
                {
                    "body": f"{kind} (wrk)" if arguments.wrk else kind,
                    "bytes": round(np.mean([len(body) for body in path.read_bytes().splitlines()])),
                    "connections": CONNECTIONS,
                    **{f"requests_s_{name}": value for name, value in rows.spread(rates).items()},
                    "rounds": len(rates),
                },
            )


def rate(bodies: Path, port: int, arguments: argparse.Namespace) -> float:
    """Requests a second of one round."""
    if arguments.wrk:
        script = bodies.with_suffix(".lua")
        script.write_text(_WRK, encoding="utf-8")
        load = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{round(arguments.seconds)}s", "-s", str(script)]
        command = [*_pinned(1), *load, f"http://127.0.0.1:{port}", "--", str(bodies)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        if "Non-2xx" in said:
            raise SystemExit(said)
        return float(said.split("Requests/sec:")[1].split()[0])
    command = [*_pinned(1), sys.executable, __file__, "--load", str(bodies), "--port", str(port)]
    command += ["--seconds", str(arguments.seconds)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


_WRK = """
local bodies, sent = {}, 0
function init(arguments)
  for line in io.lines(arguments[1]) do bodies[#bodies + 1] = line end
end
function request()
  sent = sent + 1
  return wrk.format("POST", "/score", {["content-type"] = "application/json"}, bodies[sent * 37 % #bodies + 1])
end
"""


def _pinned(core: int) -> list[str]:
    cores = sorted(os.sched_getaffinity(0))
    return ["taskset", "-c", str(cores[core % len(cores)])]


def write_bodies(model: Path, folder: Path) -> dict[str, Path]:
    """A file of request bodies for each kind, one a line."""
    encoder, rng = Encoder.open(model), random.Random(0)
    texts, ids = [], []
    for _ in range(BODIES):
        prompt, response = text_of(encoder, 52, rng), text_of(encoder, 58, rng)
        encoded = encoder.encode(prompt, response)
        texts.append({"prompt": prompt, "response": response})
        ids.append({"items": [{"input_ids": encoded.ids.tolist(), "prompt_tokens": encoded.prompt_tokens}]})
    paths = {}
    for kind, bodies in {"text, 120 tokens": texts, "input_ids, 120 tokens": ids}.items():
        paths[kind] = folder / f"{kind.split(',')[0]}.jsonl"
        paths[kind].write_text("".join(json.dumps(body) + "\n" for body in bodies), encoding="utf-8")
    return paths


def serve(model: Path, port: int) -> None:
    """Our server, its own lifecycle and settings, with an instant worker."""
    from plaudit_server.app import build_app
    from plaudit_server.engine import Engine, EngineSettings
    from plaudit_server.lifecycle import Lifecycle, listen
    from plaudit_server.metrics import Metrics
    from plaudit_server.served import Models, Name, open_model
    from plaudit_server.settings import ServerSettings

    settings, engine, metrics = ServerSettings(port=port), EngineSettings(cache_bytes=0), Metrics()
    served = open_model(Name.parse(str(model)), settings, engine, metrics)
    served.engine = Engine(str(model), engine, served.metrics, InstantHost())
    models = Models([served])
    app = build_app(settings, models, metrics)
    with listen(settings) as listener:
        uvloop.run(Lifecycle(settings, app, models, listener).run(lambda: None))


async def load(path: Path, port: int, seconds: float) -> None:
    """Prints requests a second over all connections."""
    bodies = path.read_bytes().splitlines()
    head = "POST /score HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n"
    requests = [head.format(len(body)).encode() + body for body in bodies]
    end = time.perf_counter() + seconds

    async def connection(number: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        done = number * 37
        while time.perf_counter() < end:
            writer.write(requests[done % len(requests)])
            answer = await reader.readuntil(b"\r\n\r\n")
            if not answer.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"the server answered {answer.splitlines()[0].decode()}")
            await reader.readexactly(int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            done += 1
        writer.close()
        return done - number * 37

    started = time.perf_counter()
    counts = await asyncio.gather(*(connection(number) for number in range(CONNECTIONS)))
    print(sum(counts) / (time.perf_counter() - started))


if __name__ == "__main__":
    main()
