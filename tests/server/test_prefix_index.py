from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from plaudit_model.packing import MIN_SHARED
from plaudit_server.domain import Work
from plaudit_server.prefix_index import PrefixIndex
from plaudit_server.waiting import Entry, Job

# Sequences that branch late and often: long common beginnings, short alphabets.
_sequences = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(0, 2), min_size=1, max_size=5)), min_size=1, max_size=14,
    unique_by=lambda parts: (parts[0], tuple(parts[1])),
)  # fmt: skip


def entry(ids: list[int]) -> Entry:
    work = Work(np.array(ids, dtype=np.int32), 0)
    return Entry.of(Job(work, work.ids.tobytes(), "batch", 0.0))


def common(a: Entry, b: Entry) -> int:
    length = min(a.tokens, b.tokens)
    return next((i for i in range(length) if a.ids[i] != b.ids[i]), length)


def tree_size(entries: list[Entry]) -> int:
    return len({tuple(e.ids[: i + 1].tolist()) for e in entries for i in range(e.tokens)})


@settings(max_examples=200)
@given(_sequences, st.data())
def test_it_counts_the_tree_and_knows_every_relative(parts: list[tuple[int, list[int]]], data: st.DataObject) -> None:
    entries = [entry([500] * 16 * number + [number] * 8 + tail) for number, tail in parts]
    index = PrefixIndex(share=True)
    for one in entries:
        index.add(one)
    for gone in data.draw(st.lists(st.sampled_from(entries), unique=True, max_size=len(entries) - 1)):
        index.remove(gone)
        entries.remove(gone)
    assert len(index) == len(entries)
    assert index.tokens == tree_size(entries)
    for one in entries:
        found = list(index.relatives(one))
        assert all(prefix == common(one, other) >= MIN_SHARED for other, prefix in found)
        assert [prefix for _, prefix in found] == sorted((prefix for _, prefix in found), reverse=True)
        assert len({id(other) for other, _ in found} | {id(one)}) == len(found) + 1


def test_whoever_has_a_better_family_elsewhere_is_no_relative() -> None:
    lone, *family = (entry([*range(20), *[number] * 40, tail]) for number, tail in ((90, 0), (91, 1), (91, 2), (91, 3)))
    index = PrefixIndex(share=True)
    for one in (lone, *family):
        index.add(one)
    assert list(index.relatives(lone)) == []
    assert {id(other) for other, _ in index.relatives(family[1])} == {id(family[0]), id(family[2]), id(lone)}


def test_without_sharing_nobody_is_related() -> None:
    index = PrefixIndex(share=False)
    entries = [entry([*range(30), tail]) for tail in range(3)]
    for one in entries:
        index.add(one)
    assert index.tokens == 3 * 31
    assert list(index.relatives(entries[0])) == []


def test_equal_tokens_with_another_boundary_are_two_sequences() -> None:
    ids = np.arange(20, dtype=np.int32)
    a, b = (Entry.of(Job(Work(ids, boundary), bytes([boundary]), "batch", 0.0)) for boundary in (3, 9))
    index = PrefixIndex(share=True)
    index.add(a)
    index.add(b)
    assert [other for other, _ in index.relatives(a)] == [b]
    index.remove(a)
    assert list(index.relatives(b)) == []
