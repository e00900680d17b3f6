"""Which tensors the copy engine of Hopper can read, and that kernels give the same numbers whether it does or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from plaudit_kernels import (
    attention_backward,
    attention_table,
    attention_triton,
    matmul,
    packed_attention,
    plan_attention,
)
from plaudit_kernels.descriptors import described, heads_side_by_side
from plaudit_kernels.matmul import TritonMatmul

from .agreement import random
from .batches import grouped, heads


def test_what_the_engine_can_read() -> None:
    matrix = torch.zeros(8, 64, dtype=torch.float16)
    for tensor in (matrix, matrix[:, :40], matrix[2:, 8:]):
        found = described(tensor, 16, 32)
        assert found is not None
        assert (list(found.shape), found.strides[0], found.block_shape) == (list(tensor.shape), 64, [16, 32])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(8, 68, dtype=torch.float16),
        torch.zeros(8, 64, dtype=torch.float16)[:, 4:],
        torch.zeros(64, 8, dtype=torch.float16).T,
        torch.zeros(0, 64, dtype=torch.float16),
    ],
    ids=["rows of 136 bytes", "begins at 8 bytes", "columns", "nothing"],
)
def test_what_it_cannot(tensor: torch.Tensor) -> None:
    assert described(tensor, 16, 32) is None


def test_heads_are_one_row_unless_there_are_gaps() -> None:
    fused = torch.arange(3 * 6 * 16).view(3, 6, 16)
    query, key = fused[:, :4], fused[:, 4:5]
    flat = heads_side_by_side(query)
    assert flat is not None and torch.equal(flat, query.flatten(1))
    assert flat.data_ptr() == query.data_ptr()
    one = heads_side_by_side(key)
    assert one is not None and torch.equal(one, key[:, 0])
    assert heads_side_by_side(fused[:, ::2]) is None
    assert heads_side_by_side(fused[..., ::2]) is None


def test_attention_is_the_same_with_and_without(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, kernels: Callable[[str], None]
) -> None:
    """Bit for bit, forward; prompts that end within a block, at its end and before it."""
    kernels("triton")
    segments = grouped([(130, [1, 70]), (128, [66]), (20, [200, 5]), (0, [190])])
    tokens = sum(segment[1] for segment in segments)
    q, k, v = (part.to(device, torch.float16) for part in heads(tokens, 2, 1, 64))
    plan = plan_attention(np.array(segments), tokens, causal=True, device=device).to(device)  # type: ignore[union-attr]
    row = attention_table.SM_90[2, 64]
    assert row.forward.described
    with torch.no_grad():
        brought = packed_attention(q, k, v, plan, scale=0.125)
        plain = row.forward._replace(described=False)
        monkeypatch.setitem(attention_table.SM_90, (2, 64), row._replace(forward=plain))
        assert torch.equal(packed_attention(q, k, v, plan, scale=0.125), brought)


@pytest.mark.parametrize(("window", "may"), [(None, False), (64, True)])
def test_several_loops_are_compiled_without_fusing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, kernels: Callable[[str], None], window: int | None, may: bool
) -> None:
    """A block of a shared prompt goes through another loop than the same block unshared: fused in one of them, a
    product and a sum would round otherwise there. With a window all loops are of pointers."""
    launched: list[Any] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *_, **options: launched.append(options.get("enable_fp_fusion"))

    kernels("triton")
    monkeypatch.setattr(attention_triton, "_forward", Kernel())
    for kernel in ("_delta", "_query_gradient", "_key_gradient"):
        monkeypatch.setattr(attention_backward, kernel, Kernel())
    plan = plan_attention(np.array([(0, 70, 0, 0)]), 70, causal=True, window=window, device=device).to(device)  # type: ignore[union-attr]
    leaves = [part.to(device, torch.float16).requires_grad_() for part in heads(70, 2, 1, 64)]
    packed_attention(*leaves, plan, scale=0.125).sum().backward()  # type: ignore[no-untyped-call]
    assert launched == [may, None, may, None], "forward, delta, gradient of queries, gradient of keys"


def test_a_product_is_the_same_with_and_without(device: torch.device) -> None:
    wide, b = random(130, 208).to(device, torch.float16), random(264, 200, seed=1).to(device, torch.float16)
    brought = TritonMatmul.apply(wide[:, :200], b)
    through_pointers = torch.cat([wide[:, :204], wide[:, :2]], 1)[:, :200]  # rows of 412 bytes
    assert described(through_pointers, 128, 64) is None
    assert torch.equal(TritonMatmul.apply(through_pointers, b), brought)
    assert torch.allclose(matmul(wide[:, :200].float(), b.float()), brought.float(), atol=0.1)
