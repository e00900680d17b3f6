"""A small world in which every answer's quality can be computed: tasks, preference records, a tokenizer, a
base model.

It lets the whole product run, from preference pairs to served scores, without a download, and it gives a gold
reward to measure over-optimisation against. Tasks and quality need neither torch nor transformers.
"""

from __future__ import annotations

from .base import directory, home, write_base
from .preferences import preference_records
from .tasks import HELD_OUT_SEEDS, Kind, Task, candidates, is_held_out, quality, tasks
from .tokenizer import CHAT_TEMPLATE, build_tokenizer

__all__ = [
    "CHAT_TEMPLATE", "HELD_OUT_SEEDS", "Kind", "Task", "build_tokenizer", "candidates", "directory", "home",
    "is_held_out", "preference_records", "quality", "tasks", "write_base",
]  # fmt: skip
