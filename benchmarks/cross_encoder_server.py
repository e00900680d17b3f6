"""The peer: sentence-transformers' CrossEncoder behind FastAPI, one `predict` a request. Runs in its own environment.

python benchmarks/cross_encoder_server.py DIRECTORY --port 8102 --threads 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import CrossEncoder


class Request(BaseModel):
    prompt: str
    responses: list[str]


def build(directory: Path) -> FastAPI:
    model = CrossEncoder(str(directory), device="cpu")
    app = FastAPI()

    @app.get("/readyz")
    def ready() -> dict[str, bool]:
        return {"ready": True}

    @app.post("/score")
    def score(request: Request) -> dict[str, list[float]]:
        pairs = [(request.prompt, response) for response in request.responses]
        return {"scores": model.predict(pairs, show_progress_bar=False).tolist()}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--port", type=int, default=8102)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    uvicorn.run(build(arguments.directory), host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
