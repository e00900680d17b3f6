"""RMSNorm and LayerNorm: the kernel against torch, torch against transformers' modules, rows against their batch."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from plaudit_kernels import norm

from .agreement import agree, random

EPS = 1e-5
DTYPES = [torch.float32, torch.float16]
SHAPES = [(1, 64), (33, 64), (31, 200), (123, 5), (5, 1023)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(
    shape: tuple[int, int], unit_offset: bool, residual: bool, dtype: torch.dtype, device: torch.device
) -> None:
    def fused(hidden: torch.Tensor, weight: torch.Tensor, other: torch.Tensor | None) -> object:
        return norm.TritonNorm.apply(hidden, other, weight, None, EPS, False, unit_offset)

    def reference(hidden: torch.Tensor, weight: torch.Tensor, other: torch.Tensor | None) -> object:
        outputs = norm.rms_norm(hidden, weight, EPS, residual_TD=other, unit_offset=unit_offset)
        return outputs if residual else outputs[0]

    inputs = [random(*shape), random(shape[1], seed=1), random(*shape, seed=2) if residual else None]
    agree(fused, reference, inputs, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("residual", "bias"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(
    shape: tuple[int, int], residual: bool, bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    def fused(hidden: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor | None, other: object) -> object:
        return norm.TritonNorm.apply(hidden, other, weight, shift, EPS, True, False)

    def reference(
        hidden: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor | None, other: torch.Tensor | None
    ) -> object:
        outputs = norm.layer_norm(hidden, weight, shift, EPS, residual_TD=other)
        return outputs if residual else outputs[0]

    inputs = [random(*shape) + 3, random(shape[1], seed=1), random(shape[1], seed=3) if bias else None]
    agree(fused, reference, [*inputs, random(*shape, seed=2) if residual else None], dtype, device)


def test_a_wider_residual_stream_stays_wide(device: torch.device) -> None:
    def sides(apply: object) -> list[torch.Tensor]:
        hidden = random(33, 64).half().to(device).requires_grad_()
        stream, weight = (random(*shape, seed=4).float().to(device).requires_grad_() for shape in [(33, 64), (64,)])
        normed, total = apply(hidden, stream, weight)  # type: ignore[operator]
        (normed * 3 + total).sum().backward()
        assert normed.dtype == total.dtype == stream.grad.dtype == torch.float32 and hidden.grad.dtype == torch.float16
        return [normed, total, hidden.grad, stream.grad, weight.grad]

    ours = sides(lambda hidden, stream, weight: norm.TritonNorm.apply(hidden, stream, weight, None, EPS, False, False))
    theirs = sides(lambda hidden, stream, weight: norm.rms_norm(hidden, weight, EPS, residual_TD=stream))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3 if one.dtype == torch.float16 else 1e-5, atol=1e-4)


def test_rows_of_a_wider_tensor(device: torch.device) -> None:
    agree(
        lambda hidden, weight: norm.TritonNorm.apply(hidden, None, weight, None, EPS, False, False),
        lambda hidden, weight: norm.rms_norm(hidden, weight, EPS)[0],
        [random(7, 200)[:, 40:140], random(100, seed=1)],
        torch.float32,
        device,
    )


def test_a_last_dimension_with_gaps_is_refused(device: torch.device) -> None:
    gappy = torch.zeros(4, 8, device=device)[:, ::2]
    with pytest.raises(ValueError, match="contiguous"):
        norm.TritonNorm.apply(gappy, None, torch.ones(4, device=device), None, EPS, False, False)


def test_no_rows(device: torch.device) -> None:
    empty, weight = torch.zeros(0, 8, device=device), torch.ones(8, device=device)
    assert norm.TritonNorm.apply(empty, empty, weight, None, EPS, False, False)[0].shape == (0, 8)
    assert norm.rms_norm(empty.cpu(), weight.cpu(), EPS)[0].shape == (0, 8)


@pytest.mark.parametrize("path", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_know_its_neighbours(path: str, dtype: torch.dtype, device: torch.device) -> None:
    hidden, weight = random(77, 576).to(device, dtype), random(576, seed=1).to(device, dtype)

    def normed(rows: torch.Tensor) -> torch.Tensor:
        if path == "triton":
            return norm.TritonNorm.apply(rows, rows, weight, None, EPS, False, False)[0]
        return norm.rms_norm(rows.cpu(), weight.cpu(), EPS, residual_TD=rows.cpu())[0]

    together = normed(hidden)
    for rows in ([5], [76, 5, 5], list(range(32))):
        assert torch.equal(normed(hidden[rows]), together[rows])


@pytest.mark.usefixtures("torch_operations")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("module", "unit_offset"), [(LlamaRMSNorm, False), (Gemma3RMSNorm, True)])
@pytest.mark.parametrize("gradients", [False, True])
def test_torch_gives_the_bits_of_transformers(
    module: type[torch.nn.Module], unit_offset: bool, dtype: torch.dtype, gradients: bool
) -> None:
    layer = module(576, eps=EPS)
    layer.weight.data.copy_(random(576))
    layer = layer.to(dtype)
    hidden = random(50, 576, seed=1).to(dtype)
    kept = hidden.clone()
    with torch.set_grad_enabled(gradients):
        ours, total = norm.rms_norm(hidden, layer.weight, EPS, unit_offset=unit_offset)
        assert torch.equal(ours, layer(hidden))
    assert total is hidden and torch.equal(hidden, kept)


def test_weight_gradients_repeat_bit_for_bit(device: torch.device) -> None:
    hidden, way = random(300, 64).float().to(device), random(300, 64, seed=1).float().to(device)
    weight = torch.ones(64, device=device, requires_grad=True)
    first, second = (
        torch.autograd.grad(norm.TritonNorm.apply(hidden, None, weight, None, EPS, False, False)[0], weight, way)[0]
        for _ in range(2)
    )
    assert torch.equal(first, second)
