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

PAIRS = 1024
"""Pairs of one head that a program takes at once: 16 tokens of 128 dimensions, 8 pairs a thread."""
HEADS = 4
"""Heads that share the angles in the registers of a thread. The backward pass, which keeps more, takes half as many at
once and walks over the others."""


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
    read. query_norm, key_norm (D,): both or neither, D even (ValueError). Query and key may be views of a fused QKV
    whose last dimension is contiguous. In grad mode they are left alone; with gradients off they MAY BE OVERWRITTEN
    (on CPUs they are rotated in place): use what is returned.
    """
    if (query_norm is None) != (key_norm is None) or query_THD.shape[-1] % 2:
        raise ValueError("norm the queries and the keys, or neither; heads have an even size")
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
def _columns(WIDTH: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr):
    """(pair, its two columns, whether there is one). What is not rotated makes pairs of its own, turned by no angle."""
    pair = tl.arange(0, HALF)[None, :]
    first, second = pair, pair + ROTARY // 2
    if ROTARY < WIDTH:
        first = tl.where(pair < ROTARY // 2, first, second)
        second = first + tl.where(pair < ROTARY // 2, ROTARY // 2, (WIDTH - ROTARY) // 2)
    return pair, first, second, pair < WIDTH // 2


@jit
def _repeated(source, mask, other, HEADS: tl.constexpr, TOKENS: tl.constexpr):
    """What is read once, of every token, for all heads: the rows of heads are the tokens, one head after another."""
    values = tl.load(source, tl.broadcast_to(mask, source.shape), other).to(tl.float32)[None]
    return tl.reshape(tl.broadcast_to(values, (HEADS, TOKENS, mask.shape[1])), (HEADS * TOKENS, mask.shape[1]))


@jit
def _angles(cos, sin, first, tokens, pair, stride, ROTARY: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr):
    token = first + tl.arange(0, TOKENS)[:, None]
    place, mask = token * stride + pair, (pair < ROTARY // 2) & (token < tokens)
    return _repeated(cos + place, mask, 1.0, HEADS, TOKENS), _repeated(sin + place, mask, 0.0, HEADS, TOKENS)


@jit
def _factor(norm, mask, UNIT_OFFSET: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr):
    factor = _repeated(tl.broadcast_to(norm, (TOKENS, norm.shape[1])), mask, 0.0, HEADS, TOKENS)
    return factor + 1.0 if UNIT_OFFSET else factor


@jit
def _rounded(unit, dtype: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    """What the factor of the norm multiplies."""
    return unit if UNIT_OFFSET else unit.to(dtype).to(tl.float32)


@jit
def _scaled(values, inverse, factor, dtype: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    """values * inverse * factor with the rounding points of `norm.rms_norm`."""
    return (_rounded(values * inverse, dtype, UNIT_OFFSET) * factor).to(dtype).to(tl.float32)


@jit
def _turned(straight, crossed, angle: tl.constexpr):
    """The sum of two products, each rounded first: in bf16 too the compiler would fuse one with the sum if it might."""
    return (straight.to(angle).to(tl.float32) + crossed.to(angle).to(tl.float32)).to(angle)


@jit
def _forward_heads(
    heads, output, norm, cos, sin, first_head, first_token, tokens, stride, step, cos_stride, eps, COUNT: tl.constexpr,
    WIDTH: tl.constexpr, ROTARY: tl.constexpr, UNIT_OFFSET: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = output.dtype.element_ty
    angle: tl.constexpr = dtype if cos.dtype.element_ty == dtype else tl.float32
    pair, first, second, kept = _columns(WIDTH, ROTARY, HALF)
    cosine, sine = _angles(cos, sin, first_token, tokens, pair, cos_stride, ROTARY, HEADS, TOKENS)
    row = tl.arange(0, HEADS * TOKENS)[:, None]
    head, token = first_head + row // TOKENS, first_token + row % TOKENS
    seen = (head < COUNT) & (token < tokens) & kept
    source, target = heads + token * stride + head * step, output + (token * COUNT + head) * WIDTH
    one = tl.load(source + first, seen, 0.0).to(tl.float32)
    two = tl.load(source + second, seen, 0.0).to(tl.float32)
    if norm is not None:
        inverse = tl.rsqrt(tl.sum(one * one + two * two, 1) / WIDTH + eps)[:, None]
        one = _scaled(one, inverse, _factor(norm + first, kept, UNIT_OFFSET, HEADS, TOKENS), dtype, UNIT_OFFSET)
        two = _scaled(two, inverse, _factor(norm + second, kept, UNIT_OFFSET, HEADS, TOKENS), dtype, UNIT_OFFSET)
    tl.store(target + first, _turned(one * cosine, -two * sine, angle).to(dtype), seen)
    tl.store(target + second, _turned(two * cosine, one * sine, angle).to(dtype), seen)


@jit(do_not_specialize=["tokens"])
def _forward(
    query, key, query_out, key_out, query_norm, key_norm, cos, sin, tokens,
    query_stride, query_step, key_stride, key_step, cos_stride, eps,
    QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, WIDTH: tl.constexpr, ROTARY: tl.constexpr,
    UNIT_OFFSET: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """HEADS heads of TOKENS tokens. A stride is from token to token, a step from head to head."""
    groups: tl.constexpr = (QUERY_HEADS + HEADS - 1) // HEADS
    every: tl.constexpr = groups + (KEY_HEADS + HEADS - 1) // HEADS
    group = (tl.program_id(0) % every).to(tl.int64)
    token = (tl.program_id(0) // every).to(tl.int64) * TOKENS
    if group < groups:
        _forward_heads(
            query, query_out, query_norm, cos, sin, group * HEADS, token, tokens, query_stride, query_step, cos_stride,
            eps, QUERY_HEADS, WIDTH, ROTARY, UNIT_OFFSET, TOKENS, HEADS, HALF,
        )  # fmt: skip
    else:
        _forward_heads(
            key, key_out, key_norm, cos, sin, (group - groups) * HEADS, token, tokens, key_stride, key_step, cos_stride,
            eps, KEY_HEADS, WIDTH, ROTARY, UNIT_OFFSET, TOKENS, HEADS, HALF,
        )  # fmt: skip


@jit
def _backward_heads(
    heads, d_output, d_heads, norm, d_norm, cos, sin, first_token, tokens, stride, step, cos_stride, eps,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, ROTARY: tl.constexpr, UNIT_OFFSET: tl.constexpr, TOKENS: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Turns the gradient back, then takes it through the norm. The gradient of the norm: the sum over all heads."""
    dtype: tl.constexpr = d_heads.dtype.element_ty
    pair, first, second, kept = _columns(WIDTH, ROTARY, HALF)
    cosine, sine = _angles(cos, sin, first_token, tokens, pair, cos_stride, ROTARY, HEADS, TOKENS)
    sum_one, sum_two = tl.zeros((TOKENS, HALF), tl.float32), tl.zeros((TOKENS, HALF), tl.float32)
    row = tl.arange(0, HEADS * TOKENS)[:, None]
    token = first_token + row % TOKENS
    for first_head in range(0, COUNT, HEADS):
        head = first_head + (row // TOKENS).to(tl.int64)
        seen = (head < COUNT) & (token < tokens) & kept
        source, own = heads + token * stride + head * step, (token * COUNT + head) * WIDTH
        d_one = tl.load(d_output + own + first, seen, 0.0).to(tl.float32)
        d_two = tl.load(d_output + own + second, seen, 0.0).to(tl.float32)
        d_one, d_two = d_one * cosine + d_two * sine, d_two * cosine - d_one * sine
        if norm is not None:
            one = tl.load(source + first, seen, 0.0).to(tl.float32)
            two = tl.load(source + second, seen, 0.0).to(tl.float32)
            inverse = tl.rsqrt(tl.sum(one * one + two * two, 1) / WIDTH + eps)[:, None]
            one, two = one * inverse, two * inverse
            change_one, change_two = (
                d_one * _rounded(one, dtype, UNIT_OFFSET),
                d_two * _rounded(two, dtype, UNIT_OFFSET),
            )
            sum_one += tl.sum(tl.reshape(change_one, (HEADS, TOKENS, HALF)), 0)
            sum_two += tl.sum(tl.reshape(change_two, (HEADS, TOKENS, HALF)), 0)
            d_one *= _factor(norm + first, kept, UNIT_OFFSET, HEADS, TOKENS)
            d_two *= _factor(norm + second, kept, UNIT_OFFSET, HEADS, TOKENS)
            along = (tl.sum(d_one * one + d_two * two, 1) / WIDTH)[:, None]
            d_one, d_two = (d_one - one * along) * inverse, (d_two - two * along) * inverse
        tl.store(d_heads + own + first, d_one.to(dtype), seen)
        tl.store(d_heads + own + second, d_two.to(dtype), seen)
    if norm is not None:
        tl.store(d_norm + first, tl.sum(sum_one, 0)[None, :], kept)
        tl.store(d_norm + second, tl.sum(sum_two, 0)[None, :], kept)


@jit(do_not_specialize=["tokens"])
def _backward(
    query, key, d_query_out, d_key_out, d_query, d_key, query_norm, key_norm, d_norm, cos, sin, tokens,
    query_stride, query_step, key_stride, key_step, cos_stride, eps,
    QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, WIDTH: tl.constexpr, ROTARY: tl.constexpr,
    UNIT_OFFSET: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """All queries of TOKENS tokens, or all keys: the shorter programs come last."""
    program, side = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = program * TOKENS
    partial = d_norm
    if query_norm is not None:
        partial += (program * 2 + side) * WIDTH
    if side == 0:
        _backward_heads(
            query, d_query_out, d_query, query_norm, partial, cos, sin, token, tokens, query_stride, query_step,
            cos_stride, eps, QUERY_HEADS, WIDTH, ROTARY, UNIT_OFFSET, TOKENS, HEADS, HALF,
        )  # fmt: skip
    else:
        _backward_heads(
            key, d_key_out, d_key, key_norm, partial, cos, sin, token, tokens, key_stride, key_step,
            cos_stride, eps, KEY_HEADS, WIDTH, ROTARY, UNIT_OFFSET, TOKENS, HEADS, HALF,
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
        programs, sizes, constants = _launch(query, key, cos, HEADS, eps, unit_offset)
        groups = blocks(query.shape[1], HEADS) + blocks(key.shape[1], HEADS)
        _forward[(programs * groups,)](
            query, key, query_out, key_out, query_norm, key_norm, cos, sin, *sizes, *constants, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
        ctx.save_for_backward(query, key, cos, sin, query_norm, key_norm)
        ctx.options = eps, unit_offset
        return query_out, key_out

    @staticmethod
    def backward(ctx: Any, d_query_out: torch.Tensor, d_key_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, cos, sin, query_norm, key_norm = ctx.saved_tensors
        programs, sizes, constants = _launch(query, key, cos, HEADS // 2, *ctx.options)
        d_query, d_key = query.new_empty(query.shape), key.new_empty(key.shape)
        d_norm = None if query_norm is None else query.new_empty(programs, 2, query.shape[-1], dtype=torch.float32)
        _backward[(programs, 2)](
            query, key, dense(d_query_out), dense(d_key_out), d_query, d_key, query_norm, key_norm, d_norm, cos, sin,
            *sizes, *constants, num_warps=4,
        )  # fmt: skip
        if d_norm is None:
            return d_query, d_key, None, None, None, None, None, None
        d_query_norm, d_key_norm = d_norm.sum(0)
        return d_query, d_key, None, None, d_query_norm.to(query_norm.dtype), d_key_norm.to(key_norm.dtype), None, None


def _launch(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, heads: int, eps: float, unit_offset: bool
) -> tuple[int, tuple[int | float, ...], tuple[int, ...]]:
    """(blocks of tokens, sizes and strides, constants)."""
    (tokens, query_heads, width), key_heads, rotated = query.shape, key.shape[1], cos.shape[-1]
    half = power_of_two(width // 2)
    block = max(1, PAIRS // half)
    sizes = (tokens, *query.stride()[:2], *key.stride()[:2], cos.stride(0), eps)
    constants = (query_heads, key_heads, width, rotated, unit_offset, block, heads, half)
    return blocks(tokens, block), sizes, constants
