"""A plan of attention's tiles for the implementation that runs on a device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from .blocks import BlockPlan, plan_blocks
from .dispatch import select
from .tiles import TilePlan, plan_tiles

AttentionPlan = TilePlan | BlockPlan


def plan_attention(
    segments: NDArray[np.int64],
    tokens: int,
    *,
    causal: bool,
    device: torch.device,
    window: int | None = None,
    only: NDArray[np.int64] | None = None,
) -> AttentionPlan:
    """The plan, on `device`; arguments and errors as those of `plan_tiles`."""
    plan = plan_blocks if select(device).implementation == "triton" else plan_tiles
    return plan(segments, tokens, causal=causal, window=window, only=only).to(device)
