"""The peer: how reward models are served by hand. FastAPI, transformers, one padded forward a request.

Run as `python benchmarks/padded_server.py DIRECTORY --port 8101 --dtype float32 --threads 2`. It is written as well
as its kind can be: SDPA attention, inference mode, right padding, the handler in a thread.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import torch
import transformers
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel


class Request(BaseModel):
    prompt: str
    responses: list[str]


def build(directory: Path, dtype: str) -> FastAPI:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.padding_side = "right"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=getattr(torch, dtype)
    ).eval()
    chat = bool(tokenizer.chat_template)
    app = FastAPI()

    @app.get("/readyz")
    def ready() -> dict[str, bool]:
        return {"ready": True}

    @app.post("/score")
    def score(request: Request) -> dict[str, list[float]]:
        if chat:
            turns = [
                [{"role": "user", "content": request.prompt}, {"role": "assistant", "content": response}]
                for response in request.responses
            ]
            texts = [tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns]
            batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
        else:
            prompts = [request.prompt] * len(request.responses)
            batch = tokenizer(prompts, request.responses, padding=True, return_tensors="pt")
        batch.pop("token_type_ids", None) if chat else None
        with torch.inference_mode():
            return {"scores": model(**batch).logits[:, 0].float().tolist()}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--port", type=int, default=8101)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    app = build(arguments.directory, arguments.dtype)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
