"""What the Triton attention kernels need to know of a packed batch, in a few small tables.

Segments are those of tiles.py. A query tile is TILE logical positions of one segment, with boundaries at multiples
of TILE counted from the start of the prefix; a key tile is TILE own rows of one segment. A kernel whose blocks are
smaller than TILE cuts a tile up by itself, so that a plan fits every head size and dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad

from .tiles import check_segments

TILE = 128
_TABLES = ("segments", "tiles", "key_tiles", "visitor_offsets", "visitors")


@dataclass(frozen=True)
class BlockPlan:
    """Tables, all int32, on one device.

    segments (S, 4): start, length, prefix_start, prefix_length. tiles (n, 2): segment and number of the tile, those
    with most keys first. key_tiles (m, 2): segment and number. visitors (R,): the segments whose queries read rows of
    segment s lie between visitor_offsets (S + 1,) [s] and [s + 1]: itself first, then those that have it as prefix.
    """

    segments: torch.Tensor
    tiles: torch.Tensor
    key_tiles: torch.Tensor
    visitor_offsets: torch.Tensor
    visitors: torch.Tensor
    tokens: int
    causal: bool
    window: int | None
    whole: bool
    """Whether every row is a query of some tile."""
    unshared: tuple[int, int] | None = None
    """Sequences and the longest one, where they share nothing and may be left to a library: see varlen.py."""

    @property
    def tables(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in _TABLES]

    def over(self, tables: Sequence[torch.Tensor]) -> BlockPlan:
        """The plan with tables that lie elsewhere, in any shape."""
        views = (table.view(own.shape) for table, own in zip(tables, self.tables, strict=True))
        named: dict[str, Any] = dict(zip(_TABLES, views, strict=True))
        return replace(self, **named)

    def to(self, device: torch.device) -> BlockPlan:
        return self if device.type == "cpu" else self.over([table.to(device) for table in self.tables])

    def sized(self, segments: int, tiles: int) -> BlockPlan:
        """The plan of the forward pass with tables of these lengths, so that a launch is the same for every batch of so
        many rows. Added tiles lie behind the end of any segment: their programs return at once. No key tiles."""
        beyond = self.tiles.new_tensor([[0, self.tokens // TILE + 1]]).expand(tiles - len(self.tiles), 2)
        rows = pad(self.segments, (0, 0, 0, segments - len(self.segments)))
        none = self.visitors[:0]
        forward = replace(self, segments=rows, tiles=torch.cat([self.tiles, beyond]))
        return replace(forward, key_tiles=self.key_tiles[:0], visitor_offsets=none, visitors=none, unshared=None)


def plan_blocks(
    segments: NDArray[np.int64],
    tokens: int,
    *,
    causal: bool,
    window: int | None = None,
    only: NDArray[np.int64] | None = None,
) -> BlockPlan:
    """The plan of the same batch, with the same meaning of every argument and the same errors, as `plan_tiles`."""
    check_segments(segments, tokens, causal=causal, window=window)
    starts, lengths, prefix_starts, prefixes = segments.T
    first = prefixes // TILE
    counts = (prefixes + lengths - 1) // TILE + 1 - first
    tiles = _runs(first, counts)
    if only is not None:
        owner = np.searchsorted(starts, only, side="right") - 1
        block = (prefixes[owner] + only - starts[owner]) // TILE
        tiles = tiles[np.unique((np.cumsum(counts) - counts)[owner] + block - first[owner])]
    tiles = tiles[np.argsort(-tiles[:, 1], kind="stable")]
    key_tiles = _runs(np.zeros_like(lengths), -(-lengths // TILE))
    offsets, visitors = _visitors(starts, prefix_starts, prefixes)
    first_three = _table(segments), _table(tiles), _table(key_tiles)
    return BlockPlan(*first_three, _table(offsets), _table(visitors), tokens, causal, window, whole=only is None)


def _runs(first: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(sum of counts, 2): for each index i, the pairs (i, first[i]), (i, first[i] + 1), ..., counts[i] of them."""
    owner = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]
    return np.stack([owner, first[owner] + within], axis=1)


def _visitors(
    starts: NDArray[np.int64], prefix_starts: NDArray[np.int64], prefixes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offsets (S + 1,) and segments: who reads the rows of each segment. A prefix may span several segments."""
    low = np.searchsorted(starts, prefix_starts, side="right") - 1
    high = np.searchsorted(starts, prefix_starts + prefixes, side="left")
    pairs = _runs(low, np.where(prefixes > 0, high - low, 0))  # (reader, segment)
    itself = np.arange(len(starts))
    pairs = np.concatenate([np.stack([itself, itself], axis=1), pairs])
    pairs = pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(pairs[:, 1], minlength=len(starts)))])
    return offsets, pairs[:, 0]


def _table(values: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32))
