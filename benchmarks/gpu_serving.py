"""Served: over HTTP against the same engine in this process, and how long a large model takes to be ready."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from gpu_card import Bench, Case, Row, Skip, ratios
from gpu_models import RESPONSES, model_of, module_of, shared, unfrozen, unique
from processes import free_port, serving

from plaudit_model.encode import Encoded

if TYPE_CHECKING:
    import httpx2

SERVER = ("fastapi", "uvicorn", "pydantic", "httptools", "uvloop", "prometheus_client", "httpx2", "typer", "rich")
BUDGET = 16384
SERVE = "import typer; from plaudit_server.cli import serve; typer.run(serve)"
"""As `plaudit serve`, which needs an installation."""


def http(bench: Bench) -> None:
    """Items of 512 tokens, 16 a request, with one prompt and with one each; many requests in flight."""
    for kind in ("unique", "16 a prompt")[: bench.small(2, 1)]:
        case = Case("http", "Qwen3-0.6B", f"512 tokens, {kind}", seconds=30)
        bench.run(case, functools.partial(_served, bench, kind))


def _served(bench: Bench, kind: str) -> list[Row]:
    if missing := [name for name in SERVER if importlib.util.find_spec(name) is None]:
        raise Skip(f"not installed: {', '.join(missing)}")
    tokens, count = bench.small(512, 40), bench.small(1024 if kind == "unique" else 4096, 32)  # a second of work
    make = unique if kind == "unique" else shared
    items = make(tokens, count if kind == "unique" else count // 16)
    module = module_of(bench, "Qwen3-0.6B", torch.bfloat16)
    model = unfrozen(bench, module, "bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        model.save(directory, model.contract)
        model.freeze()
        port = free_port()
        options = ["--port", str(port), "--device", str(bench.device), "--dtype", "bfloat16", "--mode", "fast",
                   "--token-budget", str(BUDGET), "--cache-mb", "0"]  # fmt: skip
        with serving([sys.executable, "-c", SERVE, str(directory), *options], port, limit=300) as url:
            bodies = _bodies(items)  # what writes them is another's time
            works = {
                "engine": lambda: model.score_encoded(items, token_budget=BUDGET),
                "http": lambda: asyncio.run(_post_all(url, bodies)),
            }
            taken = bench.race_walls(works, rounds=7)
    over = ratios(taken["engine"], taken["http"])
    return [
        Row("end to end over HTTP", over, "ratio", "the engine in process", target=0.9),
        Row("items over HTTP", [len(items) / s for s in taken["http"]], "items/s"),
        Row("items in process", [len(items) / s for s in taken["engine"]], "items/s"),
    ]


def _bodies(items: list[Encoded]) -> list[bytes]:
    """RESPONSES items a request: those of one prompt, where they share it."""
    named = [{"input_ids": item.ids.tolist(), "prompt_tokens": item.prompt_tokens} for item in items]
    return [
        json.dumps({"items": named[start : start + RESPONSES]}).encode() for start in range(0, len(items), RESPONSES)
    ]


async def _post_all(url: str, bodies: list[bytes], in_flight: int = 256) -> None:
    import httpx2

    gate = asyncio.Semaphore(in_flight)
    limits = httpx2.Limits(max_connections=in_flight)
    # Without certificates, which are not needed here and take 20 ms to be read.
    async with httpx2.AsyncClient(base_url=url, timeout=300, limits=limits, verify=False) as client:
        await asyncio.gather(*(_post(client, gate, body) for body in bodies))


async def _post(client: httpx2.AsyncClient, gate: asyncio.Semaphore, body: bytes) -> None:
    async with gate:
        answer = await client.post("/score", content=body, headers={"content-type": "application/json"})
        answer.raise_for_status()


# -- ready ---------------------------------------------------------------------------------------------------

READY = """
import json, sys
from plaudit_model import warm
from plaudit_model.reward_model import RewardModel
model = RewardModel.load(sys.argv[1], device=sys.argv[2], dtype="bfloat16", mode="fast")
model.laps.lap("rest")
warm.warm_up(model, int(sys.argv[3]), lambda line: None)
model.laps.lap("warm_up")
print(json.dumps(model.laps.seconds))
"""
"""What a worker does before it takes work."""


def ready(bench: Bench) -> None:
    """From the start of a process to a model that is warm, over the time that its bytes take to be read."""
    case = Case("ready", "Llama-3.1-8B", "warm page cache, without HTTP", seconds=80)
    bench.run(case, lambda: _ready(bench))


def _ready(bench: Bench) -> list[Row]:
    model = model_of(bench, module_of(bench, "Llama-3.1-8B", torch.bfloat16), "bfloat16", "fast")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        model.save(directory, model.contract)
        del model
        bench.synchronize()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        if not bench.dry:
            _start(bench, directory)  # builds the kernels, and brings the files into the page cache
        read = _read(directory)
        start = time.monotonic()
        laps = _start(bench, directory)
        total = time.monotonic() - start
        size = sum(path.stat().st_size for path in directory.glob("*.safetensors")) / 1e9
    return [
        Row("ready beyond the reading of its bytes", [total - read], "s", "reading", target=10.0, at_most=True),
        Row("ready", [total], "s"),
        Row("reading the bytes", [read], "s"),
        Row("bytes", [size], "GB"),
        *(Row(f"part: {name}", [seconds], "s") for name, seconds in laps.items()),
    ]


def _start(bench: Bench, directory: Path) -> dict[str, float]:
    command = [sys.executable, "-c", READY, str(directory), str(bench.device), str(bench.small(BUDGET, 64))]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    laps: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return laps


def _read(directory: Path) -> float:
    """Seconds to read the weights once, from the page cache."""
    start, buffer = time.monotonic(), bytearray(16 << 20)
    for path in directory.glob("*.safetensors"):
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.monotonic() - start
