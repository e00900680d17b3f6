"""Mixed precision: on both paths each operation gives the same dtypes, out of it and back to its inputs.

Activations in fp16 or fp32 meet parameters in fp32, as they do under autocast (bf16 is wrong in Triton's interpreter).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from plaudit_kernels import (
    bias_gelu,
    bradley_terry,
    gated,
    layer_norm,
    matmul,
    packed_attention,
    plackett_luce,
    plan_attention,
    rms_norm,
    rotary,
    select,
)

from .agreement import random

HALF, FULL = torch.float16, torch.float32
Shapes = Sequence[tuple[tuple[int, ...], torch.dtype]]


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softcap: float | None = None) -> torch.Tensor:
    plan = plan_attention(np.array([(0, 5, 0, 0), (5, 4, 0, 5)]), 9, causal=True, device=query.device)
    return packed_attention(query, key, value, plan, scale=0.3, softcap=softcap)


def capped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return attend(query, key, value, softcap=2.0)


def added_norm(hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return rms_norm(hidden, weight, 1e-6, residual_TD=residual)


def shifted_norm(hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> object:
    return layer_norm(hidden, weight, bias, 1e-6, residual_TD=residual)


def turned(
    query: torch.Tensor, key: torch.Tensor, query_norm: torch.Tensor, key_norm: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    cos, sin = (table.to(query.device, FULL) for table in (random(9, 16).cos(), random(9, 16).sin()))
    return rotary(query, key, cos, sin, query_norm=query_norm, key_norm=key_norm)


def compared(scores: torch.Tensor) -> torch.Tensor:
    pairs = torch.arange(4, device=scores.device), torch.arange(4, 8, device=scores.device)
    ones = torch.ones(4, device=scores.device)
    return bradley_terry(scores, *pairs, ones, 0 * ones, ones)


def ranked(scores: torch.Tensor) -> torch.Tensor:
    return plackett_luce(scores, torch.arange(9, device=scores.device), torch.tensor([0, 4, 9], device=scores.device))


CASES: dict[str, tuple[Callable[..., object], Shapes]] = {
    "attention": (attend, [((9, 4, 16), HALF), ((9, 2, 16), HALF), ((9, 2, 16), HALF)]),
    "attention of wide queries": (attend, [((9, 4, 16), FULL), ((9, 2, 16), FULL), ((9, 2, 16), HALF)]),
    "attention, soft-capped": (capped, [((9, 4, 16), FULL), ((9, 2, 16), FULL), ((9, 2, 16), HALF)]),
    "matmul": (matmul, [((9, 16), FULL), ((8, 16), FULL)]),
    "matmul of a branch": (matmul, [((9, 16), HALF), ((8, 16), FULL)]),
    "gated": (lambda x: gated(x, "silu"), [((9, 16), HALF)]),
    "bias_gelu": (lambda x, b: bias_gelu(x, b, "gelu"), [((9, 16), HALF), ((16,), FULL)]),
    "rms_norm": (added_norm, [((9, 16), HALF), ((9, 16), FULL), ((16,), FULL)]),
    "rms_norm of a branch": (lambda x, w: rms_norm(x, w, 1e-6)[0], [((9, 16), HALF), ((16,), FULL)]),
    "layer_norm": (shifted_norm, [((9, 16), HALF), ((9, 16), FULL), ((16,), FULL), ((16,), FULL)]),
    "rotary": (turned, [((9, 4, 16), HALF), ((9, 2, 16), HALF), ((16,), FULL), ((16,), FULL)]),
    "bradley_terry": (compared, [((9,), FULL)]),
    "plackett_luce": (ranked, [((9,), FULL)]),
}


def ran(case: str, device: torch.device) -> list[torch.Tensor]:
    """Outputs and gradients, of a forward and a backward pass under autocast."""
    operation, shapes = CASES[case]
    leaves = [
        random(*shape, seed=n).to(device, dtype).requires_grad_() for n, (shape, dtype) in enumerate(shapes)
    ]  # fmt: skip
    with torch.autocast(device.type, dtype=HALF):
        results = operation(*leaves)
        outputs = list(results) if isinstance(results, tuple) else [results]
        loss = torch.stack([(output * random(*output.shape, seed=7).to(output)).float().sum() for output in outputs])
        gradients = torch.autograd.grad(loss.sum(), leaves)
    return [tensor.detach() for tensor in (*outputs, *gradients)]


@pytest.mark.parametrize("case", CASES)
def test_dtypes_are_those_of_the_torch_path(case: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAUDIT_KERNELS", "torch")
    select.cache_clear()
    theirs = ran(case, device)
    monkeypatch.setenv("PLAUDIT_KERNELS", "triton")
    select.cache_clear()
    try:
        ours = ran(case, device)
    finally:
        monkeypatch.undo()
        select.cache_clear()
    assert [tensor.dtype for tensor in ours] == [tensor.dtype for tensor in theirs]
    inputs = [dtype for _, dtype in CASES[case][1]]
    assert [gradient.dtype for gradient in ours[-len(inputs) :]] == inputs
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=2e-2, atol=2e-2)
