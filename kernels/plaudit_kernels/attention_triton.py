"""Packed attention as one Triton kernel a pass: forward (this file) and backward (attention_backward.py).

FlashAttention's online softmax (Dao, 2307.08691) in base 2, over the tiles of a `BlockPlan`. Keys are walked in
blocks of BLOCK_N at fixed logical positions, counted from 0; where a key lies in the batch (shared prefix or own
rows) is decided row by row, so a query meets the same keys in the same order whether its prompt is shared or not.
With the copy engine, which of several loops meets a block differs, so that all of them must round alike: the compiler
may not fuse a product and a sum in one and not in another, and where fusing pays it is written out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .attention_table import Launch, launches, padded_width
from .blocks import TILE, BlockPlan
from .chips import table_of
from .descriptors import described, heads_side_by_side

LOG2_E = 1.4426950408889634

# A key that is masked has a logit of -1e30, and the running maximum starts above it at -1e20: while a query has met
# no key that it sees, its weights are exp2(-1e30 + 1e20) = 0, without an infinity anywhere.
MASKED = tl.constexpr(-1e30)
_LOWEST = tl.constexpr(-1e20)
UNREAD = tl.constexpr(1e30)

# What varies with the batch, or where its memory lies: a specialisation to it would compile in mid-traffic.
UNSPECIALISED = [
    "segments", "tiles", "key_tiles", "visitor_offsets", "visitors", "tokens",
    "q_row", "q_head", "k_row", "k_head", "v_row", "v_head", "o_row", "o_head", "g_row", "g_head",
]  # fmt: skip


@triton.jit
def logits(products, inner, outer, CAPPED: tl.constexpr):
    """(values, factor, slope): values * factor are the logits in base 2 of the products query * key, and slope their
    derivative up to a factor, 1 without soft-cap."""
    if CAPPED:  # tanh(x) = 1 - 2 / (exp(2x) + 1), with the 2 and the base in `inner`
        tanh = 1.0 - 2.0 / (tl.exp2(products * inner) + 1.0)
        return tanh, outer, 1.0 - tanh * tanh
    else:
        return products, inner, 1.0


@triton.jit
def sees(queries, keys, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether a query at a logical position sees a key at one. WINDOW 0 is none."""
    if CAUSAL:
        seen = keys <= queries
        if WINDOW:
            seen = seen & (keys > queries - WINDOW)
    else:
        seen = (keys >= 0) & (queries >= 0)
        if WINDOW:
            seen = seen & (keys <= queries + WINDOW // 2) & (keys >= queries - WINDOW // 2)
    return seen


@triton.jit
def load_rows(base, rows, row_stride, mask, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D), 0 where masked and beyond WIDTH. The stride is in units of 8, so that loads stay wide."""
    columns = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * (row_stride * 8) + columns[None, :]
    if WIDTH == BLOCK_D:
        return tl.load(pointers, mask=mask[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=mask[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(base, rows, row_stride, mask, values, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * (row_stride * 8) + columns[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=mask[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def key_range(first, total, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(low, full, high) for the queries first .. first + BLOCK_M: keys low .. high can be seen, in blocks from low;
    up to `full` every query sees every key, and no mask is needed."""
    if CAUSAL:
        high = tl.minimum(total, first + BLOCK_M)
    else:
        high = total
        if WINDOW:
            high = tl.minimum(total, first + BLOCK_M + WINDOW // 2)
    if WINDOW:
        reach = WINDOW - 1 if CAUSAL else WINDOW // 2
        low = tl.maximum(first - reach, 0) // BLOCK_N * BLOCK_N
        return low, low, high
    else:
        full = first if CAUSAL else total
        return 0, full // BLOCK_N * BLOCK_N, high


@triton.jit
def key_rows(
    at, keys, segment, base, row_stride, tiles, column,
    DESCRIBED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys or values at the logical positions from `at`. DESCRIBED: the copy engine brings them, which all lie in the
    prefix, or all among the own rows: to it a block is one piece of the batch."""
    start, total, prefix_start, prefix = segment
    if DESCRIBED:
        return tiles.load([at + tl.where(at < prefix, prefix_start, start - prefix), column])
    else:
        rows = keys + tl.where(keys < prefix, prefix_start, start - prefix)
        return load_rows(base, rows, row_stride, keys < total, WIDTH, BLOCK_D)


@triton.jit
def pieces(prefix, full, BLOCK_N: tl.constexpr):
    """(edge, own): whole blocks of the prefix end at the key `edge`, those of own rows begin at `own`, neither beyond
    `full`; between them lies the block, if any, that has keys of both."""
    edge = tl.minimum(prefix // BLOCK_N * BLOCK_N, full)
    return edge, tl.minimum(tl.cdiv(prefix, BLOCK_N) * BLOCK_N, full)


@triton.jit
def _walk(
    state, query, queries, low, high, segment, k, v, k_row, v_row, k_tiles, v_tiles, column, inner, outer,
    CHECKED: tl.constexpr, DESCRIBED: tl.constexpr, STAGES: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys low .. high."""
    top, weight, mixed = state
    for at in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        keys = at + tl.arange(0, BLOCK_N)
        key = key_rows(at, keys, segment, k, k_row, k_tiles, column, DESCRIBED, WIDTH, BLOCK_D)
        x, factor, _ = logits(tl.dot(query, tl.trans(key), input_precision=PRECISION), inner, outer, CAPPED)
        if CHECKED:
            real = keys < segment[1]
            x = tl.where(sees(queries[:, None], keys[None, :], CAUSAL, WINDOW) & real[None, :], x, MASKED)
        peak = tl.maximum(top, tl.max(x, 1) * factor)
        share = tl.exp2(tl.fma(x, factor, -peak[:, None]))
        fade = tl.exp2(top - peak)
        weight = weight * fade + tl.sum(share, 1)
        value = key_rows(at, keys, segment, v, v_row, v_tiles, column, DESCRIBED, WIDTH, BLOCK_D)
        mixed = tl.dot(share.to(value.dtype), value, mixed * fade[:, None], input_precision=PRECISION)
        top = peak
    return top, weight, mixed


@triton.jit
def locate(segments, tiles, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The program's block: number of its segment, that one's (start, total, prefix_start, prefix), first position."""
    tile = tl.program_id(0) // (TILE // BLOCK)
    number = tl.load(tiles + 2 * tile)
    first = tl.load(tiles + 2 * tile + 1) * TILE + tl.program_id(0) % (TILE // BLOCK) * BLOCK
    start, length, prefix_start, prefix = fields_of(segments, number)
    return number, (start, prefix + length, prefix_start, prefix), first


@triton.jit
def fields_of(segments, number):
    row = segments + 4 * number.to(tl.int64)
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _forward(
    q, k, v, k_tiles, v_tiles, out, lse, segments, tiles, inner, outer,
    q_row, q_head, k_row, k_head, v_row, v_head, o_row, o_head, tokens,
    SHARED: tl.constexpr, STAGES: tl.constexpr,
    FOLD: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one tile, one query head. SHARED: some segment has a prefix. With `k_tiles` and
    `v_tiles` the copy engine brings every whole block that no mask cuts; what else there is comes through pointers."""
    _, segment, first = locate(segments, tiles, TILE, BLOCK_M)
    start, total, _, prefix = segment
    if (first >= total) | (first + BLOCK_M <= prefix):
        return
    head = tl.program_id(1).to(tl.int64)
    queries = first + tl.arange(0, BLOCK_M)
    own = (queries >= prefix) & (queries < total)
    rows = start + queries - prefix
    query = load_rows(q + head * (q_head * 8), rows, q_row, own, WIDTH, BLOCK_D)
    k += (head // FOLD) * (k_head * 8)
    v += (head // FOLD) * (v_head * 8)
    column = tl.program_id(1) // FOLD * WIDTH
    low, full, high = key_range(first, total, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    top = tl.full([BLOCK_M], _LOWEST, tl.float32)
    state = (top, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32))
    DESCRIBED: tl.constexpr = k_tiles is not None
    if WINDOW == 0:
        if DESCRIBED and SHARED:
            edge, low = pieces(prefix, full, BLOCK_N)
            state = _walk(
                state, query, queries, 0, edge, segment, k, v, k_row, v_row, k_tiles, v_tiles, column, inner, outer,
                False, True, STAGES, CAUSAL, WINDOW, CAPPED, WIDTH, BLOCK_D, BLOCK_N, PRECISION,
            )  # fmt: skip
            state = _walk(
                state, query, queries, edge, low, segment, k, v, k_row, v_row, k_tiles, v_tiles, column, inner, outer,
                False, False, 1, CAUSAL, WINDOW, CAPPED, WIDTH, BLOCK_D, BLOCK_N, PRECISION,
            )  # fmt: skip
        state = _walk(
            state, query, queries, low, full, segment, k, v, k_row, v_row, k_tiles, v_tiles, column, inner, outer,
            False, DESCRIBED, STAGES, CAUSAL, WINDOW, CAPPED, WIDTH, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    top, weight, mixed = _walk(
        state, query, queries, full, high, segment, k, v, k_row, v_row, k_tiles, v_tiles, column, inner, outer,
        True, False, 1 if DESCRIBED else STAGES, CAUSAL, WINDOW, CAPPED, WIDTH, BLOCK_D, BLOCK_N, PRECISION,
    )  # fmt: skip
    weight = tl.where(weight == 0.0, 1.0, weight)
    store_rows(out + head * (o_head * 8), rows, o_row, own, mixed / weight[:, None], WIDTH, BLOCK_D)
    tl.store(lse + head * tokens + rows, top + tl.log2(weight), mask=own)


def forward(
    query_THD: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor, plan: BlockPlan, factors: Factors
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (T, H, D) in the dtype of the query and, for the backward pass, the logarithms to base 2 of the softmax
    denominators (H, T) fp32. Raises ValueError for tensors that the kernels cannot read in place."""
    check(query_THD, key_TKD, value_TKD, plan)
    tokens, heads, width = query_THD.shape
    out = query_THD.new_empty((tokens, heads, width))
    lse = query_THD.new_empty((heads, tokens), dtype=torch.float32)
    if not plan.whole:  # a row that is no query gives weight 0 to every key in the backward pass
        out.zero_()
        lse.fill_(UNREAD.value)
    launch = launches(width, query_THD.element_size(), table_of(query_THD.device)).forward
    tiles = tiles_of(launch, launch.keys, plan, key_TKD, value_TKD)
    _forward[(len(plan.tiles) * (TILE // launch.queries), heads)](
        query_THD, key_TKD, value_TKD, *tiles, out, lse,
        plan.segments, plan.tiles, factors.inner, factors.outer,
        *strides(query_THD), *strides(key_TKD), *strides(value_TKD), *strides(out), tokens,
        SHARED=plan.unshared is None, STAGES=launch.num_stages, enable_fp_fusion=None in tiles,
        **constants(query_THD, key_TKD, plan, factors, launch),
    )  # fmt: skip
    return out, lse


def tiles_of(launch: Launch, rows: int, plan: BlockPlan, *tensors: torch.Tensor) -> tuple[Any, ...]:
    """A descriptor of tiles of `rows` rows of one head for each of the tensors (T, heads, D); None for each where the
    launch has none, a window cuts every block, a tile would hold a part of the next head, or the copy engine cannot
    read one of them."""
    nothing = (None,) * len(tensors)
    width = tensors[0].shape[2]
    if plan.window or not launch.described or width != padded_width(width):
        return nothing
    flat = [heads_side_by_side(tensor) for tensor in tensors]
    found = tuple(None if tensor is None else described(tensor, rows, width) for tensor in flat)
    return nothing if None in found else found


class Factors(NamedTuple):
    """What turns a product query * key into a logit to base 2, see `logits`."""

    scale: float
    inner: float
    outer: float
    capped: bool

    @classmethod
    def of(cls, scale: float, softcap: float | None) -> Factors:
        if softcap is None:
            return cls(scale, scale * LOG2_E, 1.0, False)
        return cls(scale, 2 * LOG2_E * scale / softcap, softcap * LOG2_E, True)


def constants(
    query: torch.Tensor, key: torch.Tensor, plan: BlockPlan, factors: Factors, launch: Launch
) -> dict[str, Any]:
    """The compile-time arguments that the three attention kernels share: of the model, never of the batch."""
    width = query.shape[-1]
    return {
        "FOLD": query.shape[1] // key.shape[1], "CAUSAL": plan.causal, "WINDOW": plan.window or 0,
        "CAPPED": factors.capped, "TILE": TILE, "WIDTH": width, "BLOCK_D": padded_width(width),
        "BLOCK_M": launch.queries, "BLOCK_N": launch.keys, "PRECISION": "ieee",
        "num_warps": launch.num_warps, "num_stages": launch.num_stages,
    }  # fmt: skip


def strides(tensor: torch.Tensor) -> tuple[int, int]:
    """Strides of rows and heads in units of 8 elements; 0 along a dimension of one, where torch may say anything."""
    row, head = (
        stride // 8 if size > 1 else 0 for stride, size in zip(tensor.stride()[:2], tensor.shape[:2], strict=True)
    )
    return row, head


def check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: BlockPlan) -> None:
    tokens, heads, width = query.shape
    if key.shape != value.shape or key.shape[0] != tokens or key.shape[2] != width or heads % key.shape[1]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit"
        )
    if tokens != plan.tokens:
        raise ValueError(f"{tokens} rows, but the plan is for {plan.tokens}")
    if width % 8 or not 8 <= width <= 256:
        raise ValueError(f"head size {width}: the kernels take multiples of 8 up to 256")
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16) or {key.dtype, value.dtype} != {query.dtype}:
        raise ValueError(f"dtypes {query.dtype}, {key.dtype}, {value.dtype}: one of fp32, fp16 and bf16 for all")
    for tensor in (query, key, value):
        uneven = any(s % 8 for s, size in zip(tensor.stride()[:2], tensor.shape[:2], strict=True) if size > 1)
        if tensor.stride(2) != 1 or uneven:
            raise ValueError(f"strides {tensor.stride()}: the last must be 1, the others multiples of 8")
