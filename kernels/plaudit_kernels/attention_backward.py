"""Backward pass of the Triton attention, and the autograd function around both passes.

Two kernels, neither with atomics, so that the same batch always gives the same bits (FlashAttention-2, Dao,
2307.08691): one program per block of queries for dQ; one per block of own keys of a segment and key head for dK and
dV, which visits in a fixed order the segment's own queries and then those of every segment that reads it as prefix.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .attention_table import DELTA_ROWS, launches, padded_width
from .attention_triton import (
    MASKED,
    UNREAD,
    UNSPECIALISED,
    Factors,
    constants,
    fields_of,
    forward,
    key_range,
    key_rows,
    load_rows,
    locate,
    logits,
    pieces,
    sees,
    store_rows,
    strides,
    tiles_of,
)
from .blocks import TILE, BlockPlan
from .chips import table_of
from .launch import applied


@triton.jit(do_not_specialize=UNSPECIALISED)
def _delta(
    out, grad, delta, o_row, o_head, g_row, g_head, tokens,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta (H, T) = the sum over D of output * gradient, in fp32."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    real = rows < tokens
    output = load_rows(out + head * (o_head * 8), rows, o_row, real, WIDTH, BLOCK_D).to(tl.float32)
    gradient = load_rows(grad + head * (g_head * 8), rows, g_row, real, WIDTH, BLOCK_D).to(tl.float32)
    tl.store(delta + head * tokens + rows, tl.sum(output * gradient, 1), mask=real)


@triton.jit
def _gather(
    total_dq, query, gradient, norm, offset, queries, low, high, segment,
    k, v, k_row, v_row, k_tiles, v_tiles, column, inner, outer,
    CHECKED: tl.constexpr, DESCRIBED: tl.constexpr, STAGES: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, without the scale, from the keys low .. high."""
    for at in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        keys = at + tl.arange(0, BLOCK_N)
        key = key_rows(at, keys, segment, k, k_row, k_tiles, column, DESCRIBED, WIDTH, BLOCK_D)
        value = key_rows(at, keys, segment, v, v_row, v_tiles, column, DESCRIBED, WIDTH, BLOCK_D)
        x, factor, slope = logits(tl.dot(query, tl.trans(key), input_precision=PRECISION), inner, outer, CAPPED)
        if CHECKED:
            real = keys < segment[1]
            x = tl.where(sees(queries[:, None], keys[None, :], CAUSAL, WINDOW) & real[None, :], x, MASKED)
        weight = tl.exp2(tl.fma(x, factor, -norm[:, None]))
        dweight = tl.dot(gradient, tl.trans(value), input_precision=PRECISION)
        dx = weight * (dweight - offset[:, None]) * slope
        total_dq = tl.dot(dx.to(key.dtype), key, total_dq, input_precision=PRECISION)
    return total_dq


