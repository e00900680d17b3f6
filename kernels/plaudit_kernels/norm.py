"""Residual + RMSNorm and residual + LayerNorm: one read of the stream, one write of it and one of its norm.

RMSNorm: Zhang and Sennrich, 1910.07467. LayerNorm: Ba et al., 1607.06450. Rounding, on both paths, is that of
transformers' modules: the sum has the wider of the dtypes of its parts, and the norm is that of the sum as rounded;
statistics are fp32. Llama's RMSNorm rounds the normed row before the weight multiplies it, Gemma's (`unit_offset`)
and LayerNorm round once, at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import layer_norm as torch_layer_norm

from .dispatch import uses_cpu_kernels, uses_triton
from .launch import PARTIAL_ROWS, applied, blocks, dense, jit, power_of_two, require_unit_stride, row_block, tl


def rms_norm(
    hidden_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    *,
    residual_TD: torch.Tensor | None = None,
    unit_offset: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, sum), both (T, D): sum = hidden + residual, or `hidden` itself without one, in the wider of the two
    dtypes (in bf16 training the residual stream is fp32).

    With `unit_offset` the factor is 1 + weight (Gemma). The last dimension must be contiguous (ValueError on the
    Triton path otherwise); rows may be strided.
    """
    if uses_triton(hidden_TD):
        normed, total = applied(TritonNorm, hidden_TD, residual_TD, weight_D, None, eps, False, unit_offset)
        return normed, hidden_TD if total is None else total
    if uses_cpu_kernels(hidden_TD, residual_TD, weight_D):
        from .cpu_rows import fused_norm  # needs numba, which the torch path does not

        return fused_norm(hidden_TD, residual_TD, weight_D, None, eps, centre=False, unit_offset=unit_offset)
    total = hidden_TD if residual_TD is None else hidden_TD + residual_TD
    return _reference_rms_norm(total, weight_D, eps, unit_offset), total


