"""The allocator's setting, in a process of its own: it holds for the whole process."""

from __future__ import annotations

import subprocess
import sys

FAULTS = """
import resource, sys, torch
from plaudit_model.memory import keep_freed_memory
kept = len(sys.argv) > 1 and keep_freed_memory()
for _ in range(12):  # the heap grows until it has room for aligned tensors too
    torch.ones(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(16 << 20)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments: str) -> tuple[str, int]:
    done = subprocess.run([sys.executable, "-c", FAULTS, *arguments], check=True, capture_output=True, text=True)
    kept, count = done.stdout.split()
    return kept, int(count)


def test_freed_memory_is_used_again_without_page_faults() -> None:
    kept, few = faults("keep")
    assert kept == "True" and few < 100 < faults()[1]
