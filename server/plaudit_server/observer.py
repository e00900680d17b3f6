"""What the engine tells about itself while it works. The edge turns it into metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class BatchReport:
    """One batch that was scored. `computed_tokens` went through the model; `shared_tokens` did not have to,
    because a prompt was there once: together they are the tokens of its `sequences`. `late_jit` kernels were compiled
    while it waited."""

    sequences: int
    computed_tokens: int
    shared_tokens: int
    seconds: float
    late_jit: int = 0


class EngineObserver(Protocol):
    """Called on the event loop, in line: it must return at once and not raise."""

    def batch_done(self, report: BatchReport) -> None: ...

    def item_reused(self, source: Literal["cache", "duplicate"], tokens: int) -> None:
        """An item is answered without being computed: from the cache, or with an equal item in flight."""

    def tokens_wasted(self, tokens: int) -> None:
        """Computed for nobody: the client was gone, or the worker died over them."""

    def item_failed(self, code: str) -> None:
        """An item was answered with an EngineError of this code."""

    def worker_restarted(self) -> None:
        """A new worker has taken the place of one that was lost."""
