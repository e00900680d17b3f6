"""The self-test at load: scores must come from the item alone, and agree with the plain model.

Items are scored together through the model's path, one by one through it, and one by one through the architecture's
own eager forward, head included, before anything of ours touched the module. A wiring fault in any of them shows as
a difference far above rounding. The items cover prompts shared and not, neighbours on either side, and sliding
windows of up to LONGEST_WINDOW tokens; a longer window is honoured because it is the one that the architecture's own
mask states (`module_trunk.window_of`), or the configuration (`decoder.windows_of`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from plaudit_kernels import BLOCK

from .contract import EIGHT_BITS, RewardContract
from .encode import Encoded
from .errors import ContractError
from .module_trunk import ModuleTrunk
from .rope import forget_lengths

if TYPE_CHECKING:
    from .reward_model import RewardModel

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1, "int8": 1.5e-1, "fp8": 5e-1}
"""Largest difference accepted at load, relative to max(1, |score|), by the coarser dtype of the weights as stored and
as served. It tells wiring from rounding; `plaudit verify` measures the rounding itself."""

_LENGTHS = (1, 21, 40, 70, 130, 21, 200, 64, 33, 96, 128)
"""Tokens of the responses; together with the prompt about a thousand rows."""

LONGEST_WINDOW = 512
"""Sliding windows up to this many tokens are exceeded by an item of the proof."""


def prove(
    model: RewardModel, items: Sequence[Encoded], reference: NDArray[np.float32], stored: torch.dtype = torch.float32
) -> None:
    """Raise ContractError if the model's scores of `items` are not finite, move with the batch, or differ from
    `reference`, the `plain_scores` of the module as it was loaded with weights of dtype `stored`."""
    together = model.score_encoded(items)
    if not (np.isfinite(together).all() and np.isfinite(reference).all()):
        raise ContractError("the model gives scores that are not finite")
    alone = np.concatenate([model.score_encoded([item]) for item in items])
    if model.mode == "exact" and not np.array_equal(together, alone):
        worst = _worst(together, alone)
        raise ContractError(f"scores move with the batch by {worst:.2g} on this machine; serve with --mode fast")
    _compare(together, alone, TOLERANCE[model.dtype], "scores move with the batch")
    coarser = "bfloat16" if model.dtype == "float32" and stored != torch.float32 else model.dtype
    complaint = "rounded to 8 bits (bfloat16 rounds less), " if model.choice and model.dtype in EIGHT_BITS else ""
    _compare(together, reference, TOLERANCE[coarser], f"{complaint}scores differ from the plain model's")
    if model.mode == "fast" and isinstance(model.trunk, ModuleTrunk):
        _prove_apart(model, items, together)


@torch.inference_mode()
def plain_scores(module: nn.Module, contract: RewardContract) -> NDArray[np.float32]:
    """Attributes (N, A) fp32 of the proof's items by the module's own eager forward, one item at a time."""
    config: Any = module.config
    items = proof_items(module, contract)
    served, pad = config._attn_implementation, config.pad_token_id
    module.set_attn_implementation("eager")  # type: ignore[operator]
    config.pad_token_id = -1  # one item has no padding: the architecture then pools its last token, whatever it is
    try:
        return np.concatenate([_plain(module, contract, item) for item in items])
    finally:
        module.set_attn_implementation(served)  # type: ignore[operator]
        config.pad_token_id = pad


def proof_items(module: nn.Module, contract: RewardContract, seed: int = 0) -> list[Encoded]:
    """Random items, with another seed other responses of the same lengths: several to one prompt, some without a
    prompt, from one token to several blocks. None holds the padding id, at which RoBERTa's positions do not count on;
    a tokenizer never gives it for text."""
    config: Any = module.config
    generator, prompt_generator = (np.random.default_rng(part) for part in (seed, 99))
    longest = contract.max_length
    words = np.delete(np.arange(config.vocab_size, dtype=np.int32), [config.pad_token_id or 0])
    prompt = prompt_generator.choice(words, 37)

    def item(prompt: NDArray[np.int32], tokens: int) -> Encoded:
        own = generator.choice(words, tokens)
        return Encoded(np.concatenate([prompt, own])[-longest:], min(len(prompt), longest - 1))

    window = getattr(config, "sliding_window", None) or 0
    lengths = (*_LENGTHS, window + BLOCK) if max(_LENGTHS) < window <= LONGEST_WINDOW else _LENGTHS
    return [item(prompt if i % 3 else prompt[:0], tokens) for i, tokens in enumerate(lengths)]


def _prove_apart(model: RewardModel, items: Sequence[Encoded], scores: NDArray[np.float32]) -> None:
    """Every other item anew, of the same length: the rest must keep their bits, for no shape changed. Where bits may
    move with the shapes of a batch, this finds what leaks from one sequence into the next, however little."""
    mixed = proof_items(model.module, model.contract, seed=1)
    mixed[1::2] = items[1::2]
    if not np.array_equal(model.score_encoded(mixed)[1::2], scores[1::2]):
        raise ContractError("scores change with the words of their neighbours")


def _plain(module: nn.Module, contract: RewardContract, item: Encoded) -> NDArray[np.float32]:
    config: Any = module.config
    forget_lengths(module)
    device = next(module.parameters()).device
    arguments = {"input_ids": torch.from_numpy(item.ids.astype(np.int64))[None].to(device)}
    if contract.template.kind == "pair" and int(getattr(config, "type_vocab_size", 0) or 0) > 1:
        types = (np.arange(len(item.ids)) >= item.prompt_tokens) & (item.prompt_tokens > 0)
        arguments["token_type_ids"] = torch.from_numpy(types.astype(np.int64))[None].to(device)
    scores: NDArray[np.float32] = module(**arguments).logits.float().cpu().numpy()
    return scores


def _compare(ours: NDArray[np.float32], theirs: NDArray[np.float32], tolerance: float, complaint: str) -> None:
    if not (worst := _worst(ours, theirs)) <= tolerance:
        raise ContractError(f"{complaint} by {worst:.2g}, more than rounding explains")


def _worst(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    return float((np.abs(ours - theirs) / np.maximum(1.0, np.abs(theirs))).max())
