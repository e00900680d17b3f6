"""What every launch shares: Triton where it is installed, and how many rows of a width one program takes.

Kernels are declared with the `jit` of this file. Without Triton it leaves them plain functions that nobody calls,
so that the torch path needs no Triton. Block sizes depend on the width of a row and on nothing that varies with
traffic: a row is reduced in the same order whoever its neighbours are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

tl: Any = None
TensorDescriptor: Any = None
try:
    import triton.language
    import triton.tools.tensor_descriptor

    tl, jit, TensorDescriptor = triton.language, triton.jit, triton.tools.tensor_descriptor.TensorDescriptor
except ImportError:

    def jit(function: Any = None, **_: Any) -> Any:
        return function or jit


TILE = 4096
"""Elements of a tile of a row kernel: 16 a thread."""

PARTIAL_ROWS = 32
"""Rows whose weight gradients one program adds up. The partial sums are then added in one fixed order."""


class RowBlock(NamedTuple):
    """One program's tile: `rows` by `columns` (a power of two, at least the width), run by `num_warps` warps."""

    rows: int
    columns: int
    num_warps: int


def row_block(width: int) -> RowBlock:
    """The tile of whole rows of `width`; 32 warps are the most that a program can have."""
    columns = power_of_two(width)
    rows = max(1, min(PARTIAL_ROWS, TILE // columns))
    return RowBlock(rows, columns, max(1, min(32, rows * columns // 512)))


def power_of_two(count: int) -> int:
    """The smallest power of two that is not below `count`."""
    return 1 << max(0, count - 1).bit_length()


def blocks(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`."""
    return -(-count // size)


def require_unit_stride(*tensors: torch.Tensor | None) -> None:
    """Raises ValueError unless the last dimension of each tensor is contiguous: the kernels assume it."""
    for tensor in tensors:
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"the last dimension must be contiguous; strides are {tensor.stride()}")


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors as a product of torch takes them: under autocast in its dtype, else as they are. A function of
    autograd's own gets what it is given; gradients return to the dtype that each tensor had."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


class _Forgetful:
    """The context of a forward that no backward follows."""

    def save_for_backward(self, *_: torch.Tensor | None) -> None:
        pass


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply`; without gradients its forward alone: what autograd adds costs the host 8 microseconds a call,
    and the card waits for the host where batches are small."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_Forgetful(), *arguments)


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient as the kernels read it: autograd may hand over an expanded one."""
    return gradient.contiguous()
