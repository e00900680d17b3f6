"""A plan of attention's tiles for the implementation that runs on a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from .blocks import BlockPlan, plan_blocks
from .dispatch import select
from .tiles import TilePlan, plan_tiles

if TYPE_CHECKING:
    from .cpu_attention import SegmentPlan

AttentionPlan: TypeAlias = "TilePlan | BlockPlan | SegmentPlan"


def plan_attention(
    segments: NDArray[np.int64],
    tokens: int,
    *,
    causal: bool,
    device: torch.device,
    window: int | None = None,
    only: NDArray[np.int64] | None = None,
) -> AttentionPlan:
    """The plan for `device`, still on the host: `to` moves it. Arguments and errors are those of `plan_tiles`. The
    fused CPU kernels have no gradients: where they are enabled the plan is that of torch's implementation."""
    implementation = select(device).implementation
    if implementation == "cpu" and not torch.is_grad_enabled():
        from .cpu_attention import plan_segments  # needs numba, which the torch path does not

        return plan_segments(segments, tokens, causal=causal, window=window, only=only)
    plan = plan_blocks if implementation == "triton" else plan_tiles
    return plan(segments, tokens, causal=causal, window=window, only=only)
