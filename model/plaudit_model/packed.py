"""A packed batch on the device that computes it: what every packed trunk needs besides weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from plaudit_kernels import BLOCK, TILE, AttentionPlan, BlockPlan, TilePlan, plan_attention

from .packing import PackedBatch

PlanKey = tuple[int | None, bool]
"""A window, and whether tiles are wanted for pooled rows alone."""


@dataclass(frozen=True, eq=False)
class Layout:
    """`input_ids`, `position_ids`, `type_ids` (T,) int64; `pool_rows` (R,) int64: the pooled row of each sequence,
    of which the first `distinct` differ; the others, which round R up to whole blocks, repeat them. `plans`:
    attention's tiles, as far as they were asked for beforehand."""

    batch: PackedBatch
    causal: bool
    exact: bool
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    type_ids: torch.Tensor
    pool_rows: torch.Tensor
    distinct: int
    plans: dict[PlanKey, AttentionPlan]

    @classmethod
    def of(
        cls, batch: PackedBatch, device: torch.device, *, causal: bool, exact: bool, plans: Iterable[PlanKey] = ()
    ) -> Layout:
        """For `device`, still on the host. With `exact`, T and R are whole blocks."""
        rows = with_padding_segment(batch) if exact else batch
        pool = batch.pool_last if causal else batch.pool_first
        padded = np.resize(pool, -(-len(pool) // BLOCK) * BLOCK) if exact else pool
        arrays = (rows.input_ids, rows.position_ids, rows.type_ids, padded)
        ids, positions, types, pooled = map(torch.from_numpy, arrays)
        layout = cls(rows, causal, exact, ids, positions, types, pooled, len(pool), {})
        return replace(layout, plans={key: layout._planned(key, device) for key in dict.fromkeys(plans)})

    def to(self, device: torch.device) -> Layout:
        """On the device that computes it. With the plans of fused kernels in one copy, from pinned memory: each costs
        more than its bytes do."""
        if device.type == "cpu":
            return self
        if all(isinstance(plan, BlockPlan) for plan in self.plans.values()):
            return self.over(self.joined(pinned=True).to(device, non_blocking=True))
        plans = {key: _moved(plan, device) for key, plan in self.plans.items()}
        return self._with([table.to(device) for table in self._rows], plans)

    def joined(self, *, pinned: bool) -> torch.Tensor:
        """Every table end to end, int32, on the host."""
        tables = [table.reshape(-1) for table in self._tables]
        out = torch.empty(sum(map(len, tables)), dtype=torch.int32, pin_memory=pinned)
        return torch.cat([table.int() for table in tables], out=out)

    def over(self, buffer: torch.Tensor) -> Layout:
        """The same layout, its tables read from what `joined` gave, wherever that has been copied to."""
        rows, *tables = torch.split(buffer, [sum(map(len, self._rows)), *map(torch.numel, self._tables[4:])])
        plans: dict[PlanKey, AttentionPlan] = {}
        for number, (key, plan) in enumerate(self._block_plans.items()):
            plans[key] = plan.over(tables[5 * number : 5 * number + 5])
        return self._with(torch.split(rows.long(), list(map(len, self._rows))), plans)

    def plan(self, window: int | None, *, pooled_only: bool = False) -> AttentionPlan:
        """Where attention's tiles lie; with `pooled_only`, those alone that hold a pooled row."""
        device, key = self.input_ids.device, (window, pooled_only)
        return self.plans.get(key) or _moved(self._planned(key, device), device)

    def _with(self, rows: Sequence[torch.Tensor], plans: dict[PlanKey, AttentionPlan]) -> Layout:
        ids, positions, types, pooled = rows
        tables: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "type_ids": types, "pool_rows": pooled}
        return replace(self, **tables, plans=plans)

    def _planned(self, key: PlanKey, device: torch.device) -> AttentionPlan:
        (window, pooled_only), batch = key, self.batch
        only = (batch.pool_last if self.causal else batch.pool_first) if pooled_only else None
        return plan_attention(
            batch.segments, batch.tokens, causal=self.causal, window=window, only=only, device=device,
            fast=not self.exact,
        )  # fmt: skip

    @property
    def _rows(self) -> tuple[torch.Tensor, ...]:
        return self.input_ids, self.position_ids, self.type_ids, self.pool_rows

    @property
    def _block_plans(self) -> dict[PlanKey, BlockPlan]:
        return {key: plan for key, plan in self.plans.items() if isinstance(plan, BlockPlan)}

    @property
    def _tables(self) -> list[torch.Tensor]:
        return [*self._rows, *(table for plan in self._block_plans.values() for table in plan.tables)]

    def scatter(self, query_RHD: torch.Tensor) -> torch.Tensor:
        """The pooled rows' queries in their places, (T, H, D), 0 elsewhere: tiles expect a query on every row. Each
        row is written once: a repeated one would get its gradient more than once."""
        empty = query_RHD.new_zeros(self.batch.tokens, *query_RHD.shape[1:])
        return empty.index_copy(0, self.pool_rows[: self.distinct], query_RHD[: self.distinct])


def _moved(plan: AttentionPlan, device: torch.device) -> AttentionPlan:
    return plan.to(device) if isinstance(plan, (BlockPlan, TilePlan)) else plan


def with_padding_segment(batch: PackedBatch) -> PackedBatch:
    """The batch with its rows rounded up to a multiple of BLOCK."""
    return padded(batch, -(-batch.tokens // BLOCK) * BLOCK)


def padded(batch: PackedBatch, tokens: int) -> PackedBatch:
    """The batch with so many rows. The added ones form segments of their own, so every row is computed from rows that
    exist; nothing is pooled from them. The segments are short: attention costs the square of their length."""
    extra = tokens - batch.tokens
    if not extra:
        return batch
    zeros: NDArray[np.int64] = np.zeros(extra, dtype=np.int64)
    offsets = np.arange(0, extra, TILE)
    none = np.zeros_like(offsets)
    filler = np.stack([batch.tokens + offsets, np.minimum(extra - offsets, TILE), none, none], axis=1)
    return replace(
        batch,
        input_ids=np.concatenate([batch.input_ids, zeros]),
        position_ids=np.concatenate([batch.position_ids, np.arange(extra) % TILE]),
        type_ids=np.concatenate([batch.type_ids, zeros]),
        segments=np.concatenate([batch.segments, filler]),
    )
