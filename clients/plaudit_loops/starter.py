"""The starter tasks as data for a policy: prompts, answers to imitate, and an untrained policy to begin with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from plaudit_model import starter

NAME = "starter"


def answers(n: int, seed: int) -> Iterator[tuple[str, str]]:
    """`n` prompts with an answer each: any of the task's candidates, good or bad, so that reinforcement has room."""
    rng = Random(f"plaudit starter answers {seed}")
    for task in starter.tasks(n, seed):
        yield task.prompt, rng.choice(starter.candidates(task, rng))


def write_policy(directory: Path, seed: int) -> None:
    """The starter base as a causal language model without weights: configuration and tokenizer, embeddings tied."""
    starter.write_base(directory, seed)
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("id2label", "label2id"):
        del config[name]
    config |= {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True, "use_cache": True}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
