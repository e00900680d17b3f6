"""The peer: how reward models are served by hand. FastAPI, transformers, one padded forward a request.

Run as `python benchmarks/padded_server.py DIRECTORY --port 8101 --dtype float32 --threads 2`. It is written as well
as its kind can be: SDPA attention, inference mode, right padding, the handler in a thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peer
import torch
import transformers


def build(directory: Path, dtype: str) -> peer.Score:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.padding_side = "right"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=getattr(torch, dtype)
    ).eval()

    def score(prompt: str, responses: list[str]) -> list[float]:
        with torch.inference_mode():
            scores: list[float] = model(**_batch(tokenizer, prompt, responses)).logits[:, 0].float().tolist()
        return scores

    return score


def _batch(tokenizer: Any, prompt: str, responses: list[str]) -> Any:
    if not tokenizer.chat_template:
        return tokenizer([prompt] * len(responses), responses, padding=True, return_tensors="pt")
    turns = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}] for response in responses
    ]
    texts = [tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns]
    batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    batch.pop("token_type_ids", None)
    return batch


if __name__ == "__main__":
    peer.run(build, __doc__)
