"""The pooled head: gather the pooled rows, final RMSNorm, linear layer, all in fp32.

A bf16 score near 8 comes in steps of 0.0625: ties that the model did not mean. Without gradients one kernel does it;
training composes `rms_norm` and torch's product over the few pooled rows.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear, pad

from .dispatch import uses_triton
from .launch import blocks, jit, power_of_two, require_unit_stride, tl
from .norm import rms_norm
from .tiles import BLOCK

PROGRAMS = 4096
"""So many rows have a program each and spread over the whole chip; of more rows a program takes several."""


def pooled_head(
    hidden_TD: torch.Tensor,
    rows_N: torch.Tensor,
    weight_AD: torch.Tensor,
    bias_A: torch.Tensor | None,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
) -> torch.Tensor:
    """Attributes (N, A) fp32 of the rows `rows_N` (int64) of `hidden`; no rounding in between.

    norm_weight (D,): of the final RMSNorm (its factor is 1 + norm_weight with `unit_offset`); None is no norm. On the
    torch path the rows are rounded up to whole blocks, so that the product's kernel does not depend on N.
    """
    tensors = (hidden_TD, weight_AD, bias_A, norm_weight)
    trained = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if uses_triton(hidden_TD) and not trained:
        return fused_head(hidden_TD, rows_N, weight_AD, bias_A, norm_weight, eps, unit_offset)
    pooled = pad(_wide(hidden_TD[rows_N]), (0, 0, 0, -len(rows_N) % BLOCK))
    if norm_weight is not None:
        pooled, _ = rms_norm(pooled, _wide(norm_weight), eps, unit_offset=unit_offset)
    return linear(pooled, _wide(weight_AD), None if bias_A is None else _wide(bias_A))[: len(rows_N)]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@jit(do_not_specialize=["count", "steps"])
def _forward(
    hidden, rows, weight, bias, norm, output, count, steps, hidden_stride, weight_stride, eps,
    WIDTH: tl.constexpr, ATTRIBUTES: tl.constexpr, UNIT_OFFSET: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One attribute of `steps` rows: what multiplies them stays in registers, and the next rows are copied to shared
    memory while one is reduced."""
    attribute = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    kept = column < WIDTH
    line = tl.load(weight + attribute * weight_stride + column, kept, 0.0).to(tl.float32)
    if norm is not None:
        factor = tl.load(norm + column, kept, 0.0).to(tl.float32)
        if UNIT_OFFSET:
            factor += 1.0
        line *= factor
    for step in tl.range(0, steps, num_stages=3):
        place = tl.program_id(0).to(tl.int64) * steps + step
        row = tl.load(rows + place, place < count, 0).to(tl.int64)
        values = tl.load(hidden + row * hidden_stride + column, kept & (place < count), 0.0).to(tl.float32)
        if norm is None:
            score = tl.sum(values * line, 0)
        else:  # both sums in one reduction: the warps wait for each other once
            score, square = tl.split(tl.sum(tl.join(values * line, values * values), 0))
            score *= tl.rsqrt(square / WIDTH + eps)
        if bias is not None:
            score += tl.load(bias + attribute).to(tl.float32)
        tl.store(output + place * ATTRIBUTES + attribute, score, place < count)


def fused_head(
    hidden_TD: torch.Tensor,
    rows_N: torch.Tensor,
    weight_AD: torch.Tensor,
    bias_A: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    unit_offset: bool,
) -> torch.Tensor:
    """`pooled_head` as one kernel, without gradients. `rows_N` must lie within `hidden`: the kernel does not check."""
    require_unit_stride(hidden_TD, rows_N, weight_AD, bias_A, norm_weight)
    count, (attributes, width) = len(rows_N), weight_AD.shape
    columns, steps = power_of_two(width), max(1, blocks(count, PROGRAMS))
    output = hidden_TD.new_empty(count, attributes, dtype=torch.float32)
    _forward[(blocks(count, steps), attributes)](
        hidden_TD, rows_N, weight_AD, bias_A, norm_weight, output, count, steps, hidden_TD.stride(0),
        weight_AD.stride(0), eps, width, attributes, unit_offset, columns, num_warps=max(1, min(32, columns // 1024)),
    )  # fmt: skip
    return output
