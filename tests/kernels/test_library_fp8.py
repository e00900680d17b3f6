"""torch's product of two e4m3 matrices: taken in fast mode where it is right, never in exact mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from plaudit_kernels import library_fp8, matmul_fp8, quantize_rows

from .agreement import random

CPU = torch.device("cpu")


@pytest.fixture
def product(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[..., Any]], None]]:
    """`product(function)` puts it in the place of torch's."""

    def put(function: Callable[..., Any]) -> None:
        monkeypatch.setattr(library_fp8, "_product", function)
        library_fp8.agrees.cache_clear()

    yield put
    library_fp8.agrees.cache_clear()


def right(a: torch.Tensor, scale_M: torch.Tensor, b: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
    return ((a.float() * scale_M[:, None]) @ (b.float() * scale_N[:, None]).T).bfloat16()


def without_a_scale(a: torch.Tensor, scale_M: torch.Tensor, b: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
    return right(a, scale_M, b, torch.ones_like(scale_N))


def refused(*_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("row-wise scaling is not supported on this device")


@pytest.mark.parametrize(
    ("function", "said"), [(right, ""), (without_a_scale, "it is wrong on this card"), (refused, "row-wise scaling")]
)
def test_it_is_tried_before_it_is_used_and_what_is_wrong_is_said(
    product: Callable[[Callable[..., Any]], None],
    function: Callable[..., Any],
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    product(function)
    assert library_fp8.agrees(CPU) is not bool(said)
    assert said in caplog.text and bool(caplog.text) is bool(said)


def test_a_card_that_is_full_says_nothing_of_the_library(product: Callable[[Callable[..., Any]], None]) -> None:
    def full(*_: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    product(full)
    with pytest.raises(torch.OutOfMemoryError):
        library_fp8.agrees(CPU)
    product(right)
    assert library_fp8.agrees(CPU)


def test_without_a_card_fast_mode_multiplies_as_exact_mode_does() -> None:
    a, (b, scale) = random(5, 64).bfloat16(), quantize_rows(random(32, 64, seed=1).bfloat16())
    assert torch.equal(matmul_fp8(a, b, scale, exact=False), matmul_fp8(a, b, scale))


@pytest.mark.parametrize("exact", [True, False])
def test_exact_mode_never_asks(monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    asked: list[torch.Size] = []

    def library(a: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        asked.append(a.shape)
        return a.new_zeros(5, 32, dtype=torch.bfloat16)

    monkeypatch.setattr(library_fp8, "scaled_product", library)
    a, (b, scale) = random(5, 64).bfloat16(), quantize_rows(random(32, 64, seed=1).bfloat16())
    assert bool(matmul_fp8(a, b, scale, exact=exact).any()) is exact
    assert len(asked) == (not exact)