def layer_norm(
    hidden_TD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor | None,
    eps: float,
    *,
    residual_TD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, sum), both (T, D), as in `rms_norm`."""
    if uses_triton(hidden_TD):
        normed, total = applied(TritonNorm, hidden_TD, residual_TD, weight_D, bias_D, eps, True, False)
        return normed, hidden_TD if total is None else total
    if uses_cpu_kernels(hidden_TD, residual_TD, weight_D, bias_D):
        from .cpu_rows import fused_norm

        return fused_norm(hidden_TD, residual_TD, weight_D, bias_D, eps, centre=True, unit_offset=False)
    total = hidden_TD if residual_TD is None else hidden_TD + residual_TD
    return torch_layer_norm(total, weight_D.shape, weight_D, bias_D, eps), total


def _reference_rms_norm(total_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, unit_offset: bool) -> torch.Tensor:
    dtype = total_TD.dtype
    wide = total_TD.float() if dtype in (torch.float16, torch.bfloat16) else total_TD
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if not unit_offset:
        normed = normed.to(dtype)
    factor = 1 + weight_D.to(wide.dtype) if unit_offset else weight_D
    return torch.mul(normed, factor, out=None if torch.is_grad_enabled() else normed).to(dtype)


@jit
def _normalise(total, mask, eps, WIDTH: tl.constexpr, CENTRE: tl.constexpr):
    """The normed tile in fp32 and 1 / deviation of its rows."""
    if CENTRE:
        total = tl.where(mask, total - tl.sum(total, 1)[:, None] / WIDTH, 0.0)
    inverse = tl.rsqrt(tl.sum(total * total, 1) / WIDTH + eps)
    return total * inverse[:, None], inverse


@jit(do_not_specialize=["rows"])
def _forward(
    hidden, residual, weight, bias, normed, total, rows, hidden_stride, residual_stride, eps,
    WIDTH: tl.constexpr, CENTRE: tl.constexpr, UNIT_OFFSET: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    kept = column < WIDTH
    mask = (row < rows) & kept
    values = tl.load(hidden + row * hidden_stride + column, mask, 0.0)
    if residual is not None:
        values = values.to(tl.float32) + tl.load(residual + row * residual_stride + column, mask, 0.0).to(tl.float32)
        values = values.to(total.dtype.element_ty)
        tl.store(total + row * WIDTH + column, values, mask)
    unit, _ = _normalise(values.to(tl.float32), mask, eps, WIDTH, CENTRE)
    factor = tl.load(weight + column, kept, 0.0).to(tl.float32)
    if UNIT_OFFSET:
        factor += 1.0
    elif not CENTRE:
        unit = unit.to(normed.dtype.element_ty).to(tl.float32)
    unit *= factor
    if bias is not None:
        unit += tl.load(bias + column, kept, 0.0).to(tl.float32)
    tl.store(normed + row * WIDTH + column, unit.to(normed.dtype.element_ty), mask)


@jit(do_not_specialize=["rows"])
def _backward(
    total, weight, d_normed, d_total, d_hidden, d_weight, d_bias, rows, total_stride, eps,
    WIDTH: tl.constexpr, CENTRE: tl.constexpr, UNIT_OFFSET: tl.constexpr, COLUMNS: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """With u the normed row and g = d_normed * factor: d_hidden = (g - [mean g] - u mean(g u)) / deviation.

    PARTIAL rows one by one; the copy of the next one to shared memory is under way while one is reduced.
    """
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    kept = column < WIDTH
    factor = tl.load(weight + column, kept, 0.0).to(tl.float32)
    if UNIT_OFFSET:
        factor += 1.0
    weight_sum, bias_sum = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for step in tl.range(0, PARTIAL, num_stages=2):
        row = program * PARTIAL + step
        mask = (row < rows) & kept
        values = tl.load(total + row * total_stride + column, mask, 0.0).to(tl.float32)
        gradient = tl.load(d_normed + row * WIDTH + column, mask, 0.0).to(tl.float32)
        if d_total is not None:
            straight = tl.load(d_total + row * WIDTH + column, mask, 0.0).to(tl.float32)
        weighed = gradient * factor
        if CENTRE:
            values = tl.where(kept, values - tl.sum(values, 0) / WIDTH, 0.0)
        # Both sums in one reduction: the warps wait for each other once.
        square, along = tl.split(tl.sum(tl.join(values * values, weighed * values), 0) / WIDTH)
        inverse = tl.rsqrt(square + eps)
        unit = values * inverse
        rounded = unit if UNIT_OFFSET or CENTRE else unit.to(total.dtype.element_ty).to(tl.float32)
        weight_sum += gradient * rounded
        if d_bias is not None:
            bias_sum += gradient
        change = weighed - unit * (along * inverse)
        if CENTRE:
            change -= tl.sum(weighed, 0) / WIDTH
        change *= inverse
        if d_total is not None:
            change += straight
        tl.store(d_hidden + row * WIDTH + column, change.to(d_hidden.dtype.element_ty), mask)
    tl.store(d_weight + program * WIDTH + column, weight_sum, kept)
    if d_bias is not None:
        tl.store(d_bias + program * WIDTH + column, bias_sum, kept)


class TritonNorm(torch.autograd.Function):
    """(normed, sum), or (normed, None) without a residual: RMSNorm, or LayerNorm with `centre`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
        centre: bool,
        unit_offset: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        require_unit_stride(hidden, residual, weight, bias)
        rows, width = hidden.shape
        block = row_block(width)
        wider = hidden.dtype if residual is None else torch.promote_types(hidden.dtype, residual.dtype)
        normed = hidden.new_empty(rows, width, dtype=wider)
        total = None if residual is None else torch.empty_like(normed)
        residual_stride = 0 if residual is None else residual.stride(0)
        _forward[(blocks(rows, block.rows),)](
            hidden, residual, weight, bias, normed, total, rows, hidden.stride(0), residual_stride, eps,
            # Rows of a tile that round unlike each other would know their company.
            width, centre, unit_offset, block.rows, block.columns, num_warps=block.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
        ctx.save_for_backward(hidden if total is None else total, weight)
        ctx.options = eps, centre, unit_offset, None if bias is None else bias.dtype
        ctx.dtypes = hidden.dtype, None if residual is None else residual.dtype
        return normed, total

    @staticmethod
    def backward(ctx: Any, d_normed: torch.Tensor, d_total: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        eps, centre, unit_offset, bias_dtype = ctx.options
        rows, width = total.shape
        columns, programs = power_of_two(width), blocks(rows, PARTIAL_ROWS)
        d_hidden = total.new_empty(rows, width)
        d_weight = total.new_empty(programs, width, dtype=torch.float32)
        d_bias = None if bias_dtype is None else torch.empty_like(d_weight)
        _backward[(programs,)](
            total, weight, dense(d_normed), None if d_total is None else dense(d_total), d_hidden, d_weight, d_bias,
            rows, total.stride(0), eps, width, centre, unit_offset, columns, PARTIAL_ROWS,
            num_warps=max(1, min(32, columns // 512)),
        )  # fmt: skip
        bias_gradient = None if d_bias is None else d_bias.sum(0).to(bias_dtype)
        own, other = ctx.dtypes
        residual_gradient = None if other is None else d_hidden.to(other)
        return d_hidden.to(own), residual_gradient, d_weight.sum(0).to(weight.dtype), bias_gradient, None, None, None
