"""torch's product of two e4m3 matrices with a scale for every row (CUTLASS), for fast mode.

It picks its tiles by the number of rows, so exact mode never asks for it. Sums are kept in fp32 here too: the fast
accumulation of Hopper has 14 bits. On an H200 it takes 0.7 of the time of our kernel (benchmarks/results/gpu.csv).
"""

from __future__ import annotations

from functools import lru_cache

import torch

_SIXTEEN = 16
"""What the library wants both dimensions of the weight to be multiples of."""


def scaled_product(
    a_MK: torch.Tensor, scale_M: torch.Tensor, b_NK: torch.Tensor, scale_N: torch.Tensor
) -> torch.Tensor | None:
    """(scale a) @ (scale b).T, (M, N) bf16, of two e4m3 matrices; None where the library cannot, or is not right."""
    if not a_MK.is_cuda or any(size % _SIXTEEN for size in b_NK.shape) or not agrees(a_MK.device):
        return None
    return _product(a_MK, scale_M, b_NK, scale_N)


@lru_cache(maxsize=16)
def agrees(device: torch.device) -> bool:
    """Whether it runs on this card and is right there: its error is at most a rounding to bf16 of the largest value."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 256, generator=draw).to(torch.float8_e4m3fn) for rows in (67, 96))
    scales = [torch.rand(rows, generator=draw) + 0.5 for rows in (67, 96)]
    truth = (a.double() * scales[0].double()[:, None]) @ (b.double() * scales[1].double()[:, None]).T
    try:
        ours = _product(*(tensor.to(device) for tensor in (a, scales[0], b, scales[1]))).cpu().double()
    except (RuntimeError, TypeError, ValueError):
        return False
    return bool((ours - truth).abs().max() <= truth.abs().max() * 2**-8)


def _product(a: torch.Tensor, scale_M: torch.Tensor, b: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
    return torch._scaled_mm(
        a, b.T, scale_a=scale_M[:, None], scale_b=scale_N[None], out_dtype=torch.bfloat16, use_fast_accum=False
    )
