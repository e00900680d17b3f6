"""The starter base: an untrained reward model of about three million parameters, as a directory without
weights.

It has the shape of Qwen3 (`Qwen3ForSequenceClassification`), so every path of the product can be walked with it,
without a download, and plain transformers loads what comes out. Needs neither torch nor transformers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .preferences import preference_records
from .tokenizer import CHAT_TEMPLATE, END, PAD, SPECIAL_TOKENS, START, build_tokenizer

VOCABULARY = 4096
MAX_LENGTH = 2048
_TEXTS = 2000


def home() -> Path:
    """Where plaudit keeps what it made on this machine: `$PLAUDIT_HOME`, or `~/.cache/plaudit`."""
    return Path(os.environ.get("PLAUDIT_HOME") or Path.home() / ".cache" / "plaudit").expanduser()


def directory() -> Path:
    """Where the fitted starter model lives."""
    return home() / "starter"


def write_base(directory: Path, seed: int) -> None:
    """Write config.json, tokenizer.json and tokenizer_config.json; the directory is created, these files
    replaced.

    The tokenizer is trained on the starter texts of `seed`; the weights are left to whoever trains.
    """
    tokenizer = build_tokenizer(_texts(seed), VOCABULARY)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", _tokenizer_config())
    _write_json(directory / "config.json", _config(tokenizer))


def _texts(seed: int) -> Iterator[str]:
    for record in preference_records(_TEXTS, seed):
        yield "user\n" + record.prompt[0].content
        yield from ("assistant\n" + response for response in record.responses)


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForSequenceClassification"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id(START),
        "dtype": "float32",
        "eos_token_id": tokenizer.token_to_id(END),
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 192,
        "id2label": {"0": "score"},
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "label2id": {"score": 0},
        "max_position_embeddings": MAX_LENGTH,
        "num_attention_heads": 6,
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "pad_token_id": tokenizer.token_to_id(PAD),
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "use_cache": False,
        "vocab_size": tokenizer.get_vocab_size(),
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": list(SPECIAL_TOKENS),
        "bos_token": START,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": MAX_LENGTH,
        "pad_token": PAD,
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
