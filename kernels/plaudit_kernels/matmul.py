"""Matrix products whose rows do not know how many they are, and a rowwise fp8 product.

A library picks another kernel for another number of rows, and with it other bits. `matmul` has one tile shape and one
order along K a dtype, nothing split: the bits of a row are a function of that row and of the second matrix. The grid
is persistent (each program walks tiles, in groups of rows that share the second matrix in the cache); which program
computes a tile changes no bit of it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

from . import library_fp8
from .chips import TableName, table_of
from .descriptors import described
from .dispatch import uses_triton
from .launch import applied, autocast, blocks, jit, require_unit_stride, row_block, tl


class Tiles(NamedTuple):
    """Rows, columns and depth of a tile, and what runs it. `described`: the copy engine of Hopper moves it."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    described: bool = False


_EXACT = Tiles(64, 64, 32, 4, 3)
TILES: dict[TableName, dict[torch.dtype, Tiles]] = {
    "sm_90": {
        torch.float32: _EXACT,
        torch.float16: Tiles(128, 256, 64, 8, 3, described=True),
        torch.bfloat16: Tiles(128, 256, 64, 8, 3, described=True),
        torch.float8_e4m3fn: Tiles(128, 128, 128, 8, 4, described=True),
    },
    "default": {
        torch.float32: _EXACT,
        torch.float16: Tiles(128, 128, 32, 8, 3),
        torch.bfloat16: Tiles(128, 128, 32, 8, 3),
        torch.float8_e4m3fn: Tiles(128, 128, 64, 8, 3),
    },
}
"""By chip and dtype, and never by the number of rows: see attention_table."""

GROUP = 8
"""Row tiles walked together."""

E4M3_MAX = 448.0


