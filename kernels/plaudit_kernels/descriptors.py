"""Tensors as the copy engine of Hopper (TMA) takes them: a whole tile moves at one thread's word, without registers.

The engine wants rows that begin at multiples of 16 bytes and elements that lie side by side. Where a tensor is not
like that there is no descriptor, and kernels read through pointers. It writes zeros for what lies outside a tensor.
"""

from __future__ import annotations

from typing import Any

import torch

from .launch import TensorDescriptor

_ALIGNED = 16


def described(tensor: torch.Tensor, rows: int, columns: int) -> Any | None:
    """The descriptor of tiles `rows` by `columns` of a matrix; None where the engine cannot read it."""
    row, column = tensor.stride()
    if column != 1 or not tensor.numel() or tensor.data_ptr() % _ALIGNED or row * tensor.element_size() % _ALIGNED:
        return None
    return TensorDescriptor(tensor, list(tensor.shape), [row, 1], [rows, columns])


def heads_side_by_side(tensor_THD: torch.Tensor) -> torch.Tensor | None:
    """(T, H * D), a view; None where the heads of a row have gaps between them."""
    tokens, heads, width = tensor_THD.shape
    row, head, column = tensor_THD.stride()
    if column != 1 or (heads > 1 and head != width):
        return None
    return tensor_THD.as_strided((tokens, heads * width), (row, 1))
