"""What every hand-made peer has in common: one request shape, one route, readiness, a command line.

Imports nothing of ours and no model library: a peer runs in an environment of its own.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

Score = Callable[[str, list[str]], list[float]]
"""Scores of the responses to a prompt."""


class Request(BaseModel):
    prompt: str
    responses: list[str]


Build = Callable[[Path, str], Score]
"""From a directory and a dtype."""


def run(builds: Mapping[str, Build], about: str | None) -> None:
    """Serve what the chosen backend makes of a directory; handlers run in threads."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--port", type=int, default=8101)
    parser.add_argument("--backend", default=next(iter(builds)), choices=list(builds))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="a graph has its own")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    app, score = FastAPI(), builds[arguments.backend](arguments.directory, arguments.dtype)

    @app.get("/readyz")
    def ready() -> dict[str, bool]:
        return {"ready": True}

    @app.post("/score")
    def answer(request: Request) -> dict[str, list[float]]:
        return {"scores": score(request.prompt, request.responses)}

    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="warning")
