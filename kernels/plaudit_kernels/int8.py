"""Linear layers that keep 8 bits a weight and multiply in the dtype that the weights had: for memory, on any card.

A product first widens its weight, whole, into a buffer that all layers of a model share, then is the product of
`FrozenLinear` over what it finds there. So its bits are those of a model with the widened weights, in either mode.
A weight costs 5 bytes of traffic a batch (1 read and 2 written to widen it, 2 read by the product) where bf16 costs 2.
On an H100 (3.35 TB/s, 990 TFLOP/s in bf16) the 3 more take as long as the products of 440 tokens: by that arithmetic 3%
of a batch of 16,384 tokens, 11% of one of 4,096, and most of a small one. On CPUs a product also lays its weight out
anew at each call, for the same bits as bf16 has there: it works and is slow.
"""

from __future__ import annotations

import torch

from .dispatch import uses_triton
from .launch import blocks, jit, require_unit_stride, row_block, tl
from .linear import FrozenLinear

_MOST = 127
_TINY = torch.finfo(torch.float32).tiny
"""The least scale: the smallest numbers over a smaller one would be infinite."""


def round_rows(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 (N, K), scale (N,) fp32) with weight ~ int8 * scale: the largest magnitude of each row becomes 127, ties go
    to even. A row that is not all finite has a scale that is not, and widens to no finite number."""
    scale_N = (weight_NK.abs().amax(-1).float() / _MOST).clamp_min(_TINY)
    return (weight_NK / scale_N[:, None]).round_().to(torch.int8), scale_N


def widen_rows(weight_NK: torch.Tensor, scale_N: torch.Tensor, out_NK: torch.Tensor) -> torch.Tensor:
    """`out_NK` = int8 (N, K) * scale (N,) fp32, rounded once to the dtype of `out_NK`, which is returned."""
    if uses_triton(weight_NK):
        return triton_widen_rows(weight_NK, scale_N, out_NK)
    return torch.mul(weight_NK, scale_N[:, None], out=out_NK)


def triton_widen_rows(weight_NK: torch.Tensor, scale_N: torch.Tensor, out_NK: torch.Tensor) -> torch.Tensor:
    """`widen_rows` as a kernel. Raises ValueError unless last dimensions are contiguous."""
    require_unit_stride(weight_NK, scale_N, out_NK)
    rows, width = weight_NK.shape
    block = row_block(width)
    _widen[(blocks(rows, block.rows),)](
        weight_NK, scale_N, out_NK, rows, weight_NK.stride(0), out_NK.stride(0), width, block.rows, block.columns,
        num_warps=block.num_warps,
    )  # fmt: skip
    return out_NK


@jit(do_not_specialize=["rows"])
def _widen(
    weight, scale, output, rows, weight_stride, output_stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows)[:, None] & (column < WIDTH)
    values = tl.load(weight + row[:, None] * weight_stride + column, mask, 0).to(tl.float32)
    values *= tl.load(scale + row, row < rows, 0.0)[:, None]
    tl.store(output + row[:, None] * output_stride + column, values.to(output.dtype.element_ty), mask)


class Int8Linear:
    """x @ weight.T + bias for x (T, K) -> (T, N), without gradients, weight rounded to int8 row by row (`round_rows`).

    `scratch`, 1-D in the dtype and on the device of the weight, is what the layers of one model share; each makes it
    large enough for itself. With `exact` the bits of a row do not depend on T.
    """

    blocked = True
    """The weight that was given is kept nowhere."""

    def __init__(
        self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, *, exact: bool, scratch: torch.Tensor
    ) -> None:
        self._weight, self._scale = round_rows(weight_NK.detach())
        self._bias, self._exact = bias_N, exact
        # It grows while layers are made, before any is called: a recorded graph keeps the address that it met. Two
        # products of one model run on one stream, so that the second widens when the first has been computed; and two
        # models, which may not, have a buffer each.
        self._scratch = scratch
        if scratch.numel() < weight_NK.numel():
            scratch.resize_(weight_NK.numel())

    def dense(self) -> torch.Tensor:
        """Raises ValueError: what was rounded away does not come back."""
        raise ValueError("the weights were rounded to int8: load the model again to train or save it")

    def widened(self) -> torch.Tensor:
        """The weight (N, K) that is multiplied, in the scratch: until the next layer is called."""
        return widen_rows(self._weight, self._scale, self._scratch[: self._weight.numel()].view(self._weight.shape))

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        return FrozenLinear(self.widened(), self._bias, exact=self._exact)(x_TK)
