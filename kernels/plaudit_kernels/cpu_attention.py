"""Attention of a packed batch on the CPU, in one kernel: no gathered copies, no masks, no tiles padded to a shape.

Flash attention (Dao, 2307.08691) with the queries in the lanes of the vector unit: a piece of work is up to 64 queries
of one segment and one key head (all heads that share it), and it walks over blocks of BLOCK keys whose boundaries are
logical positions. Maxima, sums and rescaling are then lane by lane, and a query meets the same numbers in the same
order wherever it lies in the batch and whether its prefix is shared: a block of which it sees nothing changes nothing.
Arithmetic is fp32 throughout; bf16 is only how queries, keys, values and outputs are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch.nn.functional import pad

from .cpu_math import (
    LANES,
    ROWS,
    add_product,
    beyond,
    exp2,
    f4,
    floats,
    halves,
    integers,
    load,
    scratch,
    setting,
    signed,
    store,
    take,
)
from .cpu_pairs import multiplies_pairs
from .cpu_runtime import DTYPES, launch
from .tiles import BLOCK, check_segments

QUERIES = 64
"""Queries of a piece of work, over all heads of a group: their transposed tile of 128 dimensions fills the L1 cache."""

_FASTMATH = {"contract", "nsz"}
_NOTHING = f4(-3e38)
"""Stands for a logit that is not seen: below every other, and finite, so that differences of two are."""
_LOG2_E = f4(1.44269504088896341)
"""Logits are kept in units of ln 2, so that weights are powers of two: cheaper than those of e."""


@dataclass(frozen=True)
class SegmentPlan:
    """segments (S, 7) int64: first row of the queries, how many, logical position of the first, first row of the
    prefix, its length, first own row, keys in all."""

    segments: torch.Tensor
    causal: bool
    window: int | None


def plan_segments(
    segments: NDArray[np.int64],
    tokens: int,
    *,
    causal: bool,
    window: int | None = None,
    only: NDArray[np.int64] | None = None,
) -> SegmentPlan:
    """The plan of the same batch, with the same meaning of every argument and the same errors, as `plan_tiles`."""
    check_segments(segments, tokens, causal=causal, window=window)
    start, length, prefix_start, prefix = segments.T
    row, count = start, length
    if only is not None:
        owner = np.searchsorted(start, only, side="right") - 1
        start, length, prefix_start, prefix = segments[owner].T
        row, count = only, np.ones_like(only)
    position = prefix + row - start
    table = np.stack([row, count, position, prefix_start, prefix, start, prefix + length], axis=1)
    longest_first = table[np.argsort(-table[:, 6], kind="stable")]
    return SegmentPlan(torch.from_numpy(np.ascontiguousarray(longest_first)), causal, window)


def attend_segments(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    plan: SegmentPlan,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention output (T, H, D); the contract of `packed_attention`, without gradients."""
    if query_THD.dtype not in DTYPES:
        raise ValueError(f"the fused CPU kernels are for fp32 and bf16, not {query_THD.dtype}")
    if missing := -query_THD.shape[-1] % ROWS:  # dimensions of zeros change no product
        query, key, value = (pad(part, (0, missing)) for part in (query_THD, key_TKD, value_TKD))
        return attend_segments(query, key, value, plan, scale, softcap)[..., :-missing]
    heads, width = query_THD.shape[1:]
    kv_heads = key_TKD.shape[1]
    fold = heads // kv_heads
    output = torch.empty_like(query_THD, memory_format=torch.contiguous_format)
    rows = max(1, QUERIES // fold)
    tiles = _tiles(plan.segments.numpy(), rows)
    reach = 0 if plan.window is None else plan.window if plan.causal else plan.window // 2 + 1
    kernel, key, value = attention_float, key_TKD, value_TKD
    if query_THD.dtype == torch.bfloat16 and multiplies_pairs():
        from .cpu_attention_pairs import attention_pairs as kernel
    elif query_THD.dtype == torch.bfloat16:
        kernel, key, value = attention_bf16, key_TKD.float(), value_TKD.float()
    strides = [step for part in (query_THD, key, value) for step in part.stride()[:2]]
    launch(
        kernel, len(tiles) * kv_heads, torch.from_numpy(tiles), query_THD, key, value, output,
        kv_heads, fold, width, *strides, float(scale), float(softcap or 0.0), int(plan.causal), reach, rows,
        words=_lanes(fold, rows) * (2 * width + 2 * BLOCK + 4) + 2 * BLOCK * width,  # as much as either kernel needs
    )  # fmt: skip
    return output


def _tiles(segments: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """(n, 7) int64: `segments` cut into pieces of at most `rows` queries."""
    counts = -(-segments[:, 1] // rows)
    tiles = np.repeat(segments, counts, axis=0)
    first = (np.arange(len(tiles)) - np.repeat(np.cumsum(counts) - counts, counts)) * rows
    tiles[:, 0] += first
    tiles[:, 1] = np.minimum(tiles[:, 1] - first, rows)
    tiles[:, 2] += first
    return tiles


@njit
def _lanes(heads, rows):
    """Queries of a piece of work, and what fills the last vector."""
    return -(-heads * rows // LANES) * LANES


def attention_float(table):
    """The kernel in fp32."""
    _attention(table, floats(table[3]), floats(table[6]))


def attention_bf16(table):
    """The kernel for queries and outputs in bf16; keys and values were widened before."""
    _attention(table, halves(table[3]), halves(table[6]))


@njit(error_model="numpy")
def _attention(table, query, output):
    kv_heads, fold, width = table[7], table[8], table[9]
    lanes = _lanes(fold, table[20])
    # A thread's memory: positions, queries, output, keys and values, logits, and three rows of statistics.
    own = scratch(table, 21)
    positions = signed(own)
    queries = floats(own + 4 * lanes)
    total = beyond(queries, lanes * width)
    gathered = beyond(total, lanes * width)
    logits = beyond(gathered, 2 * BLOCK * width)
    highest = beyond(logits, BLOCK * lanes)
    while True:
        piece = take(table, 1)
        if piece >= table[1]:
            break
        tile = beyond(integers(table[2]), piece // kv_heads * 7)
        head = piece % kv_heads
        key = beyond(floats(table[4]), head * table[13])
        value = beyond(floats(table[5]), head * table[15])
        used = -(-fold * tile[1] // LANES) * LANES
        _gather_queries(table, tile, query, head, queries, positions, used)
        _fill(total, width * used, f4(0.0))
        _fill(highest, used, _NOTHING)
        _fill(beyond(highest, used), used, f4(0.0))
        low, high = _seen(table, tile)
        for first in range(low, high, BLOCK):
            count = min(BLOCK, high - first)
            padded = -(-count // ROWS) * ROWS
            keys, key_step = gathered, width
            values, value_step = beyond(gathered, BLOCK * width), width
            if count == padded and (first >= tile[4] or first + count <= tile[4]):  # they lie together: used in place
                keys, key_step = beyond(key, _row(tile, first) * table[12]), table[12]
                values, value_step = beyond(value, _row(tile, first) * table[14]), table[14]
            else:
                _gather(tile, key, table[12], first, count, padded, width, keys)
                _gather(tile, value, table[14], first, count, padded, width, values)
            _fill(logits, padded * used, f4(0.0))
            add_product(logits, queries, keys, padded, width, used, key_step, 1)
            _cap(f4(setting(table[17])), logits, padded * used)
            if table[19] or count < padded or (table[18] and first + count - 1 > tile[2]):
                _mask(table, np.int32(tile[6] - first), logits, positions, np.int32(first), padded, used)
            _raise_maxima(logits, highest, padded, used, total, width)
            _weigh(logits, highest, padded, used)
            add_product(total, logits, values, width, padded, used, 1, value_step)
        _write(tile, output, head, kv_heads, fold, width, total, highest, used)


@njit
def _fill(memory, count, value):
    for i in range(count):
        memory[i] = value


@njit
def _row(tile, position):
    """The row of the packed batch that holds a logical position."""
    return tile[3] + position if position < tile[4] else tile[5] + position - tile[4]


@njit
def _seen(table, tile):
    """The logical positions low .. high of the keys that the tile's queries see; low is the start of a block."""
    causal, reach = table[18], table[19]
    first, last, low, high = tile[2], tile[2] + tile[1] - 1, 0, tile[6]
    if causal:
        high = last + 1
    if reach:
        low = max(0, first - reach + 1) // BLOCK * BLOCK
        if not causal:
            high = min(high, last + reach)
    return low, high


@njit(fastmath=_FASTMATH)
def _gather_queries(table, tile, query, head, queries, positions, used):
    """queries (D, lanes) scaled, by log2(e) too. Lane f * rows + r is row r of head f of the group; lanes beyond repeat
    the last."""
    fold, width, rows = table[8], table[9], tile[1]
    scale = f4(setting(table[16])) * _LOG2_E
    for lane in range(used):
        taken = min(lane, fold * rows - 1)
        row = taken % rows
        positions[lane] = np.int32(tile[2] + row)
        place = (tile[0] + row) * table[10] + (head * fold + taken // rows) * table[11]
        for d in range(width):
            queries[d * used + lane] = load(query, place + d) * scale


@njit
def _gather(tile, source, row_step, first, count, padded, width, rows):
    """rows (padded, D): those of the logical positions first .. first + count, zeros after them."""
    for n in range(count):
        row = beyond(source, _row(tile, first + n) * row_step)
        for d in range(width):
            rows[n * width + d] = row[d]
    _fill(beyond(rows, count * width), (padded - count) * width, f4(0.0))


@njit(fastmath=_FASTMATH, error_model="numpy")
def _cap(softcap, logits, count):
    """logits = softcap * tanh(logits / softcap), where there is a softcap; both sides in units of ln 2."""
    if softcap > f4(0.0):
        twice, bound = f4(2.0) / softcap, softcap * _LOG2_E
        for i in range(count):
            power = exp2(min(logits[i] * twice, f4(100.0)))
            logits[i] = bound - bound * f4(2.0) / (power + f4(1.0))


@njit
def _mask(table, exist, logits, positions, first, padded, used):
    """What a query does not see becomes nothing: keys beyond the first `exist`, later ones, those out of reach."""
    causal, reach = table[18] != 0, np.int32(table[19])
    behind = reach if reach else np.int32(1 << 30)
    after = np.int32(0) if causal else behind - np.int32(1)
    for n in range(padded):
        row = beyond(logits, n * used)
        if n >= exist:
            _fill(row, used, _NOTHING)
        position = first + np.int32(n)
        for lane in range(used):
            ahead = positions[lane] - position
            row[lane] = row[lane] if (ahead < behind) & (ahead >= -after) else _NOTHING


@njit(fastmath=_FASTMATH, error_model="numpy")
def _raise_maxima(logits, highest, padded, used, total, width):
    """Maxima, the sums behind them and `total` are brought to the maxima that these logits make."""
    sums, rescale = beyond(highest, used), beyond(highest, 2 * used)
    for lane in range(used):
        rescale[lane] = highest[lane]
    for n in range(padded):
        row = beyond(logits, n * used)
        for lane in range(used):
            highest[lane] = row[lane] if row[lane] > highest[lane] else highest[lane]
    for lane in range(used):
        rescale[lane] = exp2(rescale[lane] - highest[lane])
        sums[lane] *= rescale[lane]
    for d in range(width):
        line = beyond(total, d * used)
        for lane in range(used):
            line[lane] *= rescale[lane]


@njit(fastmath=_FASTMATH, error_model="numpy")
def _weigh(logits, highest, padded, used):
    """Logits to weights in place, and their sums."""
    sums = beyond(highest, used)
    for n in range(padded):
        row = beyond(logits, n * used)
        for lane in range(used):
            weight = exp2(row[lane] - highest[lane]) if row[lane] > _NOTHING else f4(0.0)
            row[lane] = weight
            sums[lane] += weight


@njit(error_model="numpy")
def _write(tile, output, head, kv_heads, fold, width, total, highest, used):
    rows = tile[1]
    for lane in range(fold * rows):
        inverse = f4(1.0) / highest[used + lane]
        place = ((tile[0] + lane % rows) * kv_heads * fold + head * fold + lane // rows) * width
        for d in range(width):
            store(output, place + d, total[d * used + lane] * inverse)
