"""The Plackett-Luce loss of full rankings among packed scores.

Plackett 1975, Luce 1959: the best is chosen by softmax among all, the second among the rest, and so on. Of a ranking
s_1 .. s_m, best first, the loss is the sum over i of logsumexp(s_i .. s_m) - s_i.
"""

from __future__ import annotations

from typing import Any

import torch

from .dispatch import uses_triton
from .launch import blocks, dense, jit, power_of_two, tl

TILE = 256
"""Places that one warp looks at together, of as many groups as have their mean size. Longer groups carry a running
logsumexp from chunk to chunk."""


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
def _running(values, less, mask, top, weight):
    """(level, total), whose level + log(total) is the logsumexp of top + log(weight) and of values - less up to each
    place of a row; and the next (top, weight). Apart, they keep what their sum would round away where values are large.

    A cumulative sum of exp(value - largest). Where it is tiny, all values so far are far below the largest, and the
    sum would have lost what they are: they are summed again with the largest of their own.
    """
    level, total = tl.full(values.shape, -1e30, tl.float32), tl.full(values.shape, 1.0, tl.float32)
    share, top_next = _shares(values, less, mask, top)
    weight_next = tl.sum(share, 1) + weight * tl.exp(top - top_next)
    while tl.max(tl.max(mask.to(tl.int32), 0), 0) > 0:
        share, largest = _shares(values, less, mask, top)
        sums = tl.cumsum(share, 1) + (weight * tl.exp(top - largest))[:, None]
        # Never of NaN, nor of what no number is above: they show in the loss, and would be summed for ever.
        tiny = (sums <= 1e-3) & (largest > -1e30)[:, None]
        level = tl.where(mask & (tiny == 0), largest[:, None], level)
        total = tl.where(mask & (tiny == 0), sums, total)
        mask = mask & tiny
    return level, total, top_next, weight_next


@jit
def _shares(values, less, mask, top):
    """exp(values - less - largest), 0 where masked, and the largest of each row and of `top`."""
    largest = tl.maximum(tl.max(tl.where(mask, values - less, -1e30), 1), top)
    return tl.exp(tl.where(mask, values - largest[:, None] - less, -1e30)), largest


@jit
def _groups(offsets, groups, GROUPS: tl.constexpr, CHUNK: tl.constexpr):
    """(group, start, length) of this program's groups, and the chunks of the longest."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    start = tl.load(offsets + group, group < groups, 0)
    length = (tl.load(offsets + group + 1, group < groups, 0) - start).to(tl.int32)
    return group, start[:, None], length[:, None], (tl.max(length, 0) + CHUNK - 1) // CHUNK


@jit(do_not_specialize=["groups"])
def _forward(scores, ranking, offsets, losses, levels, logs, groups, GROUPS: tl.constexpr, CHUNK: tl.constexpr):
    """Losses, and logsumexp(s_i .. s_m) of every place as level + log, from the last place to the first."""
    group, start, length, chunks = _groups(offsets, groups, GROUPS, CHUNK)
    last = start + length - 1
    top, weight = tl.full((GROUPS,), -1e30, tl.float32), tl.zeros((GROUPS,), tl.float32)
    loss = tl.zeros((GROUPS, CHUNK), tl.float32)
    for step in range(0, chunks):
        before = step * CHUNK + tl.arange(0, CHUNK)[None, :]
        mask = before < length
        values = tl.load(scores + tl.load(ranking + last - before, mask, 0), mask, 0.0).to(tl.float32)
        level, total, top, weight = _running(values, 0.0, mask, top, weight)
        log = tl.log(total)
        tl.store(levels + last - before, level, mask)
        tl.store(logs + last - before, log, mask)
        loss += tl.where(mask, level - values + log, 0.0)
    tl.store(losses + group, tl.sum(loss, 1), group < groups)


@jit(do_not_specialize=["groups"])
def _backward(
    scores, ranking, offsets, levels, logs, d_losses, d_places, groups, GROUPS: tl.constexpr, CHUNK: tl.constexpr
):
    """d loss / d s_k = sum over i <= k of exp(s_k - level_i - log_i), minus 1: a running logsumexp."""
    group, start, length, chunks = _groups(offsets, groups, GROUPS, CHUNK)
    scale = tl.load(d_losses + group, group < groups, 0.0)[:, None]
    top, weight = tl.full((GROUPS,), -1e30, tl.float32), tl.zeros((GROUPS,), tl.float32)
    for step in range(0, chunks):
        after = step * CHUNK + tl.arange(0, CHUNK)[None, :]
        mask = after < length
        values = tl.load(scores + tl.load(ranking + start + after, mask, 0), mask, 0.0).to(tl.float32)
        rival, log = tl.load(levels + start + after, mask, 0.0), tl.load(logs + start + after, mask, 0.0)
        level, total, top, weight = _running(-rival, log, mask, top, weight)
        tl.store(d_places + start + after, scale * (tl.exp(values + level) * total - 1.0), mask)


class TritonPlackettLuce(torch.autograd.Function):
    """`plackett_luce`."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, ranking: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        groups = len(offsets) - 1
        sizes = (groups,), (2, len(ranking))
        losses, terms = (scores.new_empty(size, dtype=torch.float32) for size in sizes)
        tile = _tile(len(ranking), groups)
        _forward[(blocks(groups, tile[0]),)](scores, ranking, offsets, losses, *terms, groups, *tile, num_warps=1)
        ctx.save_for_backward(scores, ranking, offsets, terms)
        return losses

    @staticmethod
    def backward(ctx: Any, d_losses: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        scores, ranking, offsets, terms = ctx.saved_tensors
        d_places = torch.empty_like(terms[0])
        groups, given = len(offsets) - 1, (scores, ranking, offsets, *terms, dense(d_losses), d_places)
        tile = _tile(len(ranking), groups)
        _backward[(blocks(groups, tile[0]),)](*given, groups, *tile, num_warps=1)
        d_scores = scores.new_zeros(len(scores), dtype=torch.float32)
        # Accumulating index_put_ sorts the rows on CUDA: deterministic, as atomics are not.
        d_scores.index_put_((ranking,), d_places, accumulate=True)
        return d_scores.to(scores.dtype), None, None


def _tile(places: int, groups: int) -> tuple[int, int]:
    """Groups and places of each that a program looks at together. Lengths are on the card; the mean is known here."""
    chunk = max(16, min(TILE, power_of_two(blocks(places, max(1, groups)))))
    return TILE // chunk, chunk