def matmul(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """a @ b.T, (M, N) in the dtype of a and b: fp32 (exact products, no TF32), fp16 or bf16; sums in fp32.

    Last dimensions must be contiguous (ValueError on the Triton path otherwise). On the Triton path a row's bits do
    not depend on M; the torch path is torch's `linear`.
    """
    if uses_triton(a_MK):
        return applied(TritonMatmul, *autocast(a_MK, b_NK))  # type: ignore[no-any-return]
    return linear(a_MK, b_NK)


def matmul_fp8(a_MK: torch.Tensor, b_NK: torch.Tensor, scale_N: torch.Tensor, *, exact: bool = True) -> torch.Tensor:
    """a @ (scale b).T, (M, N) in the dtype of a, with `b, scale = quantize_rows(weight)`; no gradient.

    a (fp16, bf16 or fp32) is quantised row by row, as Micikevicius et al., 2209.05433, do per tensor. Unless `exact`,
    bf16 may be left to a library, whose rows know how many they are.
    """
    quantised, scale_M = quantize_rows(a_MK)
    if not exact and a_MK.dtype == torch.bfloat16:
        product = library_fp8.scaled_product(quantised, scale_M, b_NK, scale_N)
        if product is not None:
            return product
    if uses_triton(a_MK):
        return scaled_product(quantised, scale_M, b_NK, scale_N, a_MK.dtype)
    return (linear(quantised.float(), b_NK.float()) * scale_M[:, None] * scale_N).to(a_MK.dtype)


def quantize_rows(a_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 (M, K), scale (M,) fp32) with a ~ e4m3 * scale: the largest magnitude of each row becomes 448. A row of
    zeros has scale 1."""
    if uses_triton(a_MK):
        return triton_quantize_rows(a_MK)
    wide = a_MK.float()
    largest = wide.abs().amax(-1)
    scale = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    return (wide / scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def triton_quantize_rows(a_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` as a kernel."""
    require_unit_stride(a_MK)
    rows, width = a_MK.shape
    block = row_block(width)
    quantised = a_MK.new_empty(rows, width, dtype=torch.float8_e4m3fn)
    scale = a_MK.new_empty(rows, dtype=torch.float32)
    _quantize[(blocks(rows, block.rows),)](
        a_MK, quantised, scale, rows, a_MK.stride(0), width, block.rows, block.columns, num_warps=block.num_warps
    )
    return quantised, scale


@jit(do_not_specialize=["rows"])
def _quantize(
    a, quantised, scale, rows, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows)[:, None] & (column < WIDTH)
    values = tl.load(a + row[:, None] * stride + column, mask, 0.0).to(tl.float32)
    # A maximum passes over NaN. Of a row that has one the scale is infinite, and so no product of it is a number.
    largest = tl.max(tl.where(values == values, tl.abs(values), float("inf")), 1)
    step = tl.where(largest > 0.0, largest / 448.0, 1.0)
    # The conversion saturates.
    tl.store(quantised + row[:, None] * WIDTH + column, (values / step[:, None]).to(tl.float8e4nv), mask)
    tl.store(scale + row, step, row < rows)


@jit(do_not_specialize=["rows", "depth", "programs"])
def _product(
    a, b, output, row_scale, column_scale, rows, columns, depth, programs, a_row, a_depth, b_row, b_depth,
    WHOLE: tl.constexpr, SIXTEENS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Tiles are numbered down GROUP row tiles, then across. WHOLE: the depth is a multiple of K and needs no mask.
    SIXTEENS: rows are a multiple of 16, so that a transposed `a` is read 16 rows at a time."""
    across, down = tl.cdiv(columns, N), tl.cdiv(rows, M)
    for tile in range(tl.program_id(0), across * down, programs):
        first = tile // (GROUP * across) * GROUP
        tall = tl.minimum(down - first, GROUP)
        m = first + tile % (GROUP * across) % tall
        n = tile % (GROUP * across) // tall
        row, column = m * M + tl.arange(0, M), n * N + tl.arange(0, N)
        k = tl.arange(0, K)
        a_tile = a + row.to(tl.int64)[:, None] * a_row + k.to(tl.int64)[None, :] * a_depth
        b_tile = b + column.to(tl.int64)[None, :] * b_row + k.to(tl.int64)[:, None] * b_depth
        a_mask, b_mask = (row < rows)[:, None], (column < columns)[None, :]
        if SIXTEENS:
            a_mask = (row // 16 < rows // 16)[:, None]
        total = tl.zeros((M, N), tl.float32)
        for start in range(0, depth, K):
            if WHOLE:
                left, right = tl.load(a_tile, a_mask, 0.0), tl.load(b_tile, b_mask, 0.0)
            else:
                left = tl.load(a_tile, a_mask & (k < depth - start)[None, :], 0.0)
                right = tl.load(b_tile, b_mask & (k < depth - start)[:, None], 0.0)
            a_tile += K * a_depth
            b_tile += K * b_depth
            if row_scale is not None:  # Hopper adds fp8 products in 14 bits unless it is told how many at most
                total = tl.dot(left, right, total, max_num_imprecise_acc=K)
            else:
                total = tl.dot(left, right, total, input_precision="ieee")
        if row_scale is not None:
            total *= tl.load(row_scale + row, row < rows, 0.0)[:, None]
            total *= tl.load(column_scale + column, column < columns, 0.0)[None, :]
        place = row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(output + place, total.to(output.dtype.element_ty), a_mask & b_mask)


@jit(do_not_specialize=["rows", "columns", "depth", "programs"])
def _described_product(
    a, b, output, row_scale, column_scale, rows, columns, depth, programs,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The same walk over tiles that the copy engine brings and takes away; the output in halves, whose room a further
    stage needs. The next tile's first blocks are on their way while one is written."""
    across, down = tl.cdiv(columns, N), tl.cdiv(rows, M)
    for tile in tl.range(tl.program_id(0), across * down, programs, flatten=True):
        first = tile // (GROUP * across) * GROUP
        tall = tl.minimum(down - first, GROUP)
        m = (first + tile % (GROUP * across) % tall) * M
        n = tile % (GROUP * across) // tall * N
        total = tl.zeros((M, N), tl.float32)
        for start in range(0, depth, K):
            left, right = a.load([m, start]), b.load([n, start])
            if row_scale is not None:
                total = tl.dot(left, right.T, total, max_num_imprecise_acc=K)
            else:
                total = tl.dot(left, right.T, total, input_precision="ieee")
        if row_scale is not None:
            row, column = m + tl.arange(0, M), n + tl.arange(0, N)
            total *= tl.load(row_scale + row, row < rows, 0.0)[:, None]
            total *= tl.load(column_scale + column, column < columns, 0.0)[None, :]
        near, far = tl.split(tl.permute(tl.reshape(total, (M, 2, N // 2)), (0, 2, 1)))
        output.store([m, n], near.to(output.dtype))
        output.store([m, n + N // 2], far.to(output.dtype))


def _launch(
    a: torch.Tensor,
    b: torch.Tensor,
    output: torch.Tensor,
    row_scale: torch.Tensor | None = None,
    column_scale: torch.Tensor | None = None,
) -> None:
    """output (M, N) = a (M, K) @ b.T (K, N), any strides of a and b."""
    (rows, depth), columns, tiles = a.shape, len(b), TILES[table_of(a.device)][a.dtype]
    programs = min(_processors(a.device), blocks(rows, tiles.m) * blocks(columns, tiles.n))
    if tiles.described:
        parts = described(a, tiles.m, tiles.k), described(b, tiles.n, tiles.k), described(output, tiles.m, tiles.n // 2)
        if None not in parts:
            _described_product[(programs,)](
                *parts, row_scale, column_scale, rows, columns, depth, programs, tiles.m, tiles.n, tiles.k, GROUP,
                num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            )  # fmt: skip
            return
    _product[(programs,)](
        a, b, output, row_scale, column_scale, rows, columns, depth, programs, *a.stride(), *b.stride(),
        depth % tiles.k == 0, rows % 16 == 0 and a.stride(0) == 1, tiles.m, tiles.n, tiles.k, GROUP,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def scaled_product(
    a_MK: torch.Tensor, scale_M: torch.Tensor, b_NK: torch.Tensor, scale_N: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(scale a) @ (scale b).T, (M, N) in `dtype`, of two e4m3 matrices, as a kernel."""
    require_unit_stride(a_MK, b_NK)
    output = scale_M.new_empty(len(a_MK), len(b_NK), dtype=dtype)
    _launch(a_MK, b_NK, output, scale_M, scale_N)
    return output


@lru_cache
def _processors(device: torch.device) -> int:
    """How many programs run at once: multiprocessors; in the interpreter a few, to walk several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


class TritonMatmul(torch.autograd.Function):
    """`matmul`; both gradients are products of the same kernel."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        require_unit_stride(a, b)
        output = a.new_empty(len(a), len(b))
        _launch(a, b, output)
        ctx.save_for_backward(a, b)
        return output

    @staticmethod
    def backward(ctx: Any, d_output: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        a, b = ctx.saved_tensors
        d_a = d_b = None
        if ctx.needs_input_grad[0]:
            d_a = a.new_empty(a.shape)
            _launch(d_output, b.T, d_a)
        if ctx.needs_input_grad[1]:
            d_b = b.new_empty(b.shape)
            _launch(d_output.T, a.T, d_b)
        return d_a, d_b
