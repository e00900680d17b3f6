"""How an engine is set up."""

from __future__ import annotations

from dataclasses import dataclass

from .worker import Wait


@dataclass(frozen=True)
class EngineSettings:
    """`token_budget`: packed tokens of a batch. `max_wait_ms`, `settle_ms`: the batching window (see `batcher`).
    `queue_tokens`: what may wait in each class, `queue_bytes` what may be held altogether. `hang_seconds`: a
    batch that takes longer has its worker killed, and so has a model that takes longer than `load_seconds` to load.
    `threads` compute, on `cpus` alone if any are named; `wait` is how they wait for work. `memory_cap`
    is in bytes. None: what the contract, torch or OpenMP says, or everything."""

    token_budget: int = 4096
    max_wait_ms: float = 50.0
    settle_ms: float = 3.0
    look_ahead: int = 64
    queue_tokens: int = 1_000_000
    queue_bytes: int = 512 << 20
    cache_bytes: int = 64 << 20
    hang_seconds: float = 300.0
    load_seconds: float = 1800.0
    threads: int | None = None
    cpus: tuple[int, ...] = ()
    wait: Wait | None = None
    device: str = "auto"
    dtype: str | None = None
    mode: str | None = None
    memory_cap: int | None = None
