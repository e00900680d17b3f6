"""The product of a linear layer whose weights no longer change.

On CPUs oneDNN keeps the weights in blocks of its own: 10% faster than a plain product in fp32 and 3% in bf16 on
the shapes of small decoders, and the same bits for any number of rows.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from .dispatch import uses_triton
from .matmul import matmul

_ROWS_EXPECTED = 1024
"""A hint for the choice of the blocks; results do not depend on it."""


class FrozenLinear:
    """x @ weight.T + bias for x (T, K) -> (T, N), without gradients. weight (N, K) fp32 or bf16; bias (N,) or None.

    With `exact` the bits of a row do not depend on T: fused kernels then take `matmul`, where a library would switch.
    """

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, *, exact: bool) -> None:
        self.blocked, self._exact = blocks_weights(weight_NK), exact
        weight = weight_NK.detach()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_EXPECTED) if self.blocked else weight
        self._bias = None if bias_N is None else bias_N.detach()

    def dense(self) -> torch.Tensor:
        """The weight (N, K) as it was given, bit for bit; with blocks, a new tensor."""
        return self._weight.to_dense() if self.blocked else self._weight

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        if self.blocked:
            product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, self._weight, self._bias, "none", [], "")
            return product
        if self._exact and uses_triton(x_TK):
            product = matmul(x_TK, self._weight)
            return product if self._bias is None else product + self._bias
        return linear(x_TK, self._weight, self._bias)


def blocks_weights(weight: torch.Tensor) -> bool:
    """Whether oneDNN's blocked weights are used for a product with `weight`."""
    if weight.device.type != "cpu" or uses_triton(weight) or not torch.backends.mkldnn.is_available():
        return False
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    if weight.dtype == torch.bfloat16:
        return known and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return known and weight.dtype == torch.float32
