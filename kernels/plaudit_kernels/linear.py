"""The product of a linear layer whose weights no longer change.

On CPUs oneDNN keeps the weights in blocks of its own: 10% faster than a plain product in fp32 and 3% in bf16 on
the shapes of small decoders, and the same bits for any number of rows. A CPU that has no bf16 computes it in fp32.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from .dispatch import uses_triton
from .matmul import matmul, matmul_fp8, quantize_rows

_ROWS_EXPECTED = 1024
"""A hint for the choice of the blocks; results do not depend on it."""


class FrozenLinear:
    """x @ weight.T + bias for x (T, K) -> (T, N), without gradients. weight (N, K) fp32 or bf16; bias (N,) or None.

    With `exact` the bits of a row do not depend on T: fused kernels then take `matmul`, where a library would switch.
    """

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, *, exact: bool) -> None:
        self._dtype, self._exact = weight_NK.dtype, exact
        weight = weight_NK.detach()
        if _without_bf16(weight):
            weight, bias_N = weight.float(), None if bias_N is None else bias_N.float()
        self.blocked = blocks_weights(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_EXPECTED) if self.blocked else weight
        self._bias = None if bias_N is None else bias_N.detach()

    def dense(self) -> torch.Tensor:
        """The weight (N, K) as it was given, bit for bit; with blocks, a new tensor."""
        return self._weight.to_dense().to(self._dtype) if self.blocked else self._weight

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        if self.blocked:
            x_TK = x_TK.to(self._weight.dtype)
            product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, self._weight, self._bias, "none", [], "")
            return product.to(self._dtype)
        if self._exact and uses_triton(x_TK):
            product = matmul(x_TK, self._weight)
            return product if self._bias is None else product + self._bias
        return linear(x_TK, self._weight, self._bias)


class Fp8Linear:
    """x @ weight.T + bias for x (T, K) -> (T, N), without gradients, weight and x rounded to e4m3 row by row.

    It holds 8 bits a weight and one fp32 scale a row (N,); sums are fp32, the result has the dtype of x. With `exact`
    the bits of a row do not depend on T where `matmul_fp8` is a kernel.
    """

    blocked = True
    """The weight that was given is kept nowhere."""

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, *, exact: bool = True) -> None:
        self._weight, self._scale = quantize_rows(weight_NK.detach())
        self._exact = exact
        self._bias = None if bias_N is None else bias_N.detach()

    def dense(self) -> torch.Tensor:
        """Raises ValueError: what was rounded away does not come back."""
        raise ValueError("the weights were rounded to fp8: load the model again to train or save it")

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        product = matmul_fp8(x_TK, self._weight, self._scale, exact=self._exact)
        return product if self._bias is None else product + self._bias


def blocks_weights(weight: torch.Tensor) -> bool:
    """Whether oneDNN's blocked weights are used for a product with `weight`."""
    return _onednn(weight) and weight.dtype in (torch.float32, torch.bfloat16) and not _without_bf16(weight)


def _without_bf16(weight: torch.Tensor) -> bool:
    """Whether `weight` is bf16 on a CPU without instructions for it: there a product in bf16 takes 25 times as long as
    that of the same numbers in fp32, rounded at the end."""
    return weight.dtype == torch.bfloat16 and _onednn(weight) and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _onednn(weight: torch.Tensor) -> bool:
    operations = torch.ops.mkldnn
    return (
        weight.device.type == "cpu"
        and not uses_triton(weight)
        and torch.backends.mkldnn.is_available()
        and hasattr(operations, "_linear_pointwise")
        and hasattr(operations, "_reorder_linear_weight")
    )
