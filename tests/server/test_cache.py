from __future__ import annotations

import dataclasses
from collections import OrderedDict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from plaudit_server.cache import ScoreCache, ScoreKeys
from plaudit_server.domain import ModelInfo, Work

INFO = ModelInfo(
    architecture="A", attributes=("score",), revision="r1", numerics="n1", dtype="float32", mode="exact", device="cpu",
    backend="torch", path="", sharing="", max_length=10, parameters=1,
)  # fmt: skip


def work(*ids: int, boundary: int = 0) -> Work:
    return Work(np.array(ids, dtype=np.int32), boundary)


def test_a_key_is_what_a_score_depends_on_and_nothing_else() -> None:
    keys = ScoreKeys(INFO)
    elsewhere = ScoreKeys(dataclasses.replace(INFO, path="x"))
    assert keys.key(work(1, 2)) == keys.key(work(1, 2)) == elsewhere.key(work(1, 2))
    others = [
        keys.key(work(1, 2, 0)), keys.key(work(2, 1)), keys.key(work(1, 2, boundary=1)),
        ScoreKeys(dataclasses.replace(INFO, revision="r2")).key(work(1, 2)),
        ScoreKeys(dataclasses.replace(INFO, numerics="n2")).key(work(1, 2)),
    ]  # fmt: skip
    assert len({keys.key(work(1, 2)), *others}) == 6


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(["get", "put"]), st.integers(0, 6)), max_size=60), st.integers(0, 5))
def test_it_is_a_least_recently_used_cache_bounded_in_bytes(events: list[tuple[str, int]], room: int) -> None:
    size = ScoreCache(10**6)
    size.put(b"x", (1.0,))
    cache, model = ScoreCache(room * size.bytes), OrderedDict[bytes, tuple[float, ...]]()
    for what, number in events:
        key = bytes([number])
        if what == "get":
            assert cache.get(key) == model.get(key)
            if key in model:
                model.move_to_end(key)
            continue
        cache.put(key, (float(number),))
        model[key] = (float(number),)
        model.move_to_end(key)
        while len(model) > room:
            model.popitem(last=False)
        assert cache.bytes == len(model) * size.bytes
