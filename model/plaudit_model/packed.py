"""A packed batch on the device that computes it: what every packed trunk needs besides weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from plaudit_kernels import BLOCK, AttentionPlan, plan_attention

from .packing import PackedBatch


@dataclass(frozen=True, eq=False)
class Layout:
    """`input_ids`, `position_ids`, `type_ids` (T,) int64; `pool_rows` (R,) int64: the pooled row of each sequence,
    of which the first `distinct` differ; the others, which round R up to whole blocks, repeat them."""

    batch: PackedBatch
    causal: bool
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    type_ids: torch.Tensor
    pool_rows: torch.Tensor
    distinct: int

    @classmethod
    def of(cls, batch: PackedBatch, device: torch.device, *, causal: bool, exact: bool) -> Layout:
        """With `exact`, T and R are whole blocks."""
        rows = with_padding_segment(batch) if exact else batch
        pool = batch.pool_last if causal else batch.pool_first
        padded = np.resize(pool, -(-len(pool) // BLOCK) * BLOCK) if exact else pool
        ids, positions, types, pooled = (
            torch.from_numpy(array).to(device) for array in (rows.input_ids, rows.position_ids, rows.type_ids, padded)
        )
        return cls(rows, causal, ids, positions, types, pooled, len(pool))

    def plan(self, window: int | None, *, pooled_only: bool = False) -> AttentionPlan:
        """Where attention's tiles lie; with `pooled_only`, those alone that hold a pooled row."""
        pooled = self.batch.pool_last if self.causal else self.batch.pool_first
        only = pooled if pooled_only else None
        return plan_attention(
            self.batch.segments, self.batch.tokens, causal=self.causal, window=window, only=only,
            device=self.input_ids.device,
        )  # fmt: skip

    def scatter(self, query_RHD: torch.Tensor) -> torch.Tensor:
        """The pooled rows' queries in their places, (T, H, D), 0 elsewhere: tiles expect a query on every row. Each
        row is written once: a repeated one would get its gradient more than once."""
        empty = query_RHD.new_zeros(self.batch.tokens, *query_RHD.shape[1:])
        return empty.index_copy(0, self.pool_rows[: self.distinct], query_RHD[: self.distinct])


def with_padding_segment(batch: PackedBatch) -> PackedBatch:
    """The batch with its rows rounded up to a multiple of BLOCK. The added rows form one more segment, so
    every row is computed from rows that exist; nothing is pooled from them."""
    extra = -batch.tokens % BLOCK
    if not extra:
        return batch
    zeros: NDArray[np.int64] = np.zeros(extra, dtype=np.int64)
    return PackedBatch(
        input_ids=np.concatenate([batch.input_ids, zeros]),
        position_ids=np.concatenate([batch.position_ids, np.arange(extra)]),
        type_ids=np.concatenate([batch.type_ids, zeros]),
        segments=np.concatenate([batch.segments, np.array([[batch.tokens, extra, 0, 0]])]),
        pool_last=batch.pool_last,
        pool_first=batch.pool_first,
        indices=batch.indices,
    )
