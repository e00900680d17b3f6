"""Weights of 8 bits: how they are rounded and widened, and products that are those of the widened ones bit for bit."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from plaudit_kernels import FrozenLinear, Int8Linear
from plaudit_kernels.int8 import round_rows, triton_widen_rows, widen_rows

from .agreement import random

SHAPES = [(1, 64), (33, 200), (5, 123), (3, 1), (2, 4100)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_weight_moves_by_more_than_half_a_step(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random(*shape).to(dtype)
    rounded, scale = round_rows(weight)
    assert (rounded.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, shape[:1])
    assert torch.equal(rounded.abs().amax(-1), torch.full(shape[:1], 127, dtype=torch.int8))
    apart = (rounded.double() * scale.double()[:, None] - weight.double()).abs()
    assert (apart <= scale.double()[:, None] * (0.5 + 1e-5)).all()


def test_ties_go_to_even_and_tiny_rows_to_nothing() -> None:
    rounded, scale = round_rows(torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0, 0, 0], [1e-44, 0, 0, -1e-44]]))
    assert rounded.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0], [0, 0, 0, 0]] and scale[0] == 1
    assert (scale > 0).all()
    assert not widen_rows(rounded, scale, torch.full((3, 4), torch.nan))[1:].any()


@pytest.mark.parametrize("strange", [torch.inf, -torch.inf, torch.nan])
def test_a_row_that_is_not_finite_widens_to_no_number(strange: float) -> None:
    weight = random(3, 40).float()
    weight[1, 7] = strange
    widened = widen_rows(*round_rows(weight), torch.zeros(3, 40))
    assert not widened[1].isfinite().any() and widened[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_widens_to_the_bits_of_torch(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    wide, scale = round_rows(random(shape[0], shape[1] + 8).float())
    wide[-1] = 0
    weight = wide[:, :-8]  # rows with gaps
    ours = torch.full((shape[0] + 1, shape[1] + 24), torch.nan, dtype=dtype, device=device)
    triton_widen_rows(weight.to(device), scale.to(device), ours[: shape[0], : shape[1]])
    plain = widen_rows(weight, scale, torch.full(shape, torch.nan, dtype=dtype))
    truth = (weight.double() * scale.double()[:, None]).float()
    assert torch.equal(plain, truth.to(dtype))
    close = {"rtol": 2**-7, "atol": 0.0} if device.type == "cpu" and dtype == torch.bfloat16 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(ours[: shape[0], : shape[1]].cpu(), plain, **close)  # the interpreter's bf16 is coarse
    assert ours[shape[0] :].isnan().all() and ours[:, shape[1] :].isnan().all()


def test_gaps_along_a_row_are_refused(device: torch.device) -> None:
    weight, scale = round_rows(random(4, 6).float().to(device))
    with pytest.raises(ValueError, match="contiguous"):
        triton_widen_rows(weight.T, scale, torch.zeros(6, 4, device=device))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_widened_weights(exact: bool, dtype: torch.dtype, device: torch.device) -> None:
    scratch = torch.empty(0, dtype=dtype, device=device)
    shapes = [(24, 64), (96, 100), (50, 30)]
    weights = [random(*shape, seed=seed).to(device, dtype) for seed, shape in enumerate(shapes)]
    bias = random(96, seed=9).to(device, dtype)
    layers = [Int8Linear(w, bias if w is weights[1] else None, exact=exact, scratch=scratch) for w in weights]
    assert scratch.numel() == 96 * 100
    place = scratch.data_ptr()
    for layer, weight in [*zip(layers, weights, strict=True)] * 2:  # one after the other in the same memory
        rounded, scale = round_rows(weight)
        whole = (rounded * scale[:, None]).to(dtype)
        plain = FrozenLinear(whole, bias if weight is weights[1] else None, exact=exact)
        rows = random(77, weight.shape[1], seed=5).to(device, dtype)
        assert torch.equal(layer(rows), plain(rows))
        assert torch.equal(layer(rows[:3]), plain(rows[:3]))
    assert scratch.data_ptr() == place


def test_a_layer_holds_8_bits_a_weight_and_none_of_what_it_was_given() -> None:
    weight = random(40, 64).float()
    layer = Int8Linear(weight, None, exact=True, scratch=torch.empty(0))
    before, rows = layer(torch.eye(64)), random(40, 64, seed=1).float()
    held = [part for part in vars(layer).values() if isinstance(part, torch.Tensor) and part is not layer._scratch]
    assert sum(part.untyped_storage().nbytes() for part in held) == 40 * 64 + 4 * 40
    weight.copy_(rows)
    assert torch.equal(layer(torch.eye(64)), before)
    with pytest.raises(ValueError, match="load the model again"):
        layer.dense()


def test_more_bits_move_a_product_less() -> None:
    from plaudit_kernels import Fp8Linear

    weight, rows = random(96, 256).bfloat16(), random(64, 256, seed=1).bfloat16()
    truth = rows.double() @ weight.double().T
    scratch = torch.empty(0, dtype=torch.bfloat16)
    layers = [
        FrozenLinear(weight, None, exact=True),
        Int8Linear(weight, None, exact=True, scratch=scratch),
        Fp8Linear(weight, None),
    ]
    errors = [float((layer(rows).double() - truth).norm() / truth.norm()) for layer in layers]
    assert all(finer < 0.7 * coarser for finer, coarser in pairwise(errors))
