"""QK-norm and rotary position embedding of all heads of a batch, in one pass over queries and keys.

RoPE: Su et al., 2104.09864, on the first R of the D dimensions, halves paired as in Llama: (x1, x2) becomes
(x1 cos - x2 sin, x2 cos + x1 sin). QK-norm: RMSNorm of every head (Qwen3, Gemma 3), rounded as in `norm`. Rounding,
on both paths, is that of transformers: each product and the sum are rounded to the wider of the dtypes of the heads
and of cos, the result to that of the heads.
"""

from __future__ import annotations

from typing import Any

import torch

from .dispatch import uses_cpu_kernels, uses_triton
from .launch import applied, blocks, dense, jit, power_of_two, require_unit_stride, tl
from .norm import rms_norm

TILE = 4096
"""Elements of one head that a program takes: 32 tokens of 128 dimensions."""


def rotary(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    *,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normed and rotated (query, key), same shapes and dtypes.

    cos, sin (T, R) carry the scaling; their two halves are alike, as transformers makes them, and only the first is
    read. query_norm, key_norm (D,): both or neither (ValueError). Query and key may be views of a fused QKV whose
    last dimension is contiguous. In grad mode they are left alone; with gradients off they MAY BE OVERWRITTEN (on
    CPUs they are rotated in place): use what is returned.
    """
    if (query_norm is None) != (key_norm is None):
        raise ValueError("norm the queries and the keys, or neither")
    if uses_triton(query_THD):
        return applied(TritonRotary, query_THD, key_TKD, cos_TR, sin_TR, query_norm, key_norm, eps, unit_offset)  # type: ignore[no-any-return]
    if uses_cpu_kernels(query_THD, key_TKD, cos_TR, sin_TR, query_norm, key_norm):
        from .cpu_rows import fused_rotary  # needs numba, which the torch path does not

        fused_rotary(query_THD, key_TKD, cos_TR, sin_TR, query_norm, key_norm, eps, unit_offset)
        return query_THD, key_TKD
    return (
        _reference(query_THD, cos_TR, sin_TR, query_norm, eps, unit_offset),
        _reference(key_TKD, cos_TR, sin_TR, key_norm, eps, unit_offset),
    )


def _reference(
    heads_THD: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    norm_D: torch.Tensor | None,
    eps: float,
    unit_offset: bool,
) -> torch.Tensor:
    half = cos_TR.shape[-1] // 2
    cos, sin = cos_TR[:, None, :half], sin_TR[:, None, :half]
    normed = heads_THD if norm_D is None else rms_norm(heads_THD, norm_D, eps, unit_offset=unit_offset)[0]
    first, second, rest = normed[..., :half], normed[..., half : 2 * half], normed[..., 2 * half :]
    if torch.is_grad_enabled():
        turned = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat([*(part.to(normed.dtype) for part in turned), rest], dim=-1)
    turned_first = (first * cos).sub_(second * sin)
    torch.add(second * cos, first * sin, out=second)
    first.copy_(turned_first)
    return normed


@jit
def _partner(column, WIDTH: tl.constexpr, ROTARY: tl.constexpr):
    """The column that each column is rotated with (itself beyond ROTARY), and the sign of that one's sine."""
    low = column < ROTARY // 2
    partner = tl.where(low, column + ROTARY // 2, column - ROTARY // 2)
    return tl.where(column < ROTARY, partner, column), tl.where(low, -1.0, 1.0)


@jit
def _angles(cos, sin, row, column, seen, ROTARY: tl.constexpr):
    """cos and sin of every column: 1 and 0 beyond ROTARY."""
    place = row + column % (ROTARY // 2)
    mask = seen & (column < ROTARY)
    return tl.load(cos + place, mask, 1.0).to(tl.float32), tl.load(sin + place, mask, 0.0).to(tl.float32)


@jit
def _factor(norm, column, WIDTH: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    factor = tl.load(norm + column, column < WIDTH, 0.0).to(tl.float32)
    if UNIT_OFFSET:
        factor += 1.0
    return factor


@jit
def _scaled(values, inverse, factor, dtype: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    """values * inverse * factor with the rounding points of `norm.rms_norm`."""
    unit = values * inverse
    if not UNIT_OFFSET:
        unit = unit.to(dtype).to(tl.float32)
    return (unit * factor).to(dtype).to(tl.float32)


@jit
def _forward_head(
    head, output, norm, cos, sin, token, seen, stride, output_stride, cos_stride, eps,
    WIDTH: tl.constexpr, ROTARY: tl.constexpr, UNIT_OFFSET: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = output.dtype.element_ty
    angle: tl.constexpr = cos.dtype.element_ty
    column = tl.arange(0, COLUMNS)[None, :]
    partner, sign = _partner(column, WIDTH, ROTARY)
    mask = seen & (column < WIDTH)
    own = tl.load(head + token * stride + column, mask, 0.0).to(tl.float32)
    other = tl.load(head + token * stride + partner, mask, 0.0).to(tl.float32)
    if norm is not None:
        inverse = tl.rsqrt(tl.sum(own * own, 1) / WIDTH + eps)[:, None]
        own = _scaled(own, inverse, _factor(norm, column, WIDTH, UNIT_OFFSET), dtype, UNIT_OFFSET)
        other = _scaled(other, inverse, _factor(norm, partner, WIDTH, UNIT_OFFSET), dtype, UNIT_OFFSET)
    cosine, sine = _angles(cos, sin, token * cos_stride, column, seen, ROTARY)
    straight, crossed = (own * cosine).to(angle).to(tl.float32), (other * sine).to(angle).to(tl.float32)
    turned = (straight + sign * crossed).to(angle)
    tl.store(output + token * output_stride + column, turned.to(dtype), mask)


@jit(do_not_specialize=["tokens"])
def _forward(
    query, key, query_out, key_out, query_norm, key_norm, cos, sin, tokens,
    query_stride, query_step, key_stride, key_step, cos_stride, eps,
    QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, WIDTH: tl.constexpr, ROTARY: tl.constexpr,
    UNIT_OFFSET: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One head of TOKENS tokens. A stride is from token to token, a step from head to head."""
    program = tl.program_id(0)
    head = (program % (QUERY_HEADS + KEY_HEADS)).to(tl.int64)
    token = (program // (QUERY_HEADS + KEY_HEADS)).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    if head < QUERY_HEADS:
        _forward_head(
            query + head * query_step, query_out + head * WIDTH, query_norm, cos, sin, token, token < tokens,
            query_stride, QUERY_HEADS * WIDTH, cos_stride, eps, WIDTH, ROTARY, UNIT_OFFSET, COLUMNS,
        )  # fmt: skip
    else:
        head -= QUERY_HEADS
        _forward_head(
            key + head * key_step, key_out + head * WIDTH, key_norm, cos, sin, token, token < tokens,
            key_stride, KEY_HEADS * WIDTH, cos_stride, eps, WIDTH, ROTARY, UNIT_OFFSET, COLUMNS,
        )  # fmt: skip


@jit
def _backward_head(
    head, d_output, d_head, norm, d_norm, cos, sin, token, seen, stride, d_stride, cos_stride, eps,
    WIDTH: tl.constexpr, ROTARY: tl.constexpr, UNIT_OFFSET: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Turns the gradient back, then takes it through the norm."""
    dtype: tl.constexpr = d_head.dtype.element_ty
    column = tl.arange(0, COLUMNS)[None, :]
    partner, sign = _partner(column, WIDTH, ROTARY)
    mask = seen & (column < WIDTH)
    own = tl.load(d_output + token * d_stride + column, mask, 0.0).to(tl.float32)
    other = tl.load(d_output + token * d_stride + partner, mask, 0.0).to(tl.float32)
    cosine, sine = _angles(cos, sin, token * cos_stride, column, seen, ROTARY)
    gradient = own * cosine - sign * other * sine
    if norm is not None:
        values = tl.load(head + token * stride + column, mask, 0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(values * values, 1) / WIDTH + eps)[:, None]
        unit = values * inverse
        weighed = unit
        if not UNIT_OFFSET:
            weighed = unit.to(dtype).to(tl.float32)
        tl.store(d_norm + tl.arange(0, COLUMNS), tl.sum(gradient * weighed, 0), tl.arange(0, COLUMNS) < WIDTH)
        gradient *= _factor(norm, column, WIDTH, UNIT_OFFSET)
        gradient = (gradient - unit * (tl.sum(gradient * unit, 1) / WIDTH)[:, None]) * inverse
    tl.store(d_head + token * d_stride + column, gradient.to(dtype), mask)


@jit(do_not_specialize=["tokens"])
def _backward(
    query, key, d_query_out, d_key_out, d_query, d_key, query_norm, key_norm, d_norm, cos, sin, tokens,
    query_stride, query_step, key_stride, key_step, cos_stride, eps,
    QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, WIDTH: tl.constexpr, ROTARY: tl.constexpr,
    UNIT_OFFSET: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = (program % (QUERY_HEADS + KEY_HEADS)).to(tl.int64)
    token = (program // (QUERY_HEADS + KEY_HEADS)).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    partial = d_norm
    if query_norm is not None:
        partial += program.to(tl.int64) * WIDTH
    if head < QUERY_HEADS:
        place = head * WIDTH
        _backward_head(
            query + head * query_step, d_query_out + place, d_query + place, query_norm, partial, cos, sin, token,
            token < tokens, query_stride, QUERY_HEADS * WIDTH, cos_stride, eps, WIDTH, ROTARY, UNIT_OFFSET, COLUMNS,
        )  # fmt: skip
    else:
        head -= QUERY_HEADS
        place = head * WIDTH
        _backward_head(
            key + head * key_step, d_key_out + place, d_key + place, key_norm, partial, cos, sin, token,
            token < tokens, key_stride, KEY_HEADS * WIDTH, cos_stride, eps, WIDTH, ROTARY, UNIT_OFFSET, COLUMNS,
        )  # fmt: skip


class TritonRotary(torch.autograd.Function):
    """`rotary` into new tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        query_norm: torch.Tensor | None,
        key_norm: torch.Tensor | None,
        eps: float,
        unit_offset: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        require_unit_stride(query, key, cos, sin, query_norm, key_norm)
        if cos.stride() != sin.stride():
            raise ValueError("cos and sin must lie alike")
        query_out, key_out = query.new_empty(query.shape), key.new_empty(key.shape)
        grid, sizes, constants, num_warps = _launch(query, key, cos, eps, unit_offset)
        _forward[grid](
            query, key, query_out, key_out, query_norm, key_norm, cos, sin, *sizes, *constants, num_warps=num_warps
        )
        ctx.save_for_backward(query, key, cos, sin, query_norm, key_norm)
        ctx.options = eps, unit_offset
        return query_out, key_out

    @staticmethod
    def backward(ctx: Any, d_query_out: torch.Tensor, d_key_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, cos, sin, query_norm, key_norm = ctx.saved_tensors
        grid, sizes, constants, num_warps = _launch(query, key, cos, *ctx.options)
        d_query, d_key = query.new_empty(query.shape), key.new_empty(key.shape)
        d_norm = None
        if query_norm is not None:
            d_norm = query.new_empty(*grid, query.shape[-1], dtype=torch.float32)
        _backward[grid](
            query, key, dense(d_query_out), dense(d_key_out), d_query, d_key, query_norm, key_norm, d_norm, cos, sin,
            *sizes, *constants, num_warps=num_warps,
        )  # fmt: skip
        if d_norm is None:
            return d_query, d_key, None, None, None, None, None, None
        heads = query.shape[1]
        d_norm = d_norm.view(-1, heads + key.shape[1], query.shape[-1])
        d_query_norm = d_norm[:, :heads].sum((0, 1)).to(query_norm.dtype)
        d_key_norm = d_norm[:, heads:].sum((0, 1)).to(key_norm.dtype)
        return d_query, d_key, None, None, d_query_norm, d_key_norm, None, None


def _launch(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, eps: float, unit_offset: bool
) -> tuple[tuple[int], tuple[int | float, ...], tuple[int, ...], int]:
    """(grid, sizes and strides, constants, warps)."""
    (tokens, query_heads, width), key_heads = query.shape, key.shape[1]
    columns = power_of_two(width)
    block = max(1, TILE // columns)
    grid = (blocks(tokens, block) * (query_heads + key_heads),)
    sizes = (tokens, *query.stride()[:2], *key.stride()[:2], cos.stride(0), eps)
    return grid, sizes, (query_heads, key_heads, width, cos.shape[-1], unit_offset, block, columns), 8
