"""Batches without padding: sequences lie end to end on one token axis, a common prompt is there once.

Policy and arithmetic only: numpy, no torch. `group_items` decides what is shared, `split_by_budget` what goes
together, `pack` lays it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]

MIN_SHARED = 16
"""A common prefix shorter than this is not worth a segment of its own: the tile that straddles its end costs
up to a block of rows."""


class Item(Protocol):
    """What can be packed: token ids (L,) and how many of them are the prompt's."""

    @property
    def ids(self) -> Ids: ...
    @property
    def prompt_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Sequences that begin with the same tokens. `prefix` (P,) int32, P may be 0; `suffixes` at least one
    token each; `indices` are the places of the sequences in the caller's list; `boundaries` say after how
    many tokens of the whole sequence the response begins (token types need it)."""

    prefix: Ids
    suffixes: tuple[Ids, ...]
    indices: tuple[int, ...]
    boundaries: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Rows that this group takes: what it costs to compute."""
        return len(self.prefix) + sum(len(suffix) for suffix in self.suffixes)


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """A packed batch. T rows, S segments, N sequences; sequence i of the batch is the caller's `indices[i]`.

    input_ids, position_ids, type_ids (T,) int64; segments (S, 4) int64 = (start, length, prefix_start,
    prefix_length); pool_last, pool_first (N,) int64: the rows of the last and the first token of a sequence.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    type_ids: NDArray[np.int64]
    segments: NDArray[np.int64]
    pool_last: NDArray[np.int64]
    pool_first: NDArray[np.int64]
    indices: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        return len(self.input_ids)


def group_items(items: Sequence[Item], *, share: bool) -> list[Group]:
    """Groups in order of first appearance; every item is in exactly one.

    With `share`, items with the same prompt tokens form a group whose prefix is their longest common token
    prefix, as long as it has MIN_SHARED tokens and leaves each at least one token of its own.
    """
    by_prompt: dict[bytes | int, list[int]] = {}
    for index, item in enumerate(items):
        shareable = share and item.prompt_tokens >= MIN_SHARED
        key: bytes | int = item.ids[: item.prompt_tokens].tobytes() if shareable else index
        by_prompt.setdefault(key, []).append(index)
    return [_group(items, members) for members in by_prompt.values()]


def common_prefix(sequences: Sequence[Ids]) -> int:
    """Length of the longest common prefix that leaves every sequence at least one token."""
    length = min(len(ids) for ids in sequences) - 1
    first = sequences[0]
    for ids in sequences[1:]:
        different = np.flatnonzero(first[:length] != ids[:length])
        if len(different):
            length = int(different[0])
    return length


def split_by_budget(groups: Sequence[Group], token_budget: int) -> list[list[Group]]:
    """Batches of at most `token_budget` tokens. A group that does not fit is cut between sequences, its
    prefix repeated; one sequence that alone exceeds the budget becomes a batch of its own."""
    batches: list[list[Group]] = []
    room = 0
    for group in groups:
        for part in _cut(group, token_budget):
            if part.tokens > room or not batches:
                batches.append([])
                room = token_budget
            batches[-1].append(part)
            room -= part.tokens
    return batches


def pack(groups: Sequence[Group]) -> PackedBatch:
    """Lay groups out on one token axis: prefix, then its suffixes, group after group."""
    ids: list[Ids] = []
    positions, types, segments, last, first = [], [], [], [], []
    row = 0
    for group in groups:
        prefix = len(group.prefix)
        prefix_start = row
        if prefix:
            ids.append(group.prefix)
            positions.append(np.arange(prefix))
            types.append(np.zeros(prefix, dtype=np.int64))
            segments.append((row, prefix, 0, 0))
            row += prefix
        for suffix, boundary in zip(group.suffixes, group.boundaries, strict=True):
            position = np.arange(prefix, prefix + len(suffix))
            ids.append(suffix)
            positions.append(position)
            types.append((position >= boundary).astype(np.int64) if boundary else np.zeros(len(suffix), np.int64))
            segments.append((row, len(suffix), prefix_start if prefix else 0, prefix))
            first.append(prefix_start if prefix else row)
            row += len(suffix)
            last.append(row - 1)
    return PackedBatch(
        input_ids=np.concatenate(ids).astype(np.int64),
        position_ids=np.concatenate(positions).astype(np.int64),
        type_ids=np.concatenate(types),
        segments=np.array(segments, dtype=np.int64),
        pool_last=np.array(last, dtype=np.int64),
        pool_first=np.array(first, dtype=np.int64),
        indices=np.array([i for group in groups for i in group.indices], dtype=np.int64),
    )


def _group(items: Sequence[Item], members: list[int]) -> Group:
    sequences = [items[i].ids for i in members]
    shared = common_prefix(sequences) if len(members) > 1 else 0
    return Group(
        prefix=sequences[0][:shared],
        suffixes=tuple(ids[shared:] for ids in sequences),
        indices=tuple(members),
        boundaries=tuple(items[i].prompt_tokens for i in members),
    )


def _cut(group: Group, token_budget: int) -> list[Group]:
    if group.tokens <= token_budget:
        return [group]
    parts: list[list[int]] = []
    room = 0
    for i, suffix in enumerate(group.suffixes):
        if len(suffix) > room or not parts:
            parts.append([])
            room = token_budget - len(group.prefix)
        parts[-1].append(i)
        room -= len(suffix)
    return [
        Group(
            prefix=group.prefix,
            suffixes=tuple(group.suffixes[i] for i in part),
            indices=tuple(group.indices[i] for i in part),
            boundaries=tuple(group.boundaries[i] for i in part),
        )
        for part in parts
    ]
