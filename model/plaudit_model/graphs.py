"""The forward of small batches on CUDA, recorded once and replayed: a GPU waits for launches.

A graph fixes every launch: its grid, its numbers and the addresses that it reads. So a batch is laid out in the
smallest of a few sizes that holds it. Rows are added as segments of their own, so that each row is written; pooled
rows are repeated; tables have a fixed length, and the tiles beyond the batch's own end at once. Then all that differs
between two batches of a size is one buffer of int32, which a replay copies in first. Rows are computed as they would
be in any company (docs/decisions/003-exact-scores.md), so in exact mode a replay gives the bits of the eager forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from plaudit_kernels import BLOCK, TILE, AttentionPlan, BlockPlan

from .packed import Layout, PlanKey, padded
from .packing import Group, PackedBatch, pack

SIZES = tuple(1 << power for power in range(6, 14))
"""Tokens: 64, 128 ... 8,192. Above, launches are hidden behind the work."""

Replay = Callable[[], Tensor]
Record = Callable[[Callable[[], Tensor]], Replay]
"""Runs a computation, and gives what runs it again, on the same memory, without the host: the result lies where it lay
the first time, until the next replay."""


class Recordable(Protocol):
    """A trunk whose work on the device begins and ends with tensors."""

    def lay_out(self, batch: PackedBatch) -> Layout: ...
    def hidden(self, layout: Layout) -> Tensor: ...
    def head(self, hidden_RD: Tensor) -> Tensor: ...


class Graphs:
    """The recorded sizes of one frozen trunk. Weights must stay where they are."""

    def __init__(self, trunk: Recordable, device: torch.device, record: Record) -> None:
        self._trunk, self._device, self._record = trunk, device, record
        self._recorded: dict[int, tuple[Tensor, Replay]] = {}

    @torch.inference_mode()
    def record(self, token_budget: int, tell: Callable[[str], None]) -> None:
        """Record the sizes that batches of at most `token_budget` tokens need, the largest first, whose memory the
        others share. One that does not fit into memory is left out, and told."""
        one = pack([Group(np.zeros(0, np.int32), (np.zeros(1, np.int32),), (0,), (0,))])
        for size in reversed([size for size in SIZES if size < 2 * token_budget]):
            layout = fixed(self._trunk, one, size)
            assert layout is not None, "one token fits into every size"
            buffer = layout.joined(pinned=False).to(self._device)
            try:
                replay = self._record(lambda layout=layout, buffer=buffer: self._trunk.hidden(layout.over(buffer)))  # type: ignore[misc]
            except torch.OutOfMemoryError:
                tell(f"out of memory: batches of {size} tokens are not recorded")
                continue
            self._recorded[size] = buffer, replay
        tell(f"recorded for {', '.join(map(str, sorted(self._recorded)))} tokens")

    def __call__(self, batch: PackedBatch) -> Tensor | None:
        """Attributes (N, A) fp32; None for a batch that no size holds."""
        size = min((size for size in self._recorded if size >= batch.tokens), default=None)
        layout = None if size is None else fixed(self._trunk, batch, size)
        if size is None or layout is None:
            return None
        buffer, replay = self._recorded[size]
        buffer.copy_(layout.joined(pinned=self._device.type == "cuda"), non_blocking=True)
        return self._trunk.head(replay()[: len(batch.pool_last)])


def fixed(trunk: Recordable, batch: PackedBatch, size: int) -> Layout | None:
    """The layout, on the host, whose every shape and number is that of the size; None if it does not hold the batch."""
    slots = max(size // 16, BLOCK)
    if len(batch.pool_last) > slots:
        return None
    last, first = (np.resize(rows, slots) for rows in (batch.pool_last, batch.pool_first))
    layout = trunk.lay_out(replace(padded(batch, size), pool_last=last, pool_first=first))
    plans: dict[PlanKey, AttentionPlan] = {}
    for (window, pooled_only), plan in layout.plans.items():
        assert isinstance(plan, BlockPlan), "only fused kernels are recorded"
        tiles = slots if pooled_only else size // TILE + 2 * slots
        if len(plan.tiles) > tiles:
            return None
        plans[window, pooled_only] = plan.sized(2 * slots + size // TILE + 1, tiles)
    return replace(layout, plans=plans)


class CudaRecorder:
    """A `Record` of CUDA graphs that share their memory: one is replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> Replay:
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                compute()  # what is compiled, loaded or allocated once must not be while a graph records
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                result = compute()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
