"""The plain way to score, kept apart from ours: transformers' tokenizer, eager fp32 forward, one item at a time.

Nothing here calls our encoder, packing, attention or head, so agreement with it means something.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from .adapter import Adapter
from .base import quiet
from .contract import EIGHT_BITS, RewardContract
from .infer import contract_for, is_adapter, tokenizer_home
from .records import Conversation, Message


class PlainModel:
    """`AutoModelForSequenceClassification` in eager fp32 with `AutoTokenizer`; an adapter in PEFT's own layers."""

    def __init__(self, directory: Path) -> None:
        quiet()
        self.contract: RewardContract = contract_for(directory)
        home = tokenizer_home(directory)
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(home, local_files_only=True)
        self.module: Any
        if is_adapter(directory):
            self.module = Adapter.open(directory, self.contract, attn_implementation="eager").module
        else:
            self.module = transformers.AutoModelForSequenceClassification.from_pretrained(
                directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True, use_safetensors=True
            ).eval()

    def encode(self, prompt: Sequence[Message], response: str) -> dict[str, list[int]]:
        """The model's inputs for one item, by transformers' own tokenizer."""
        messages = [{"role": m.role, "content": m.content} for m in prompt]
        source = self.contract.template.source
        if self.contract.template.kind == "pair":
            rendered = self._tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False)
            # as a batch of one pair: given singly, transformers takes an empty response for no response
            return {name: ids[0] for name, ids in self._tokenizer([rendered], [response]).items()}
        messages.append({"role": "assistant", "content": response})
        ids = self._tokenizer.apply_chat_template(messages, chat_template=source, tokenize=True, return_dict=True)
        return {"input_ids": list(ids["input_ids"])}

    @torch.inference_mode()
    def score(self, conversations: Sequence[Conversation]) -> NDArray[np.float32]:
        """Attributes (N, A) fp32. Items longer than the contract's limit are the caller's business."""
        rows = []
        for prompt, response in conversations:
            inputs = {name: torch.tensor([ids]) for name, ids in self.encode(prompt, response).items()}
            rows.append(self.module(**inputs).logits[0].float().numpy())
        return np.stack(rows)


@dataclass(frozen=True)
class Agreement:
    """How two sets of scores of the same items compare."""

    dtype: str
    n: int
    max_difference: float
    std: float
    tolerance: float
    kendall_tau: float
    flips: int
    far_pairs: int

    @property
    def holds(self) -> bool:
        """No difference above the tolerance and no flip among pairs farther apart than twice it. 8 bits round too
        coarsely for a bound on every difference: there the order is what must hold, by those pairs and by Kendall's
        tau over all."""
        coarse = self.dtype in EIGHT_BITS
        close = self.kendall_tau >= KENDALL_FLOOR if coarse else self.max_difference <= self.tolerance
        return close and self.flips == 0


RELATIVE_TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "int8": 1e-1, "fp8": 1e-1}
"""Of max(1, sd of the reference scores)."""

KENDALL_FLOOR = 0.95
"""Of scores in 8 bits against the reference."""


def agreement(ours: NDArray[np.float32], reference: NDArray[np.float32], dtype: str) -> Agreement:
    """Compare scores (N,) with reference scores (N,) of the same items."""
    a, b = ours.astype(np.float64), reference.astype(np.float64)
    std = float(b.std())
    tolerance = RELATIVE_TOLERANCE[dtype] * max(1.0, std)
    left, right = np.triu_indices(len(a), 1)
    difference_a, difference_b = a[left] - a[right], b[left] - b[right]
    far = np.abs(difference_b) > 2 * tolerance
    same = np.sign(difference_a) * np.sign(difference_b)
    decided = (difference_a != 0) & (difference_b != 0)
    return Agreement(
        dtype=dtype,
        n=len(a),
        max_difference=float(np.abs(a - b).max()) if len(a) else 0.0,
        std=std,
        tolerance=tolerance,
        kendall_tau=float(same[decided].mean()) if decided.any() else 1.0,
        flips=int((same[far] < 0).sum()),
        far_pairs=int(far.sum()),
    )
