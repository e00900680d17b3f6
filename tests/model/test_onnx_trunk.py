"""What ONNX Runtime's side decides before a graph is run."""

from __future__ import annotations

import itertools
import random

import pytest

from plaudit_model.contract import Serving
from plaudit_model.errors import ContractError
from plaudit_model.onnx_trunk import MAX_PADDING, by_length


def test_every_sequence_is_in_one_batch_and_little_is_padding() -> None:
    lengths = [random.Random(0).randrange(1, 900) for _ in range(200)]
    batches = by_length(lengths)
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(200))
    assert 1 < len(batches) < 50
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded - sum(lengths[i] for i in batch) <= MAX_PADDING * padded
    assert by_length([5, 5, 5]) == [[0, 1, 2]] and by_length([1]) == [[0]]


@pytest.mark.parametrize(("backend", "dtype"), [("torch", "int8"), ("onnx", "bfloat16")])
def test_a_dtype_that_the_backend_has_not_is_refused(backend: str, dtype: str) -> None:
    with pytest.raises(ContractError, match=rf"backend {backend} serves .* not {dtype} .*plaudit model export"):
        Serving(backend, dtype)  # type: ignore[arg-type]
