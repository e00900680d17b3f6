"""torch's product of two e4m3 matrices with a scale for every row (CUTLASS), for fast mode.

It picks its tiles by the number of rows, so exact mode never asks for it. Sums are kept in fp32 here too: the fast
accumulation of Hopper has 14 bits. On an H200 it takes 0.7 of the time of our kernel (benchmarks/results/gpu.csv).
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor


def scaled_product(a_MK: Tensor, scale_M: Tensor, b_NK: Tensor, scale_N: Tensor) -> Tensor | None:
    """(scale a) @ (scale b).T, (M, N) bf16, of two e4m3 matrices; None where the library cannot (it wants a weight of
    multiples of 16), or is not right."""
    if not a_MK.is_cuda or any(size % 16 for size in b_NK.shape) or not agrees(a_MK.device):
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
        problem = "" if (ours - truth).abs().max() <= truth.abs().max() * 2**-8 else "it is wrong on this card"
    except torch.OutOfMemoryError:
        raise  # says nothing of the library, and would be remembered
    except (RuntimeError, TypeError, ValueError) as error:
        problem = str(error)
    if problem:
        logging.getLogger("plaudit.kernels").warning("torch's fp8 product is not used, ours is: %s", problem)
    return not problem


def _product(a: Tensor, scale_M: Tensor, b: Tensor, scale_N: Tensor) -> Tensor:
    return torch._scaled_mm(
        a, b.T, scale_a=scale_M[:, None], scale_b=scale_N[None], out_dtype=torch.bfloat16, use_fast_accum=False
    )
