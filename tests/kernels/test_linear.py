"""A linear layer whose weights no longer change: its values, its bits, and the weights it gives back."""

from __future__ import annotations

import pytest
import torch

from plaudit_kernels import FrozenLinear

from .agreement import random


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_rounded_once_and_rows_do_not_know_each_other(biased: bool, dtype: torch.dtype) -> None:
    weight, bias = random(96, 64).to(dtype), random(96, seed=1).to(dtype) if biased else None
    rows = random(77, 64, seed=2).to(dtype)
    layer = FrozenLinear(weight, bias, exact=True)
    product = layer(rows)
    truth = rows.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    assert product.dtype == dtype
    # 64 products of unit normals: fp32 sums are exact to about 1e-5; bf16 keeps 8 bits
    allowed = 1e-5 if dtype == torch.float32 else 2**-8 * truth.abs() + 1e-5
    assert ((product.double() - truth).abs() <= allowed).all()
    for count in (1, 3, 40):
        assert torch.equal(layer(rows[:count]), product[:count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    weight = random(33, 64).to(dtype)
    assert torch.equal(FrozenLinear(weight, None, exact=True).dense(), weight)
