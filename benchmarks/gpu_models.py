"""Models of known shapes with random weights, made on the device, and items of known lengths for them."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gpu_card import Bench
from numpy.typing import NDArray
from torch import nn

from plaudit_model.contract import RewardContract, Template
from plaudit_model.encode import Encoded
from plaudit_model.infer import ENCODERS
from plaudit_model.reward_model import RewardModel
from plaudit_model.starter import write_base
from plaudit_model.template import CHATML, PAIR_PROMPT

_QWEN3 = {"vocab_size": 151936, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
          "head_dim": 128}  # fmt: skip
_LLAMA = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}
SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "Qwen3-0.6B": ("qwen3", {**_QWEN3, "hidden_size": 1024, "intermediate_size": 3072}),
    "Qwen3-1.7B": ("qwen3", {**_QWEN3, "hidden_size": 2048, "intermediate_size": 6144}),
    "Llama-3.2-1B": (
        "llama",
        {**_LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
    ),
    "Llama-3.1-8B": (
        "llama",
        {**_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
    ),
    "BERT-base": (
        "bert",
        {
            "vocab_size": 30522,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
    ),
}
"""transformers' architecture and the sizes of the released models."""

TINY = {"vocab_size": 5000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
"""What a dry run makes of all of them."""

RESPONSES = 16
"""To a prompt, where it is shared; prompt and response are 4 : 1."""


@dataclass(frozen=True)
class Sizes:
    """Layer sizes of a model."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    width: int


def sizes_of(bench: Bench, name: str) -> Sizes:
    config = TINY if bench.dry else SHAPES[name][1]
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    return Sizes(*(config[key] for key in keys))


def module_of(bench: Bench, name: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """The sequence classifier of transformers, its weights drawn on the device."""
    family, sizes = SHAPES[name]
    config = transformers.AutoConfig.for_model(
        family, **(TINY if bench.dry else sizes), num_labels=1, max_position_embeddings=8192, pad_token_id=0,
        bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    with bench.device:
        module: nn.Module = transformers.AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    return module.eval()


def model_of(bench: Bench, module: nn.Module, dtype: str, mode: str) -> RewardModel:
    """A frozen reward model around a module; several may share one whose weights are not of 8 bits."""
    model = unfrozen(bench, module, dtype, mode)
    model.freeze()
    return model


def unfrozen(bench: Bench, module: nn.Module, dtype: str, mode: str = "fast") -> RewardModel:
    pair = module.config.model_type in ENCODERS  # type: ignore[union-attr, operator]
    template, pooling = (Template.of("pair", PAIR_PROMPT), "first") if pair else (Template.of("chat", CHATML), "last")
    contract = RewardContract(architecture=type(module).__name__, template=template, max_length=4096, pooling=pooling)
    return RewardModel(module, contract, _tokenizer(), device=str(bench.device), dtype=dtype, mode=mode)


@functools.cache
def _tokenizer() -> Path:
    """A directory with a tokenizer. It encodes nothing here: items are token ids."""
    directory = Path(tempfile.mkdtemp(prefix="plaudit-gpu-"))
    write_base(directory, 0)
    return directory


# -- items ---------------------------------------------------------------------------------------------------


def unique(tokens: int, count: int) -> list[Encoded]:
    """Items of `tokens` tokens that share nothing."""
    generator = np.random.default_rng(0)
    return [Encoded(words(generator, tokens), tokens * 4 // 5) for _ in range(count)]


def shared(tokens: int, prompts: int) -> list[Encoded]:
    """Items of `tokens` tokens, RESPONSES to a prompt of four fifths of them."""
    generator, items = np.random.default_rng(0), []
    for _ in range(prompts):
        prompt = words(generator, tokens * 4 // 5)
        items += [_joined(prompt, words(generator, tokens - len(prompt))) for _ in range(RESPONSES)]
    return items


def hh_like(records: int, responses: int = 2, *, seed: int = 0, longest: int = 1024) -> list[list[Encoded]]:
    """Prompts with `responses` responses each, of lengths like those of HH-RLHF: log-normal, the prompt with a median
    of 87 tokens and a standard deviation of the logarithm of 1.0, the response with 33 and 1.0; at least 4, at most
    `longest` and half of it. The medians are those of the harmless and helpful halves at 4.2 characters a token."""
    generator, found = np.random.default_rng(seed), []
    for _ in range(records):
        prompt = words(generator, _lognormal(generator, 87, longest))
        own = [words(generator, _lognormal(generator, 33, longest // 2)) for _ in range(responses)]
        found.append([_joined(prompt, response) for response in own])
    return found


def _lognormal(generator: np.random.Generator, median: int, most: int) -> int:
    return int(np.clip(round(median * np.exp(generator.normal())), 4, most))


def _joined(prompt: NDArray[np.int32], response: NDArray[np.int32]) -> Encoded:
    return Encoded(np.concatenate([prompt, response]), len(prompt))


def words(generator: np.random.Generator, count: int) -> NDArray[np.int32]:
    """Token ids that every vocabulary here has, without the special ones."""
    return generator.integers(5, 400, count, dtype=np.int32)


# -- what people run -----------------------------------------------------------------------------------------


def padded_batches(items: list[Encoded], size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, mask), (n, longest) int64 each, padded on the right, in the order of the items."""
    batches = []
    for start in range(0, len(items), size):
        part = items[start : start + size]
        ids = np.zeros((len(part), max(len(item.ids) for item in part)), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, item in enumerate(part):
            ids[row, : len(item.ids)], mask[row, : len(item.ids)] = item.ids, 1
        batches.append((torch.from_numpy(ids), torch.from_numpy(mask)))
    return batches


def padded_scores(module: Any, device: torch.device, items: list[Encoded], size: int) -> torch.Tensor:
    """Scores (N,) fp32 on the CPU by transformers' padded forward with SDPA; the head in fp32, as ours."""
    found = []
    with torch.inference_mode():
        for ids, mask in padded_batches(items, size):
            ids, mask = ids.to(device), mask.to(device)
            hidden = module.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(ids), device=device), mask.sum(1) - 1]
            found.append((last.float() @ module.score.weight.float().T)[:, 0].cpu())
    return torch.cat(found)
