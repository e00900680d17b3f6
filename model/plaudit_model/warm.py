"""What a model computes before it is said to be ready, so that no request waits for a kernel to be built or loaded.

On CUDA a kernel is compiled, and a library's loaded, when it is first launched. Here every size of batch that serving
can meet is computed once: powers of two up to the token budget, as whole sequences, as many short ones, and with a
shared prompt; and the longest sequence, which is a batch of its own where it exceeds the budget.

On a CPU nothing is compiled but oneDNN's set-up of a product for a number of rows. The self-test has met most of the
small numbers, where it would weigh. Each later one costs 4 to 6 products of 0.1 to 0.25 ms each, once: 0.2 to 1.6% of
the forward that meets it (25M decoder and MiniLM, fp32, AVX2). Up to 3.7 ms a product were seen with AVX-512: two
seconds in a server's life for the 128 numbers below a budget of 4,096, where computing every one of them beforehand
takes half a minute. So it is left to the forwards that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from plaudit_kernels import BLOCK

from .encode import Encoded
from .packing import group_items

if TYPE_CHECKING:
    from .reward_model import RewardModel

_SHORT = 8
"""Tokens of the responses that share a prompt, and of many short items."""


def pays(model: RewardModel) -> bool:
    """Whether warming up saves more than it costs."""
    return torch.device(model.device).type == "cuda"


def warm_up(model: RewardModel, token_budget: int, tell: Callable[[str], None]) -> int | None:
    """Compute the batches; `tell` is told how far it is, in a line. What does not fit into memory is left out, with all
    that is larger, and told; half of it is returned, else None."""
    batches = list(warming(token_budget, model.contract.max_length, share=model.shares_prompt))
    for number, items in enumerate(batches, 1):
        try:
            model.score_encoded(items, token_budget=token_budget)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            tokens = sum(group.tokens for group in group_items(items, share=model.shares_prompt))
            tell(f"out of memory over {tokens} tokens: larger batches are not warmed up")
            return tokens // 2
        if number % 8 == 0 or number == len(batches):
            tell(f"warming up: {number} of {len(batches)} batches")
    return None


def warming(token_budget: int, max_length: int, *, share: bool) -> Iterator[list[Encoded]]:
    """Batches of growing size."""
    sizes = [1 << power for power in range(BLOCK.bit_length() - 1, token_budget.bit_length())]
    for size in sorted({min(size, token_budget) for size in sizes} | {token_budget}):
        yield [_item(0, min(max_length, size - at)) for at in range(0, size, max_length)]
        yield [_item(0, min(_SHORT, max_length)) for _ in range(0, size, _SHORT)]
        prompt = min(size // 2, max_length - _SHORT)
        if share and prompt > 0:
            yield [_item(prompt, _SHORT) for _ in range(prompt, size, _SHORT)]
    if max_length > token_budget:
        yield [_item(0, max_length)]


def _item(prompt: int, response: int) -> Encoded:
    return Encoded(np.zeros(prompt + response, dtype=np.int32), prompt)
