"""Block sizes, warps and stages of the attention kernels on sm_90.

A row is chosen by head size and bytes of the dtype alone, never by the batch: block sizes are part of what an output
is, bit for bit. Every row compiles without spills, in at most 227 KB of shared memory, whatever window, soft-cap and
direction (tests/kernels/test_sm90_attention.py). fp32 products are exact, on plain multiply-adds: small blocks.
"""

from __future__ import annotations

from typing import NamedTuple


class Launch(NamedTuple):
    queries: int
    keys: int
    num_warps: int
    num_stages: int


class Launches(NamedTuple):
    forward: Launch
    query_gradient: Launch
    key_gradient: Launch


# (bytes of the dtype, head size up to) -> launches; above each row the registers a thread and the KB of shared memory
# of each launch, the most over window, soft-cap and direction, by the ptxas of triton 3.7.
TABLE = {
    # 96 28, 156 24, 159 24
    (2, 32): Launches(Launch(64, 64, 4, 3), Launch(64, 64, 4, 2), Launch(32, 128, 8, 2)),
    # 143 56, 161 48, 192 48
    (2, 64): Launches(Launch(64, 64, 4, 3), Launch(64, 64, 4, 2), Launch(32, 128, 8, 2)),
    # 192 80, 254 96, 254 96
    (2, 128): Launches(Launch(64, 64, 4, 2), Launch(64, 64, 4, 2), Launch(32, 128, 8, 2)),
    # 255 96, 253 192, 190 66
    (2, 256): Launches(Launch(64, 32, 4, 2), Launch(128, 32, 8, 2), Launch(32, 32, 8, 2)),
    # 86 20, 70 16, 66 20
    (4, 32): Launches(Launch(64, 32, 8, 1), Launch(32, 32, 8, 1), Launch(32, 32, 8, 1)),
    # 72 20, 72 32, 80 36
    (4, 64): Launches(Launch(32, 32, 8, 1), Launch(32, 32, 8, 1), Launch(32, 32, 8, 1)),
    # 80 25, 80 64, 124 68
    (4, 128): Launches(Launch(16, 16, 4, 2), Launch(32, 32, 8, 1), Launch(32, 32, 8, 1)),
    # 144 33, 80 128, 115 132
    (4, 256): Launches(Launch(16, 16, 4, 1), Launch(32, 32, 16, 1), Launch(32, 32, 16, 1)),
}

DELTA_ROWS = 64


def launches(width: int, item_size: int) -> Launches:
    """The rows for a head size up to 256 and a dtype of 2 or 4 bytes."""
    return TABLE[item_size, max(32, padded_width(width))]


def padded_width(width: int) -> int:
    """The power of two that a head of this size is computed in, at least the 16 that a matrix product takes."""
    return max(16, 1 << (width - 1).bit_length())
