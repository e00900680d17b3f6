"""A plan of attention's tiles for the implementation that runs on a device."""

from __future__ import annotations

from dataclasses import replace
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
    fast: bool = False,
) -> AttentionPlan:
    """The plan for `device`, still on the host: `to` moves it. Arguments and errors are those of `plan_tiles`. The
    fused CPU kernels have no gradients: where they are enabled the plan is that of torch's implementation. `fast`: the
    bits of a row may depend on the other rows."""
    implementation = select(device).implementation
    if implementation == "cpu" and not torch.is_grad_enabled():
        from .cpu_attention import plan_segments  # needs numba, which the torch path does not

        return plan_segments(segments, tokens, causal=causal, window=window, only=only)
    if implementation != "triton":
        return plan_tiles(segments, tokens, causal=causal, window=window, only=only)
    blocks = plan_blocks(segments, tokens, causal=causal, window=window, only=only)
    if fast and only is None and not segments[:, 3].any():
        blocks = replace(blocks, unshared=(len(segments), int(segments[:, 1].max())))
    return blocks
