"""Tiny policies, and rewards that are computed here instead of served."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers

from plaudit_loops.policy import Policy, load_policy
from plaudit_loops.shaping import Scores

WORDS = ["<pad>", "<end>", *"abcdefgh"]


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture(scope="session")
def tiny_policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Qwen3 of two layers whose vocabulary is an end token and eight letters."""
    from transformers import AutoConfig

    directory = tmp_path_factory.mktemp("policy")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "<end>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    AutoConfig.for_model(
        "qwen3", vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0,
        eos_token_id=1, bos_token_id=None, tie_word_embeddings=True, architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(directory)  # fmt: skip
    return directory


@pytest.fixture(scope="session")
def opinionated(tiny_policy_dir: Path) -> Callable[[float], Policy]:
    """`opinionated(4)`: the tiny policy with its matrices four times as large. Untrained, it says everything with the
    same probability."""

    def make(times: float) -> Policy:
        policy = load_policy(tiny_policy_dir, device="cpu", autocast=False)
        with torch.no_grad():
            for parameter in policy.module.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(times)
        return policy

    return make


class Computed:
    """Rewards from a function of the response's text; None for what cannot be scored."""

    def __init__(self, reward: Callable[[str], float | None]) -> None:
        self.reward, self.calls, self.answered, self.failed = reward, 0, 0, 0

    def submit(self, groups: Sequence[tuple[Any, Sequence[str]]]) -> Callable[[], Scores]:
        self.calls += 1
        found = [self.reward(text) for _, texts in groups for text in texts]
        self.failed += found.count(None)

        def answer() -> Scores:
            self.answered += 1
            return np.array([[np.nan if x is None else x for x in found]])

        return answer

    def counts(self) -> Mapping[str, float]:
        failed, self.failed = self.failed, 0
        return {"reward/failed": float(failed)}

    def state(self) -> Mapping[str, Any]:
        return {"answered": self.answered}

    def put_back(self, state: Mapping[str, Any]) -> None:
        self.calls = self.answered = state["answered"]

    def close(self) -> None:
        return None


@pytest.fixture(scope="session")
def computed() -> type[Computed]:
    return Computed


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("a b", "c", "d e f", "g h")))
    return path
