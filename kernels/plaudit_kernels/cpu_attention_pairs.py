"""Attention of bf16 on CPUs that multiply pairs of bf16 (`cpu_pairs`): the walk of `cpu_attention`, with both products
on the stored numbers themselves.

Logits and sums are fp32. Weights are rounded to bf16 before they meet the values, as FlashAttention does on GPUs, and
the sum that divides them is that of the rounded ones. Keys are read where they lie; values are paired block by block.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .cpu_attention import _FASTMATH, _LOG2_E, _NOTHING, _cap, _fill, _lanes, _mask, _raise_maxima, _row, _seen, _write
from .cpu_math import LANES, ROWS, beyond, exp2, f4, floats, halves, integers, scratch, setting, signed, take
from .cpu_pairs import add_pairs, high_of, low_of, multiply_pairs, pair_of, pairs
from .tiles import BLOCK


def attention_pairs(table):
    """The kernel: queries, keys, values and outputs in bf16. The table is that of `cpu_attention`."""
    _attention(table)


@njit(error_model="numpy")
def _attention(table):
    kv_heads, fold, width = table[7], table[8], table[9]
    lanes = _lanes(fold, table[20])
    half = width // 2
    # A thread's memory: positions, output, logits, three rows of statistics, and in pairs queries, weights and gathered
    # keys and values.
    own = scratch(table, 21)
    positions = signed(own)
    total = floats(own + 4 * lanes)
    logits = beyond(total, lanes * width)
    highest = beyond(logits, BLOCK * lanes)
    queries = pairs(own + 4 * lanes * (1 + width + BLOCK + 3))
    weights = beyond(queries, half * lanes)
    gathered = beyond(weights, BLOCK // 2 * lanes)
    values = beyond(gathered, BLOCK * half)
    scale = f4(setting(table[16])) * _LOG2_E
    while True:
        piece = take(table, 1)
        if piece >= table[1]:
            break
        tile = beyond(integers(table[2]), piece // kv_heads * 7)
        head = piece % kv_heads
        key = beyond(halves(table[4]), head * table[13])
        value = beyond(halves(table[5]), head * table[15])
        used = -(-fold * tile[1] // LANES) * LANES
        _gather_queries(table, tile, head, queries, positions, used)
        _fill(total, width * used, f4(0.0))
        _fill(highest, used, _NOTHING)
        _fill(beyond(highest, used), used, f4(0.0))
        low, high = _seen(table, tile)
        for first in range(low, high, BLOCK):
            count = min(BLOCK, high - first)
            padded = -(-count // ROWS) * ROWS
            _pair_keys(tile, key, table[12], first, count, padded, half, gathered)
            _pair_values(tile, value, table[14], first, count, padded, width, values)
            multiply_pairs(logits, queries, gathered, padded, half, used, half, 1, scale)
            _cap(f4(setting(table[17])), logits, padded * used)
            if table[19] or count < padded or (table[18] and first + count - 1 > tile[2]):
                _mask(table, np.int32(tile[6] - first), logits, positions, np.int32(first), padded, used)
            _raise_maxima(logits, highest, padded, used, total, width)
            _weigh(logits, highest, padded, used, weights)
            add_pairs(total, weights, values, width, padded // 2, used, 1, width, f4(1.0))
        _write(tile, halves(table[6]), head, kv_heads, fold, width, total, highest, used)


@njit
def _gather_queries(table, tile, head, queries, positions, used):
    """queries (D / 2, lanes): pairs of neighbouring dimensions. Lane f * rows + r is row r of head f of the group;
    lanes beyond repeat the last."""
    fold, width, rows = table[8], table[9], tile[1]
    for lane in range(used):
        taken = min(lane, fold * rows - 1)
        row = taken % rows
        positions[lane] = np.int32(tile[2] + row)
        place = (tile[0] + row) * table[10] + (head * fold + taken // rows) * table[11]
        query = beyond(halves(table[3]), place)
        for d in range(width // 2):
            queries[d * used + lane] = np.uint32(query[2 * d]) | (np.uint32(query[2 * d + 1]) << np.uint32(16))


@njit
def _pair_keys(tile, source, row_step, first, count, padded, half, rows):
    """rows (padded, D / 2): the keys of the logical positions first .. first + count, zeros after them."""
    for n in range(count):
        row = beyond(source, _row(tile, first + n) * row_step)
        for d in range(half):
            rows[n * half + d] = np.uint32(row[2 * d]) | (np.uint32(row[2 * d + 1]) << np.uint32(16))
    for i in range(count * half, padded * half):
        rows[i] = np.uint32(0)


@njit
def _pair_values(tile, source, row_step, first, count, padded, width, rows):
    """rows (padded / 2, D): pairs of the values of neighbouring positions, zeros after the last."""
    for n in range(0, padded, 2):
        target = beyond(rows, n // 2 * width)
        even = beyond(source, _row(tile, first + min(n, count - 1)) * row_step)
        odd = beyond(source, _row(tile, first + min(n + 1, count - 1)) * row_step)
        if n + 1 < count:
            for d in range(width):
                target[d] = np.uint32(even[d]) | (np.uint32(odd[d]) << np.uint32(16))
        elif n < count:
            for d in range(width):
                target[d] = np.uint32(even[d])
        else:
            for d in range(width):
                target[d] = np.uint32(0)


@njit(fastmath=_FASTMATH, error_model="numpy")
def _weigh(logits, highest, padded, used, weights):
    """weights (padded / 2, used) in pairs, and their sums."""
    sums = beyond(highest, used)
    for n in range(0, padded, 2):
        row, next_row, pair = beyond(logits, n * used), beyond(logits, (n + 1) * used), beyond(weights, n // 2 * used)
        for lane in range(used):
            low = exp2(row[lane] - highest[lane]) if row[lane] > _NOTHING else f4(0.0)
            high = exp2(next_row[lane] - highest[lane]) if next_row[lane] > _NOTHING else f4(0.0)
            both = pair_of(low, high)
            pair[lane] = both
            sums[lane] = sums[lane] + low_of(both) + high_of(both)