@triton.jit(do_not_specialize=UNSPECIALISED)
def _query_gradient(
    q, k, v, k_tiles, v_tiles, grad, lse, delta, dq, segments, tiles, inner, outer, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head, o_row, o_head, tokens,
    STAGES: tl.constexpr,
    FOLD: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dQ of BLOCK_M queries of one tile, one query head."""
    _, segment, first = locate(segments, tiles, TILE, BLOCK_M)
    start, total, _, prefix = segment
    if (first >= total) | (first + BLOCK_M <= prefix):
        return
    head = tl.program_id(1).to(tl.int64)
    queries = first + tl.arange(0, BLOCK_M)
    own = (queries >= prefix) & (queries < total)
    rows = start + queries - prefix
    query = load_rows(q + head * (q_head * 8), rows, q_row, own, WIDTH, BLOCK_D)
    gradient = load_rows(grad + head * (g_head * 8), rows, g_row, own, WIDTH, BLOCK_D)
    norm = tl.load(lse + head * tokens + rows, mask=own, other=UNREAD)
    offset = tl.load(delta + head * tokens + rows, mask=own, other=0.0)
    k += (head // FOLD) * (k_head * 8)
    v += (head // FOLD) * (v_head * 8)
    column = tl.program_id(1) // FOLD * WIDTH
    low, full, high = key_range(first, total, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    total_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    DESCRIBED: tl.constexpr = k_tiles is not None
    if DESCRIBED:
        edge, whole = pieces(prefix, full, BLOCK_N)
        total_dq = _gather(
            total_dq, query, gradient, norm, offset, queries, low, edge, segment,
            k, v, k_row, v_row, k_tiles, v_tiles, column, inner, outer,
            False, True, STAGES, CAUSAL, WINDOW, CAPPED, WIDTH, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
        total_dq = _gather(
            total_dq, query, gradient, norm, offset, queries, edge, whole, segment,
            k, v, k_row, v_row, k_tiles, v_tiles, column, inner, outer,
            False, False, 1, CAUSAL, WINDOW, CAPPED, WIDTH, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
        total_dq = _gather(
            total_dq, query, gradient, norm, offset, queries, whole, full, segment,
            k, v, k_row, v_row, k_tiles, v_tiles, column, inner, outer,
            False, True, STAGES, CAUSAL, WINDOW, CAPPED, WIDTH, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
        low = full
    total_dq = _gather(
        total_dq, query, gradient, norm, offset, queries, low, high, segment,
        k, v, k_row, v_row, k_tiles, v_tiles, column, inner, outer,
        True, False, 1 if DESCRIBED else STAGES, CAUSAL, WINDOW, CAPPED, WIDTH, BLOCK_D, BLOCK_N, PRECISION,
    )  # fmt: skip
    store_rows(dq + head * (o_head * 8), rows, o_row, own, total_dq * scale, WIDTH, BLOCK_D)


@triton.jit
def _visited(
    first, last, known, length, prefix,
    SPLIT: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(low, clear, end, high): the own rows low .. high of a visiting segment, from a multiple of BLOCK_M, are the
    queries that see any of the keys at its logical positions first .. last, of which it knows those before `known`.
    In the whole blocks clear .. end every query sees all of them, and no mask is needed."""
    low, high = 0, length
    if CAUSAL:
        low = tl.maximum(first - prefix, 0)
        if WINDOW:
            high = tl.minimum(length, last + WINDOW - 1 - prefix)
    elif WINDOW:
        low = tl.maximum(first - WINDOW // 2 - prefix, 0)
        high = tl.minimum(length, last + WINDOW // 2 - prefix)
    low = low // BLOCK_M * BLOCK_M
    if not SPLIT:
        return low, low, low, high
    clear, end = low, high // BLOCK_M * BLOCK_M
    if CAUSAL:
        clear = tl.cdiv(tl.maximum(last - 1 - prefix, 0), BLOCK_M) * BLOCK_M
    clear = tl.where((first < 0) | (last > known), end, tl.minimum(clear, end))
    return low, clear, end, high


@triton.jit
def _scatter(
    totals, key, value, keys, kv_head, visitor, low, clear, jump, blocks,
    q, q_row, q_head, q_tiles, grad, g_row, g_head, grad_tiles, lse, delta, tokens, inner, outer,
    CHECKED: tl.constexpr, FOLD: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV, without the scale, from `blocks` blocks of a visitor's queries, those of each of FOLD heads: from its
    own row `low`, with a jump ahead at `clear`. One loop over heads and blocks: short responses keep it full."""
    total_dk, total_dv = totals
    start, length, prefix = visitor
    head = kv_head * FOLD
    block = 0
    for _ in range(0, FOLD * blocks):
        at = low + block * BLOCK_M
        if CHECKED:
            at += tl.where(at < clear, 0, jump)
        within = at + tl.arange(0, BLOCK_M)
        asked = within < length
        rows = start + within
        if q_tiles is not None:  # rows behind the visitor's end are another's: their weights are 0
            column = head.to(tl.int32) * WIDTH
            query = q_tiles.load([start + at, column])
            gradient = grad_tiles.load([start + at, column])
        else:
            query = load_rows(q + head * (q_head * 8), rows, q_row, asked, WIDTH, BLOCK_D)
            gradient = load_rows(grad + head * (g_head * 8), rows, g_row, asked, WIDTH, BLOCK_D)
        if CHECKED:
            norm = tl.load(lse + head * tokens + rows, mask=asked, other=0.0)
            offset = tl.load(delta + head * tokens + rows, mask=asked, other=0.0)
        else:
            place = head * tokens + start + at + tl.arange(0, BLOCK_M)
            norm = tl.load(lse + place)
            offset = tl.load(delta + place)
        x, factor, slope = logits(tl.dot(key, tl.trans(query), input_precision=PRECISION), inner, outer, CAPPED)
        if CHECKED:
            queries = tl.where(asked, prefix + within, -1)
            x = tl.where(sees(queries[None, :], keys[:, None], CAUSAL, WINDOW), x, MASKED)
        weight = tl.exp2(x * factor - norm[None, :])
        total_dv = tl.dot(weight.to(gradient.dtype), gradient, total_dv, input_precision=PRECISION)
        dweight = tl.dot(value, tl.trans(gradient), input_precision=PRECISION)
        dx = weight * (dweight - offset[None, :]) * slope
        total_dk = tl.dot(dx.to(query.dtype), query, total_dk, input_precision=PRECISION)
        block += 1
        head += tl.where(block == blocks, 1, 0)
        block = tl.where(block == blocks, 0, block)
    return total_dk, total_dv


@triton.jit(do_not_specialize=UNSPECIALISED)
def _key_gradient(
    q, k, v, q_tiles, grad_tiles, grad, lse, delta, dk, dv, segments, key_tiles, visitor_offsets, visitors,
    inner, outer, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head, o_row, o_head, tokens,
    FOLD: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of BLOCK_N own rows of one segment, one key head."""
    number, segment, first = locate(segments, key_tiles, TILE, BLOCK_N)
    start, total, _, prefix = segment
    length = total - prefix
    if first >= length:
        return
    SPLIT: tl.constexpr = q_tiles is not None  # then there is no window; through pointers a second loop spills
    kv_head = tl.program_id(1).to(tl.int64)
    offsets = first + tl.arange(0, BLOCK_N)
    rows = start + offsets
    own = offsets < length
    key = load_rows(k + kv_head * (k_head * 8), rows, k_row, own, WIDTH, BLOCK_D)
    value = load_rows(v + kv_head * (v_head * 8), rows, v_row, own, WIDTH, BLOCK_D)
    totals = (tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32))
    for visit in range(tl.load(visitor_offsets + number), tl.load(visitor_offsets + number + 1)):
        visitor = tl.load(visitors + visit)
        its_start, its_length, its_prefix_start, its_prefix = fields_of(segments, visitor)
        # Where the visitor meets these rows: as its own, or in its prefix.
        itself = visitor == number
        origin = tl.where(itself, start - prefix, its_prefix_start)
        keys, known = rows - origin, tl.where(itself, total, its_prefix)
        keys = tl.where((keys >= 0) & (keys < known), keys, 1 << 30 if CAUSAL else -1)  # seen by nobody
        at = start + first - origin
        last = at + tl.minimum(BLOCK_N, length - first)
        low, clear, end, high = _visited(at, last, known, its_length, its_prefix, SPLIT, CAUSAL, WINDOW, BLOCK_M)
        fields = (its_start, its_length, its_prefix)
        checked = (clear - low) // BLOCK_M + tl.cdiv(high - end, BLOCK_M)
        totals = _scatter(
            totals, key, value, keys, kv_head, fields, low, clear, end - clear, checked,
            q, q_row, q_head, q_tiles, grad, g_row, g_head, grad_tiles, lse, delta, tokens, inner, outer,
            True, FOLD, CAUSAL, WINDOW, CAPPED, WIDTH, BLOCK_D, BLOCK_M, PRECISION,
        )  # fmt: skip
        if SPLIT:
            totals = _scatter(
                totals, key, value, keys, kv_head, fields, clear, clear, 0, (end - clear) // BLOCK_M,
                q, q_row, q_head, q_tiles, grad, g_row, g_head, grad_tiles, lse, delta, tokens, inner, outer,
                False, FOLD, CAUSAL, WINDOW, CAPPED, WIDTH, BLOCK_D, BLOCK_M, PRECISION,
            )  # fmt: skip
    total_dk, total_dv = totals
    store_rows(dk + kv_head * (o_head * 8), rows, o_row, own, total_dk * scale, WIDTH, BLOCK_D)
    store_rows(dv + kv_head * (o_head * 8), rows, o_row, own, total_dv, WIDTH, BLOCK_D)


def backward(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    grad_THD: torch.Tensor,
    plan: BlockPlan,
    factors: Factors,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query (T, H, D), key and value (T, K, D), from (query, key, value, output, lse) of the forward."""
    query, key, value, out, lse = tensors
    tokens, heads, width = query.shape
    grad = grad_THD.contiguous()  # autograd may hand over a broadcast one
    delta = torch.empty_like(lse)
    _delta[(triton.cdiv(tokens, DELTA_ROWS), heads)](
        out, grad, delta, *strides(out), *strides(grad), tokens,
        WIDTH=width, BLOCK_D=padded_width(width), ROWS=DELTA_ROWS,
    )  # fmt: skip
    dq = torch.empty_like(out) if plan.whole else torch.zeros_like(out)
    dk, dv = key.new_empty(key.shape), value.new_empty(value.shape)
    numbers = (factors.inner, factors.outer, factors.scale)
    layout = (*strides(query), *strides(key), *strides(value), *strides(grad))
    rows = launches(width, query.element_size(), table_of(query.device))
    launch = rows.query_gradient
    tiles = tiles_of(launch, launch.keys, plan, key, value)
    _query_gradient[(len(plan.tiles) * (TILE // launch.queries), heads)](
        query, key, value, *tiles, grad, lse, delta, dq, plan.segments, plan.tiles, *numbers, *layout, *strides(dq),
        tokens, STAGES=launch.num_stages, enable_fp_fusion=None in tiles,
        **constants(query, key, plan, factors, launch),
    )  # fmt: skip
    launch, described = rows.key_gradient, (None, None)
    if (plain := rows.plain_key_gradient) and plan.causal and not factors.capped:
        described = tiles_of(plain, plain.queries, plan, query, grad)
        launch = launch if None in described else plain
    _key_gradient[(len(plan.key_tiles) * (TILE // launch.keys), key.shape[1])](
        query, key, value, *described, grad, lse, delta, dk, dv,
        plan.segments, plan.key_tiles, plan.visitor_offsets, plan.visitors, *numbers, *layout, *strides(dk), tokens,
        **constants(query, key, plan, factors, launch),
    )  # fmt: skip
    return dq, dk, dv


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: BlockPlan, factors: Factors
    ) -> torch.Tensor:
        out, lse = forward(query, key, value, plan, factors)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.factors = plan, factors
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*backward(ctx.saved_tensors, grads[0], ctx.plan, ctx.factors), None, None)


def attend(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention output (T, H, D), differentiable; see `packed_attention`."""
    factors = Factors.of(scale, softcap)
    out: torch.Tensor = applied(_Attention, query_THD, key_TKD, value_TKD, plan, factors)
    return out
