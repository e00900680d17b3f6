"""Where the attention tiles of a packed batch lie.

A packed batch is one token axis T cut into segments. A segment is (start, length, prefix_start,
prefix_length): its own rows are `start .. start + length`, and in a causal model it also sees the rows of its
prefix, which lie elsewhere in the batch and are shared with other segments. The *logical* position of an own
row is prefix_length + its offset.

Tiles run over the logical position with fixed block boundaries (0, BLOCK, 2 BLOCK, ...), not over the rows as
they happen to be packed. A block that straddles the end of the prefix gathers its rows one by one. So a query
at logical position p always meets the same keys in a tile of the same shape, whether its prompt is shared or
repeated, and whoever its neighbours are: the score is the same bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK = 32
"""Rows of a tile. 32 wastes least on short responses on CPUs; 64 measured slower on ragged conversations."""


@dataclass(frozen=True)
class TileClass:
    """All tiles of one shape. Indices are rows of the packed token axis.

    query_rows (n, Q) int64; key_rows (n, K) int64. A row that stands for nothing (outside its sequence, or of
    the prefix) repeats a row of the segment: as a query its output is never read, as a key it is masked.
    mask (Q, K) bool for causal tiles, (n, 1, 1, K) for bidirectional ones; True = may attend.
    """

    query_rows: torch.Tensor
    key_rows: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class TilePlan:
    """The tiles of a packed batch. `output_rows` (T,) int64 says which row of the concatenated tile outputs
    belongs to each token: every token is the query of exactly one tile row."""

    classes: tuple[TileClass, ...]
    output_rows: torch.Tensor
    causal: bool

    def to(self, device: torch.device) -> TilePlan:
        if device.type == "cpu":
            return self
        classes = tuple(
            TileClass(c.query_rows.to(device), c.key_rows.to(device), c.mask.to(device)) for c in self.classes
        )
        return TilePlan(classes, self.output_rows.to(device), self.causal)


def plan_tiles(
    segments: NDArray[np.int64], tokens: int, *, causal: bool, only: NDArray[np.int64] | None = None
) -> TilePlan:
    """Tiles for `segments` (S, 4) int64 = (start, length, prefix_start, prefix_length) over `tokens` rows.

    The own rows of the segments must cover 0..tokens exactly once; in a bidirectional model prefixes are
    empty. Raises ValueError otherwise: an uncovered row would be read before it is written.

    With `only`, just the tiles that hold these rows as queries: the output of any other row is meaningless.
    """
    _check(segments, tokens, causal)
    tiles = _causal_tiles(segments) if causal else _whole_tiles(segments)
    if only is not None:
        tiles = _holding(tiles, only, tokens)
    output_rows = np.zeros(tokens, dtype=np.int64)
    classes, offset = [], 0
    for blocks in sorted(tiles):
        query_rows, key_rows, owned, key_counts = (np.stack(part) for part in zip(*tiles[blocks], strict=True))
        flat = np.arange(offset, offset + query_rows.size, dtype=np.int64).reshape(query_rows.shape)
        output_rows[query_rows[owned]] = flat[owned]
        offset += query_rows.size
        mask = _causal_mask(blocks) if causal else _key_mask(key_rows.shape[1], key_counts)
        classes.append(TileClass(torch.from_numpy(query_rows), torch.from_numpy(key_rows), mask))
    return TilePlan(tuple(classes), torch.from_numpy(output_rows), causal)


Tile = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], int]


def _causal_tiles(segments: NDArray[np.int64]) -> dict[int, list[Tile]]:
    """Tiles of BLOCK queries by their number of key blocks."""
    tiles: dict[int, list[Tile]] = {}
    for start, length, prefix_start, prefix_length in segments.tolist():
        total = prefix_length + length
        logical = np.concatenate(
            [np.arange(prefix_start, prefix_start + prefix_length), np.arange(start, start + length)]
        )
        padded = np.full(-(-total // BLOCK) * BLOCK, start, dtype=np.int64)
        padded[:total] = logical
        positions = np.arange(len(padded))
        owned = (positions >= prefix_length) & (positions < total)
        for block in range(prefix_length // BLOCK, len(padded) // BLOCK):
            rows = slice(block * BLOCK, (block + 1) * BLOCK)
            keys = padded[: (block + 1) * BLOCK]
            tiles.setdefault(block + 1, []).append((padded[rows], keys, owned[rows], total))
    return tiles


def _holding(tiles: dict[int, list[Tile]], rows: NDArray[np.int64], tokens: int) -> dict[int, list[Tile]]:
    """The tiles in which one of `rows` is a query."""
    wanted = np.zeros(tokens, dtype=np.bool_)
    wanted[rows] = True
    kept = {blocks: [tile for tile in group if wanted[tile[0][tile[2]]].any()] for blocks, group in tiles.items()}
    return {blocks: group for blocks, group in kept.items() if group}


def _whole_tiles(segments: NDArray[np.int64]) -> dict[int, list[Tile]]:
    """One tile a sequence, as long as its length rounded up to whole blocks."""
    tiles: dict[int, list[Tile]] = {}
    for start, length, _, _ in segments.tolist():
        blocks = -(-length // BLOCK)
        padded = np.full(blocks * BLOCK, start, dtype=np.int64)
        padded[:length] = np.arange(start, start + length)
        owned = np.arange(len(padded)) < length
        tiles.setdefault(blocks, []).append((padded, padded, owned, length))
    return tiles


def _causal_mask(blocks: int) -> torch.Tensor:
    """(BLOCK, blocks * BLOCK): the queries are the last block of the keys."""
    first = (blocks - 1) * BLOCK
    return torch.arange(blocks * BLOCK)[None, :] <= torch.arange(first, first + BLOCK)[:, None]


def _key_mask(width: int, counts: NDArray[np.int64]) -> torch.Tensor:
    """(n, 1, 1, width): True on the keys of the sequence."""
    mask = np.arange(width)[None, :] < counts[:, None]
    return torch.from_numpy(mask)[:, None, None, :]


def _check(segments: NDArray[np.int64], tokens: int, causal: bool) -> None:
    starts, lengths = segments[:, 0], segments[:, 1]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    if (lengths < 1).any() or ends[-1] != tokens or not np.array_equal(starts, ends[:-1]):
        raise ValueError("segments must cover the token axis exactly once, in order, with at least one row each")
    if not causal and segments[:, 3].any():
        raise ValueError("a bidirectional model cannot share a prefix: it depends on what follows it")
    if (segments[:, 2] + segments[:, 3] > starts).any() and causal:
        raise ValueError("a prefix must lie before the segments that read it")
