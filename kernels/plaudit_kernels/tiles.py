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
    mask (Q, K) bool for causal tiles, (n, 1, 1 or Q, K) for bidirectional ones; True = may attend.
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
    segments: NDArray[np.int64],
    tokens: int,
    *,
    causal: bool,
    window: int | None = None,
    only: NDArray[np.int64] | None = None,
) -> TilePlan:
    """Tiles for `segments` (S, 4) int64 = (start, length, prefix_start, prefix_length) over `tokens` rows.

    The own rows of the segments must cover 0..tokens exactly once; in a bidirectional model prefixes are
    empty. Raises ValueError otherwise: an uncovered row would be read before it is written.

    With `window`, a query at logical position p sees the keys k with p - window < k <= p in a causal model, and those
    with |p - k| <= window // 2 in a bidirectional one: transformers' sliding and ModernBERT's local attention.
    With `only`, just the tiles that hold these rows as queries: the output of any other row is meaningless.
    """
    check_segments(segments, tokens, causal=causal, window=window)
    tiles = _block_tiles(segments, causal, window) if causal or window is not None else _whole_tiles(segments)
    if only is not None:
        tiles = _holding(tiles, only, tokens)
    output_rows = np.zeros(tokens, dtype=np.int64)
    classes, offset = [], 0
    for shape in sorted(tiles):
        query_rows, key_rows, owned, key_counts = (np.stack(part) for part in zip(*tiles[shape], strict=True))
        flat = np.arange(offset, offset + query_rows.size, dtype=np.int64).reshape(query_rows.shape)
        output_rows[query_rows[owned]] = flat[owned]
        offset += query_rows.size
        mask = _mask(query_rows.shape[1], key_rows.shape[1], shape[0] * BLOCK, key_counts, causal, window)
        classes.append(TileClass(torch.from_numpy(query_rows), torch.from_numpy(key_rows), mask))
    return TilePlan(tuple(classes), torch.from_numpy(output_rows), causal)


Tile = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], int]
"""Rows of the queries, rows of the keys, which queries are the segment's own, how many keys exist."""

Tiles = dict[tuple[int, int], list[Tile]]
"""Tiles by (key blocks before the first query, key blocks): what their shape and mask depend on."""


def _block_tiles(segments: NDArray[np.int64], causal: bool, window: int | None) -> Tiles:
    """Tiles of BLOCK queries with the key blocks of which a query sees any."""
    tiles: Tiles = {}
    for start, length, prefix_start, prefix_length in segments.tolist():
        total = prefix_length + length
        padded = np.full(-(-total // BLOCK) * BLOCK, start, dtype=np.int64)
        padded[:prefix_length] = np.arange(prefix_start, prefix_start + prefix_length)
        padded[prefix_length:total] = np.arange(start, start + length)
        positions = np.arange(len(padded))
        owned = (positions >= prefix_length) & (positions < total)
        for block in range(prefix_length // BLOCK, len(padded) // BLOCK):
            low, high = _seen_blocks(block, len(padded) // BLOCK, causal, window)
            rows = slice(block * BLOCK, (block + 1) * BLOCK)
            tile = (padded[rows], padded[low * BLOCK : high * BLOCK], owned[rows], total - low * BLOCK)
            tiles.setdefault((block - low, high - low), []).append(tile)
    return tiles


def _seen_blocks(block: int, blocks: int, causal: bool, window: int | None) -> tuple[int, int]:
    """The key blocks low .. high that the queries of a block see, of a sequence of `blocks` blocks."""
    if window is None:
        return 0, block + 1 if causal else blocks
    reach = window - 1 if causal else window // 2
    low = max(0, block * BLOCK - reach) // BLOCK
    return low, block + 1 if causal else min(blocks, ((block + 1) * BLOCK - 1 + reach) // BLOCK + 1)


def _holding(tiles: Tiles, rows: NDArray[np.int64], tokens: int) -> Tiles:
    """The tiles in which one of `rows` is a query."""
    wanted = np.zeros(tokens, dtype=np.bool_)
    wanted[rows] = True
    kept = {shape: [tile for tile in group if wanted[tile[0][tile[2]]].any()] for shape, group in tiles.items()}
    return {shape: group for shape, group in kept.items() if group}


def _whole_tiles(segments: NDArray[np.int64]) -> Tiles:
    """One tile a sequence, as long as its length rounded up to whole blocks."""
    tiles: Tiles = {}
    for start, length, _, _ in segments.tolist():
        blocks = -(-length // BLOCK)
        padded = np.full(blocks * BLOCK, start, dtype=np.int64)
        padded[:length] = np.arange(start, start + length)
        owned = np.arange(len(padded)) < length
        tiles.setdefault((0, blocks), []).append((padded, padded, owned, length))
    return tiles


def _mask(
    rows: int, columns: int, before: int, counts: NDArray[np.int64], causal: bool, window: int | None
) -> torch.Tensor:
    """What the queries of a tile may attend to. `before` keys lie before its first query."""
    queries, keys = np.arange(before, before + rows)[:, None], np.arange(columns)[None, :]
    if causal:
        seen = keys <= queries
        return torch.from_numpy(seen if window is None else seen & (keys > queries - window))
    real = (keys < counts[:, None])[:, None, None, :]
    if window is None:
        return torch.from_numpy(real)
    near = np.abs(queries - keys) <= window // 2
    # A query after the end of its sequence sees its own key: a softmax over nothing would be NaN.
    return torch.from_numpy((real & near) | (queries == keys))


def check_segments(segments: NDArray[np.int64], tokens: int, *, causal: bool, window: int | None) -> None:
    """Raises ValueError where `segments` do not cover the token axis, or what they ask for makes no sense."""
    starts, lengths = segments[:, 0], segments[:, 1]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    if (lengths < 1).any() or ends[-1] != tokens or not np.array_equal(starts, ends[:-1]):
        raise ValueError("segments must cover the token axis exactly once, in order, with at least one row each")
    if not causal and segments[:, 3].any():
        raise ValueError("a bidirectional model cannot share a prefix: it depends on what follows it")
    if (segments[:, 2] + segments[:, 3] > starts).any() and causal:
        raise ValueError("a prefix must lie before the segments that read it")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} tokens: it must hold at least the query itself")
