"""Reward models of known shape with random weights, and text of known length."""

from __future__ import annotations

import json
import random
from pathlib import Path

from plaudit_model.encode import Encoder
from plaudit_model.reward_model import RewardModel
from plaudit_model.starter import preference_records, write_base


def write_decoder_25m(directory: Path, seed: int = 0) -> Path:
    """A Qwen3-shaped reward model of about 25M parameters with the starter's tokenizer."""
    base = directory.with_name(directory.name + "-base")
    write_base(base, seed)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config |= {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
    }
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = RewardModel.from_base(base, seed=seed)
    model.save(directory, model.contract)
    return directory


def text_of(encoder: Encoder, tokens: int, rng: random.Random) -> str:
    """Words of the starter tasks, as many as make about `tokens` tokens."""
    records = preference_records(200, seed=rng.randrange(1 << 30))
    words = " ".join(m.content for r in records for m in r.prompt).split()
    rng.shuffle(words)
    low, high = 1, len(words)
    while low < high:
        middle = (low + high) // 2
        if len(encoder.encode_text(" ".join(words[:middle])).ids) < tokens:
            low = middle + 1
        else:
            high = middle
    return " ".join(words[:low])
