"""Block sizes, warps and stages of the attention kernels, a table for each kind of chip.

A row is chosen by chip, head size and bytes of the dtype, never by the batch: block sizes are part of what an output
is, bit for bit, so no row depends on the number of tokens, and none is tuned while it serves. Every row compiles
without spills and fits the shared memory of a block whatever window, soft-cap and direction: 227 KB on sm_90, 99 KB
on what `default` is for (tests/kernels/test_sm90_attention.py; benchmarks/results/compiled.csv has the figures). One
launch is let off, the plain gradient of keys of 128 with up to 100 bytes: it was the fastest by a twelfth to a fifth
with half of that (docs/log.md). fp32 products are exact, on plain multiply-adds: small blocks.
"""

from __future__ import annotations

from typing import NamedTuple

from .chips import TableName


class Launch(NamedTuple):
    """`described`: the copy engine of Hopper brings what it can, see descriptors.py."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    described: bool = False


class Launches(NamedTuple):
    """`plain_key_gradient`: of a causal model without window and soft-cap, where the copy engine brings the queries."""

    forward: Launch
    query_gradient: Launch
    key_gradient: Launch
    plain_key_gradient: Launch | None = None


Table = dict[tuple[int, int], Launches]
"""(bytes of the dtype, head size up to) -> launches."""

# Above each row the registers a thread and the KB of shared memory of each launch (the last: of both gradients of
# keys), the most over window, soft-cap and direction, by the ptxas of triton 3.7; with 3.6 they differ a little, and
# nothing else spills either.
SM_90: Table = {
    # 95 28, 150 32, 145 24
    (2, 32): Launches(
        Launch(64, 64, 4, 3, True), Launch(64, 64, 4, 3, True), Launch(32, 128, 8, 2), Launch(32, 128, 8, 2, True)
    ),
    # 135 41, 167 49, 212 49
    (2, 64): Launches(
        Launch(64, 64, 4, 2, True), Launch(64, 64, 4, 2, True), Launch(32, 128, 8, 2), Launch(64, 64, 4, 2, True)
    ),
    # 191 113, 182 81, 255 97
    (2, 128): Launches(
        Launch(64, 64, 4, 3, True), Launch(64, 32, 4, 3, True), Launch(32, 128, 8, 2), Launch(64, 64, 4, 2, True)
    ),
    # 254 96, 253 192, 183 66
    (2, 256): Launches(Launch(64, 32, 4, 2), Launch(128, 32, 8, 2), Launch(32, 32, 8, 2)),
    # 86 20, 70 16, 69 20
    (4, 32): Launches(Launch(64, 32, 8, 1), Launch(32, 32, 8, 1), Launch(32, 32, 8, 1)),
    # 72 20, 72 32, 80 36
    (4, 64): Launches(Launch(32, 32, 8, 1), Launch(32, 32, 8, 1), Launch(32, 32, 8, 1)),
    # 80 25, 80 64, 96 33
    (4, 128): Launches(Launch(16, 16, 4, 2), Launch(32, 32, 8, 1), Launch(16, 16, 4, 1)),
    # 140 33, 80 128, 100 132
    (4, 256): Launches(Launch(16, 16, 4, 1), Launch(32, 32, 16, 1), Launch(32, 32, 16, 1)),
}

DEFAULT: Table = {
    (2, 32): Launches(Launch(64, 64, 4, 2), Launch(64, 32, 4, 2), Launch(32, 64, 4, 2)),
    (2, 64): Launches(Launch(64, 32, 4, 2), Launch(64, 32, 4, 2), Launch(32, 32, 4, 2)),
    (2, 128): Launches(Launch(64, 32, 4, 2), Launch(64, 32, 4, 2), Launch(32, 64, 8, 2)),
    (2, 256): Launches(Launch(64, 32, 8, 2), Launch(32, 32, 8, 2), Launch(32, 32, 8, 1)),
    (4, 32): SM_90[4, 32],
    (4, 64): SM_90[4, 64],
    (4, 128): Launches(Launch(16, 16, 8, 1), Launch(32, 32, 8, 1), Launch(16, 16, 4, 1)),
    (4, 256): Launches(Launch(16, 16, 4, 1), Launch(16, 16, 8, 1), Launch(16, 16, 16, 1)),
}
"""For chips that nobody has made a table for: it fits the smallest of them and was timed on none."""

TABLES: dict[TableName, Table] = {"sm_90": SM_90, "default": DEFAULT}

DELTA_ROWS = 64


def launches(width: int, item_size: int, table: TableName) -> Launches:
    """The row for a head size up to 256 and a dtype of 2 or 4 bytes."""
    return TABLES[table][item_size, max(32, padded_width(width))]


def padded_width(width: int) -> int:
    """The power of two that a head of this size is computed in, at least the 16 that a matrix product takes."""
    return max(16, 1 << (width - 1).bit_length())
