"""The Bradley-Terry loss of comparisons among packed scores, gather included.

Bradley and Terry 1952, as in Ouyang et al., 2203.02155; the margin is that of Llama 2, 2307.09288; soft labels those
of Wang et al., 2401.06080; centring is equation 2 of Eisenstein et al., 2312.09244.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import softplus

from .dispatch import uses_triton
from .launch import blocks, jit, tl

COMPARISONS = 256
"""Comparisons in a program."""


def bradley_terry(
    scores_N: torch.Tensor,
    chosen_C: torch.Tensor,
    rejected_C: torch.Tensor,
    share_C: torch.Tensor,
    margin_C: torch.Tensor,
    weight_C: torch.Tensor,
    *,
    centring: float = 0.0,
) -> torch.Tensor:
    """weight (-share log sigmoid(z) - (1 - share) log sigmoid(-z) + centring (c + r)^2), (C,) fp32.

    c and r are the scores of the chosen and the rejected response, z = c - r - margin. chosen, rejected (C,) int64 rows
    of `scores`, contiguous like the rest and in range (the kernel does not check); computed in fp32 at least.
    Differentiable in the scores; the gradient of a response in several comparisons is added up in a fixed order.
    """
    if uses_triton(scores_N):
        return TritonBradleyTerry.apply(scores_N, chosen_C, rejected_C, share_C, margin_C, weight_C, centring)  # type: ignore[no-any-return]
    wide = scores_N if scores_N.dtype == torch.float64 else scores_N.float()
    chosen, rejected = wide[chosen_C], wide[rejected_C]
    gap = chosen - rejected - margin_C
    loss = torch.lerp(softplus(gap), softplus(-gap), share_C.to(gap.dtype))
    if centring:
        loss = loss + centring * (chosen + rejected).square()
    return weight_C * loss


@jit
def _log1p(x):
    """log(1 + x), precise for small x: the error of 1 + x cancels in the quotient (Kahan)."""
    near = 1.0 + x
    return tl.where(near == 1.0, x, tl.log(near) * (x / tl.where(near == 1.0, 1.0, near - 1.0)))


@jit(do_not_specialize=["count"])
def _forward(
    scores, chosen, rejected, share, margin, weight, losses, d_chosen, d_rejected, count, centring,
    COMPARISONS: tl.constexpr,
):  # fmt: skip
    """Losses, and their derivatives by the two scores, which backward only scales and adds up."""
    place = tl.program_id(0).to(tl.int64) * COMPARISONS + tl.arange(0, COMPARISONS)
    mask = place < count
    won = tl.load(scores + tl.load(chosen + place, mask, 0), mask, 0.0).to(tl.float32)
    lost = tl.load(scores + tl.load(rejected + place, mask, 0), mask, 0.0).to(tl.float32)
    label = tl.load(share + place, mask, 0.0).to(tl.float32)
    counts = tl.load(weight + place, mask, 0.0).to(tl.float32)
    gap = won - lost - tl.load(margin + place, mask, 0.0).to(tl.float32)
    small = tl.exp(-tl.abs(gap))
    tail = _log1p(small)
    above, below = tl.maximum(gap, 0.0) + tail, tl.maximum(-gap, 0.0) + tail
    loss = label * below + (1.0 - label) * above + centring * (won + lost) * (won + lost)
    tl.store(losses + place, counts * loss, mask)
    push = tl.where(gap >= 0.0, 1.0, small) / (1.0 + small) - label  # sigmoid(gap) - share
    pull = 2.0 * centring * (won + lost)
    tl.store(d_chosen + place, counts * (pull + push), mask)
    tl.store(d_rejected + place, counts * (pull - push), mask)


class TritonBradleyTerry(torch.autograd.Function):
    """`bradley_terry`."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: torch.Tensor,
        chosen: torch.Tensor,
        rejected: torch.Tensor,
        share: torch.Tensor,
        margin: torch.Tensor,
        weight: torch.Tensor,
        centring: float,
    ) -> torch.Tensor:
        count = len(chosen)
        losses, slopes = (scores.new_empty(*shape, dtype=torch.float32) for shape in ((count,), (2, count)))
        _forward[(blocks(count, COMPARISONS),)](
            scores, chosen, rejected, share, margin, weight, losses, slopes[0], slopes[1], count, centring, COMPARISONS
        )
        ctx.save_for_backward(chosen, rejected, slopes)
        ctx.scores = len(scores), scores.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, d_losses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        chosen, rejected, slopes = ctx.saved_tensors
        count, dtype = ctx.scores
        d_scores = slopes.new_zeros(count)
        # Accumulating index_put_ sorts the rows on CUDA: deterministic, as atomics are not.
        d_scores.index_put_((torch.cat([chosen, rejected]),), (slopes * d_losses).flatten(), accumulate=True)
        return d_scores.to(dtype), None, None, None, None, None, None
