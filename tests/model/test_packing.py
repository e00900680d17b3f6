"""Grouping and packing as plain arithmetic, over random items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from plaudit_model.packed import with_padding_segment
from plaudit_model.packing import MIN_SHARED, Group, group_items, pack, split_by_budget
from plaudit_model.padded_trunk import unpack


@dataclass
class Item:
    ids: NDArray[np.int32]
    prompt_tokens: int


@st.composite
def items(draw: st.DrawFn) -> list[Item]:
    """Items of a few prompts, some with the same first response tokens, some with no prompt."""
    prompts = draw(st.lists(st.lists(st.integers(0, 9), max_size=50), min_size=1, max_size=3))
    result = []
    for _ in range(draw(st.integers(1, 12))):
        prompt = draw(st.sampled_from(prompts))
        response = draw(st.lists(st.integers(0, 2), min_size=1, max_size=30))
        result.append(Item(np.array(prompt + response, dtype=np.int32), len(prompt)))
    return result


def sequence(group: Group, place: int) -> list[int]:
    return [*group.prefix.tolist(), *group.suffixes[place].tolist()]


@given(items(), st.booleans())
def test_every_item_is_in_one_group_unchanged(batch: list[Item], share: bool) -> None:
    groups = group_items(batch, share=share)
    assert sorted(i for g in groups for i in g.indices) == list(range(len(batch)))
    for group in groups:
        assert all(len(suffix) for suffix in group.suffixes)
        for place, index in enumerate(group.indices):
            assert sequence(group, place) == batch[index].ids.tolist()


@given(items())
def test_sharing_costs_the_prompt_once(batch: list[Item]) -> None:
    unshared = sum(g.tokens for g in group_items(batch, share=False))
    shared = sum(g.tokens for g in group_items(batch, share=True))
    saved = 0
    for key in {i.ids[: i.prompt_tokens].tobytes() for i in batch if i.prompt_tokens >= MIN_SHARED}:
        members = [i for i in batch if i.ids[: i.prompt_tokens].tobytes() == key and i.prompt_tokens >= MIN_SHARED]
        saved += (len(members) - 1) * members[0].prompt_tokens
    assert unshared == sum(len(i.ids) for i in batch)
    assert shared <= unshared - saved  # less still where the responses begin alike


@given(items(), st.integers(1, 200))
def test_batches_keep_the_budget_and_lose_nothing(batch: list[Item], budget: int) -> None:
    groups = group_items(batch, share=True)
    parts = split_by_budget(groups, budget)
    assert sorted(i for part in parts for g in part for i in g.indices) == list(range(len(batch)))
    for part in parts:
        tokens = sum(g.tokens for g in part)
        assert tokens <= budget or (len(part) == 1 and len(part[0].suffixes) == 1)
        for group in part:
            for place, index in enumerate(group.indices):
                assert sequence(group, place) == batch[index].ids.tolist()


@settings(max_examples=60)
@given(items(), st.booleans())
def test_a_packed_batch_unpacks_to_its_items(batch: list[Item], share: bool) -> None:
    groups = group_items(batch, share=share)
    packed = pack(groups)
    assert packed.tokens == sum(g.tokens for g in groups)
    for (ids, types), index in zip(unpack(packed), packed.indices, strict=True):
        item = batch[index]
        assert ids.tolist() == item.ids.tolist()
        boundary = item.prompt_tokens
        if not share:
            assert types.tolist() == [int(boundary > 0 and p >= boundary) for p in range(len(ids))]


@given(items())
def test_padding_rows_have_a_segment_of_their_own(batch: list[Item]) -> None:
    packed = pack(group_items(batch, share=True))
    padded = with_padding_segment(packed)
    assert padded.tokens % 32 == 0 and padded.tokens - packed.tokens < 32
    assert padded.segments[:, 1].sum() == padded.tokens
    assert padded.pool_last.tolist() == packed.pool_last.tolist()
