"""The peer: sentence-transformers' CrossEncoder, one `predict` a request. Runs in its own environment.

python benchmarks/cross_encoder_server.py DIRECTORY --port 8102 --threads 2
"""

from __future__ import annotations

from pathlib import Path

import peer
import torch
from sentence_transformers import CrossEncoder


def build(directory: Path, dtype: str) -> peer.Score:
    model = CrossEncoder(
        str(directory), device="cpu", activation_fn=torch.nn.Identity(), model_kwargs={"dtype": getattr(torch, dtype)}
    )

    def score(prompt: str, responses: list[str]) -> list[float]:
        scores: list[float] = model.predict([(prompt, text) for text in responses], show_progress_bar=False).tolist()
        return scores

    return score


if __name__ == "__main__":
    peer.run({"torch": build}, __doc__)
