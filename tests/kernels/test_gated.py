"""SwiGLU, GeGLU and bias + GELU: the kernels against torch, torch against transformers' activations."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from plaudit_kernels.gated import Activation, TritonBiasGelu, TritonGated, bias_gelu, gated

from .agreement import agree, random

ACTIVATIONS: list[Activation] = ["silu", "gelu", "gelu_tanh"]
DTYPES = [torch.float32, torch.float16]
SHAPES = [(1, 64), (33, 129), (5, 123)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated(shape: tuple[int, int], activation: Activation, dtype: torch.dtype, device: torch.device) -> None:
    agree(
        lambda gate_up: TritonGated.apply(gate_up, activation),
        lambda gate_up: gated(gate_up, activation),
        [3 * random(shape[0], 2 * shape[1] + 8)[:, : 2 * shape[1]]],
        dtype,
        device,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("activation", "bias"), [("gelu", True), ("gelu", False), ("gelu_tanh", True), ("silu", True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_bias_gelu(
    shape: tuple[int, int], bias: bool, activation: Activation, dtype: torch.dtype, device: torch.device
) -> None:
    agree(
        lambda hidden, shift: TritonBiasGelu.apply(hidden, shift, activation),
        lambda hidden, shift: bias_gelu(hidden, shift, activation),
        [3 * random(*shape), random(shape[1], seed=1) if bias else None],
        dtype,
        device,
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_values_stay_finite(activation: Activation, device: torch.device) -> None:
    gate_up = torch.tensor([[-1e4, 1e4, 0.0, -20.0, 1.0, 1.0, 1.0, 1.0]], device=device, requires_grad=True)
    output = TritonGated.apply(gate_up, activation)
    (gradient,) = torch.autograd.grad(output.sum(), gate_up)
    assert output.tolist()[0][:3] == [0.0, 1e4, 0.0]
    assert bool(gradient.isfinite().all())


@pytest.mark.usefixtures("torch_operations")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("activation", "name"), [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh")]
)
@pytest.mark.parametrize("gradients", [False, True])
def test_torch_gives_the_bits_of_transformers(
    activation: Activation, name: str, dtype: torch.dtype, gradients: bool
) -> None:
    gate_up = random(37, 96).to(dtype)
    kept, bias = gate_up.clone(), random(96, seed=1).to(dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    with torch.set_grad_enabled(gradients):
        assert torch.equal(gated(gate_up, activation), ACT2FN[name](gate) * up)
        assert torch.equal(bias_gelu(gate_up, bias, activation), ACT2FN[name](gate_up + bias))
    assert torch.equal(gate_up, kept)


def test_no_rows(device: torch.device) -> None:
    assert TritonGated.apply(torch.zeros(0, 8, device=device), "silu").shape == (0, 4)
