"""The Plackett-Luce loss of full rankings among packed scores.

Plackett 1975, Luce 1959: the best is chosen by softmax among all, the second among the rest, and so on. Of a ranking
s_1 .. s_m, best first, the loss is the sum over i of logsumexp(s_i .. s_m) - s_i.
"""

from __future__ import annotations

from typing import Any

import torch

from .dispatch import uses_triton
from .launch import dense, jit, tl

CHUNK = 64
"""Places of a ranking that are looked at together; longer rankings carry a running logsumexp from chunk to chunk."""


def plackett_luce(scores_N: torch.Tensor, ranking_M: torch.Tensor, offsets_G1: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood (G,) fp32 of the ranking of each group.

    ranking (M,) int64: rows of `scores`, contiguous and in range (the kernel does not check), best first, one group
    after another; group g is ranking[offsets[g] : offsets[g + 1]], offsets (G + 1,) int64. Groups of none or one cost
    0. Computed in fp32 at least, as a running logsumexp from the end; differentiable in the scores.
    """
    if uses_triton(scores_N):
        return TritonPlackettLuce.apply(scores_N, ranking_M, offsets_G1)  # type: ignore[no-any-return]
    wide = scores_N if scores_N.dtype == torch.float64 else scores_N.float()
    sizes = offsets_G1.diff()
    longest = int(sizes.max()) if len(sizes) else 0
    # Groups as rows, worst first: what a short row holds beyond its best comes after all that counts.
    place_GL = offsets_G1[1:, None] - 1 - torch.arange(longest, device=wide.device)
    rows_GL = wide[ranking_M[place_GL.clamp(min=0)]]
    return (rows_GL.logcumsumexp(1) - rows_GL).masked_fill(place_GL < offsets_G1[:-1, None], 0.0).sum(1)


@jit
def _running(values, carry, BACKWARDS: tl.constexpr, CHUNK: tl.constexpr):
    """logsumexp of the carry and all values up to each place, or from it on; and that of all, the next carry."""
    place = tl.arange(0, CHUNK)
    counted = place[None, :] <= place[:, None]
    if BACKWARDS:
        counted = place[None, :] >= place[:, None]
    table = tl.where(counted, values[None, :], -1e30)
    largest = tl.maximum(tl.max(table, 1), carry)
    running = largest + tl.log(tl.sum(tl.exp(table - largest[:, None]), 1) + tl.exp(carry - largest))
    return running, tl.max(running, 0)


@jit
def _forward(scores, ranking, offsets, losses, remaining, CHUNK: tl.constexpr):
    """Losses, and logsumexp(s_i .. s_m) of every place, which backward needs."""
    group = tl.program_id(0)
    start, end = tl.load(offsets + group), tl.load(offsets + group + 1)
    chunks = (end - start + CHUNK - 1) // CHUNK
    carry = tl.full((), -1e30, tl.float32)
    loss = tl.zeros((CHUNK,), tl.float32)
    for step in range(0, chunks):
        place = start + (chunks - 1 - step) * CHUNK + tl.arange(0, CHUNK)
        mask = place < end
        values = tl.load(scores + tl.load(ranking + place, mask, 0), mask, 0.0).to(tl.float32)
        running, carry = _running(tl.where(mask, values, -1e30), carry, True, CHUNK)
        tl.store(remaining + place, running, mask)
        loss += tl.where(mask, running - values, 0.0)
    tl.store(losses + group, tl.sum(loss, 0))


@jit
def _backward(scores, ranking, offsets, remaining, d_losses, d_places, CHUNK: tl.constexpr):
    """d loss / d s_k = sum over i <= k of exp(s_k - remaining_i), minus 1: a running logsumexp of -remaining."""
    group = tl.program_id(0)
    start, end = tl.load(offsets + group), tl.load(offsets + group + 1)
    scale = tl.load(d_losses + group)
    carry = tl.full((), -1e30, tl.float32)
    for step in range(0, (end - start + CHUNK - 1) // CHUNK):
        place = start + step * CHUNK + tl.arange(0, CHUNK)
        mask = place < end
        values = tl.load(scores + tl.load(ranking + place, mask, 0), mask, 0.0).to(tl.float32)
        rivals = -tl.load(remaining + place, mask, 1e30)
        running, carry = _running(rivals, carry, False, CHUNK)
        tl.store(d_places + place, scale * (tl.exp(values + running) - 1.0), mask)


class TritonPlackettLuce(torch.autograd.Function):
    """`plackett_luce`."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, ranking: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        groups = len(offsets) - 1
        losses = scores.new_empty(groups, dtype=torch.float32)
        remaining = scores.new_empty(len(ranking), dtype=torch.float32)
        _forward[(groups,)](scores, ranking, offsets, losses, remaining, CHUNK)
        ctx.save_for_backward(scores, ranking, offsets, remaining)
        return losses

    @staticmethod
    def backward(ctx: Any, d_losses: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        scores, ranking, offsets, remaining = ctx.saved_tensors
        d_places = torch.empty_like(remaining)
        _backward[(len(offsets) - 1,)](scores, ranking, offsets, remaining, dense(d_losses), d_places, CHUNK)
        d_scores = scores.new_zeros(len(scores), dtype=torch.float32)
        # Accumulating index_put_ sorts the rows on CUDA: deterministic, as atomics are not.
        d_scores.index_put_((ranking,), d_places, accumulate=True)
        return d_scores.to(scores.dtype), None, None
