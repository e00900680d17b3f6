"""The starter tasks as data for a policy: prompts, answers to imitate, and an untrained policy to begin with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from plaudit_model import starter

NAME = "starter"
# A million parameters: enough to learn how answers to the tasks look, and a step of a run is seconds on a CPU.
_SHAPE = {
    "hidden_size": 128, "intermediate_size": 341, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def answers(n: int, seed: int) -> Iterator[tuple[str, str]]:
    """`n` prompts with an answer each: any of the task's candidates, good or bad, so that reinforcement has room."""
    rng = Random(f"plaudit starter answers {seed}")
    for task in starter.tasks(n, seed):
        yield task.prompt, rng.choice(starter.candidates(task, rng))


def write_policy(directory: Path, seed: int) -> None:
    """A causal language model of about a million parameters, with the starter base's tokenizer and without weights."""
    starter.write_base(directory, seed)
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("id2label", "label2id"):
        del config[name]
    config |= {"architectures": ["Qwen3ForCausalLM"], "use_cache": True, **_SHAPE}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
