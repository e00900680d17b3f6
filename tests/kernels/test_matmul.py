"""The batch-invariant product and the fp8 one: against fp64, and a row's bits against the number of rows."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from plaudit_kernels.matmul import (
    E4M3_MAX,
    TritonMatmul,
    matmul,
    matmul_fp8,
    quantize_rows,
    scaled_product,
    triton_quantize_rows,
)

from .agreement import agree, poisoned, random

SHAPES = [(1, 64, 96), (127, 65, 64), (129, 300, 123), (33, 1, 5), (130, 264, 200)]  # M, N, K
"""The copy engine of Hopper takes the last: its rows begin at multiples of 16 bytes."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matmul(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    m, n, k = shape
    agree(TritonMatmul.apply, matmul, [random(m, k + 8)[:, :k], random(n, k, seed=1)], dtype, device)


def test_matmul_with_the_tiles_of_other_chips(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("plaudit_kernels.matmul")  # the package has a function of that name
    monkeypatch.setattr(module, "table_of", lambda _: "default")
    test_matmul((129, 300, 123), torch.float16, device)


@pytest.mark.usefixtures("rowwise_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_does_not_know_how_many_there_are(dtype: torch.dtype, device: torch.device) -> None:
    a, b = random(300, 96).to(device, dtype), random(100, 96, seed=1).to(device, dtype)
    together = TritonMatmul.apply(a, b)
    for rows in ([0], [299, 7], list(range(100, 229))):
        assert torch.equal(TritonMatmul.apply(a[rows], b), together[rows])


def test_more_tiles_than_programs_and_groups(device: torch.device) -> None:
    a, b = random(64 * 9 + 1, 32).float().to(device), random(64 * 2 + 1, 32, seed=1).float().to(device)
    with poisoned():
        ours = TritonMatmul.apply(a, b)
    assert torch.allclose(ours, a @ b.T, atol=1e-5)


def test_no_rows_and_gaps(device: torch.device) -> None:
    a, b = torch.zeros(0, 8, device=device), torch.zeros(4, 8, device=device)
    assert TritonMatmul.apply(a, b).shape == (0, 4)
    with pytest.raises(ValueError, match="contiguous"):
        TritonMatmul.apply(b.T, b.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (31, 200), (5, 123)])
def test_quantised_rows(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    a = random(*shape).to(device, dtype)
    a[-1] = 0
    with poisoned():
        ours = triton_quantize_rows(a)
    plain = quantize_rows(a.cpu())
    # Triton's interpreter loses the carry where a number rounds up to a power of two: not judged there.
    judged = plain[0].float().frexp().mantissa.abs() != 0.5
    for values, scale in (ours, plain):
        apart = (values.cpu().double() * scale.cpu().double()[:, None] - a.cpu().double()).abs()
        # e4m3 has 3 bits of fraction; the interpreter rounds towards zero below the normal numbers: a whole step.
        step = a.cpu().double().abs() / 8 + scale.cpu().double()[:, None] * 2**-9
        assert bool((apart <= step)[judged if values is ours[0] and device.type == "cpu" else ...].all())
        assert float(scale[-1]) == 1 and not values[-1].float().any()
        assert shape[0] == 1 or float(values.float().abs().max()) == E4M3_MAX


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_no_number_does_not_become_one(bad: float, device: torch.device) -> None:
    a, (b, scale) = random(5, 64).to(device, torch.float32), quantize_rows(random(8, 64, seed=1).to(device).float())
    expected = scaled_product(*triton_quantize_rows(a), b, scale, torch.float32)
    a[2, 7] = bad
    with np.errstate(invalid="ignore"):
        ours = scaled_product(*triton_quantize_rows(a), b, scale, torch.float32)
    assert not ours[2].isfinite().any()
    ours[2] = expected[2]
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("shape", [(1, 64, 128), (129, 70, 200), (131, 136, 208)])
def test_fp8_product(shape: tuple[int, int, int], device: torch.device) -> None:
    m, n, k = shape
    a, weight = random(m, k).float(), random(n, k, seed=1).float()
    b, scale = quantize_rows(weight)
    quantised, row_scale = quantize_rows(a)
    with poisoned():
        ours = scaled_product(*(part.to(device) for part in (quantised, row_scale, b, scale)), torch.float32).cpu()
    truth = (quantised.double() * row_scale[:, None].double()) @ (b.double() * scale[:, None].double()).T
    # Products of two e4m3 numbers are exact in fp32; Hopper sums K of them in 14 bits before it rounds to fp32.
    assert float((ours - truth).abs().max()) <= (2**-11 if device.type == "cuda" else 1e-5) * float(truth.abs().max())
    assert torch.allclose(matmul_fp8(a, b, scale), truth.float(), rtol=1e-4, atol=1e-4)
    exact = a.double() @ weight.double().T
    assert float((truth - exact).norm() / exact.norm()) < 0.05
