"""The self-test at load: scores must come from the item alone, and agree with the plain model.

A handful of items is scored together through the packed path, one by one through it, and one by one through
the architecture's own eager forward. A wiring fault in any of them shows as a difference far above rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from .encode import Encoded
from .errors import ContractError
from .heads import apply_head, last_hidden_state

if TYPE_CHECKING:
    from .reward_model import RewardModel

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}
"""Largest difference accepted at load, relative to max(1, |score|). It tells wiring from rounding; `plaudit
verify` measures the rounding itself."""


def prove(model: RewardModel) -> None:
    """Raise ContractError if the model's scores are not finite, move with the batch, or differ from its own
    plain forward."""
    items = _items(model)
    together = model.score_encoded(items)
    if not np.isfinite(together).all():
        raise ContractError("the model gives scores that are not finite")
    alone = np.concatenate([model.score_encoded([item]) for item in items])
    if model.mode == "exact" and not np.array_equal(together, alone):
        raise ContractError("scores move with the batch in exact mode on this machine; serve with --mode fast")
    _compare(together, alone, model.dtype, "scores move with the batch")
    _compare(together, plain_scores(model, items), model.dtype, "packed scores differ from the plain model's")


@torch.inference_mode()
def plain_scores(model: RewardModel, items: list[Encoded]) -> NDArray[np.float32]:
    """Attributes (N, A) fp32 by the architecture's own eager forward, one item at a time."""
    module = model.module
    served = module.config._attn_implementation  # type: ignore[union-attr]
    module.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        return np.concatenate([_plain(model, item) for item in items])
    finally:
        module.set_attn_implementation(served)  # type: ignore[operator]


def _plain(model: RewardModel, item: Encoded) -> NDArray[np.float32]:
    module = model.module
    arguments = {"input_ids": torch.from_numpy(item.ids.astype(np.int64))[None].to(model.device)}
    if model.contract.template.kind == "pair" and int(getattr(module.config, "type_vocab_size", 0) or 0) > 1:
        types = (np.arange(len(item.ids)) >= item.prompt_tokens) & (item.prompt_tokens > 0)
        arguments["token_type_ids"] = torch.from_numpy(types.astype(np.int64))[None].to(model.device)
    pooled = last_hidden_state(module, **arguments)[:, -1 if model.contract.pooling == "last" else 0]
    scores: NDArray[np.float32] = apply_head(module, pooled).cpu().numpy()
    return scores


def _compare(ours: NDArray[np.float32], theirs: NDArray[np.float32], dtype: str, complaint: str) -> None:
    worst = float((np.abs(ours - theirs) / np.maximum(1.0, np.abs(theirs))).max())
    if not worst <= TOLERANCE[dtype]:
        raise ContractError(f"{complaint}: by {worst:.2g}, more than rounding in {dtype} explains")


def _items(model: RewardModel) -> list[Encoded]:
    """Two responses to one prompt, a one-token item, and one longer than a block."""
    count = min(model.encoder.vocabulary, int(model.module.config.vocab_size))  # type: ignore[union-attr, arg-type]
    generator = np.random.default_rng(0)
    longest = model.contract.max_length

    def item(prompt: NDArray[np.int32], tokens: int) -> Encoded:
        own = generator.integers(0, count, tokens, dtype=np.int32)
        return Encoded(np.concatenate([prompt, own])[-longest:], min(len(prompt), longest - 1))

    prompt = generator.integers(0, count, 37, dtype=np.int32)
    return [item(prompt, 21), item(prompt, 40), item(prompt[:0], 1), item(prompt[:0], 70)]
