"""The peer: how reward models are served by hand. FastAPI, transformers or ONNX Runtime, one padded forward a request.

Run as `python benchmarks/padded_server.py DIRECTORY --port 8101 --dtype float32 --threads 2`. It is written as well
as its kind can be: SDPA attention, inference mode, right padding, the handler in a thread. With `--backend onnx` it
runs the `model.onnx` of an export, in the dtype of that graph, with all of ONNX Runtime's graph optimisations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peer
import torch
import transformers


def with_torch(directory: Path, dtype: str) -> peer.Score:
    tokenizer = _tokenizer(directory)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=getattr(torch, dtype)
    ).eval()

    def score(prompt: str, responses: list[str]) -> list[float]:
        with torch.inference_mode():
            scores: list[float] = model(**_batch(tokenizer, prompt, responses)).logits[:, 0].float().tolist()
        return scores

    return score


def with_onnxruntime(directory: Path, dtype: str) -> peer.Score:
    import onnxruntime

    tokenizer = _tokenizer(directory)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(directory / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def score(prompt: str, responses: list[str]) -> list[float]:
        batch = _batch(tokenizer, prompt, responses)
        found = session.run(["scores"], {name: batch[name].numpy() for name in names})[0]
        scores: list[float] = found[:, 0].tolist()
        return scores

    return score


def _tokenizer(directory: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.padding_side = "right"
    return tokenizer


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
    peer.run({"torch": with_torch, "onnx": with_onnxruntime}, __doc__)
