"""The activations between the two products of an MLP: act(gate) * up of a fused gate-up, and act(x + bias).

GLU variants: Shazeer, 2002.05202. GELU: Hendrycks and Gimpel, 1606.08415; "gelu_tanh" is its tanh approximation
(transformers' gelu_pytorch_tanh). Rounding, on both paths, is that of transformers: x + bias and act(gate) are
rounded to the dtype of the input before what follows; the activation itself is computed in fp32.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.nn.functional import gelu, silu

from .dispatch import uses_cpu_kernels, uses_triton
from .launch import PARTIAL_ROWS, applied, blocks, dense, jit, require_unit_stride, tl

Activation = Literal["silu", "gelu", "gelu_tanh"]

COLUMNS = 128
"""Columns of a tile; it has PARTIAL_ROWS rows and 8 warps."""


def gated(gate_up_TE: torch.Tensor, activation: Activation) -> torch.Tensor:
    """act(gate) * up, (T, F) in the dtype of the input, where E = 2F: the first half is the gate, the second `up`.

    The last dimension must be contiguous (ValueError on the Triton path otherwise); rows may be strided.
    """
    if uses_triton(gate_up_TE):
        return applied(TritonGated, gate_up_TE, activation)  # type: ignore[no-any-return]
    if activation != "gelu" and uses_cpu_kernels(gate_up_TE):
        from .cpu_rows import fused_gated  # needs numba, which the torch path does not

        return fused_gated(gate_up_TE, activation == "gelu_tanh")
    gate, up = gate_up_TE.chunk(2, dim=-1)
    activated = _reference_activation(gate, activation)
    return activated * up if torch.is_grad_enabled() else activated.mul_(up)


def bias_gelu(hidden_TF: torch.Tensor, bias_F: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    """act(hidden + bias), (T, F) in the dtype of `hidden`. Strides as in `gated`."""
    if uses_triton(hidden_TF):
        return applied(TritonBiasGelu, hidden_TF, bias_F, activation)  # type: ignore[no-any-return]
    return _reference_activation(hidden_TF if bias_F is None else (hidden_TF + bias_F).to(hidden_TF.dtype), activation)


def _reference_activation(values: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation == "silu":
        return silu(values)
    return gelu(values, approximate="tanh" if activation == "gelu_tanh" else "none")


@jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) and its derivative, without overflow or cancellation."""
    small = tl.exp(-tl.abs(x))
    inverse = 1.0 / (1.0 + small)
    return tl.where(x >= 0.0, inverse, small * inverse), small * inverse * inverse


@jit
def _slope(x, ACTIVATION: tl.constexpr):
    """(s, s') where act(x) = x s(x): every activation here is x times a smooth step."""
    if ACTIVATION == "silu":
        return _sigmoid(x)
    elif ACTIVATION == "gelu":  # s is the normal distribution function, s' its density
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)), 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:  # (1 + tanh(u)) / 2 = sigmoid(2u), 2u = sqrt(8 / pi) (x + 0.044715 x^3)
        step, rise = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return step, rise * 1.5957691216057308 * (1.0 + 0.134145 * x * x)


@jit
def _tile(rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(index of the row block, row, column, mask) of this program: column blocks of a row block are neighbours."""
    across: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    block = (tl.program_id(0) // across).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return block, row, column, (row < rows) & (column < WIDTH)


@jit
def _halves(source, mask, WIDTH: tl.constexpr):
    """(gate, up) in fp32."""
    return tl.load(source, mask, 0.0).to(tl.float32), tl.load(source + WIDTH, mask, 0.0).to(tl.float32)


@jit(do_not_specialize=["rows"])
def _gated_forward(
    gate_up, output, rows, stride,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    _, row, column, mask = _tile(rows, WIDTH, ROWS, COLUMNS)
    gate, up = _halves(gate_up + row * stride + column, mask, WIDTH)
    step, _ = _slope(gate, ACTIVATION)
    activated = (gate * step).to(output.dtype.element_ty).to(tl.float32)
    tl.store(output + row * WIDTH + column, (activated * up).to(output.dtype.element_ty), mask)


@jit(do_not_specialize=["rows"])
def _gated_backward(
    gate_up, d_output, d_gate_up, rows, stride,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    _, row, column, mask = _tile(rows, WIDTH, ROWS, COLUMNS)
    gate, up = _halves(gate_up + row * stride + column, mask, WIDTH)
    gradient = tl.load(d_output + row * WIDTH + column, mask, 0.0).to(tl.float32)
    step, rise = _slope(gate, ACTIVATION)
    target = d_gate_up + row * (2 * WIDTH) + column
    tl.store(target, (gradient * up * (step + gate * rise)).to(d_gate_up.dtype.element_ty), mask)
    tl.store(target + WIDTH, (gradient * gate * step).to(d_gate_up.dtype.element_ty), mask)


@jit
def _biased(hidden, bias, row, column, mask, stride, WIDTH: tl.constexpr):
    """hidden + bias, rounded to the dtype of `hidden`, in fp32."""
    values = tl.load(hidden + row * stride + column, mask, 0.0).to(tl.float32)
    if bias is not None:
        values += tl.load(bias + column, column < WIDTH, 0.0).to(tl.float32)
        values = values.to(hidden.dtype.element_ty).to(tl.float32)
    return values


@jit(do_not_specialize=["rows"])
def _bias_forward(
    hidden, bias, output, rows, stride,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    _, row, column, mask = _tile(rows, WIDTH, ROWS, COLUMNS)
    values = _biased(hidden, bias, row, column, mask, stride, WIDTH)
    step, _ = _slope(values, ACTIVATION)
    tl.store(output + row * WIDTH + column, (values * step).to(output.dtype.element_ty), mask)


@jit(do_not_specialize=["rows"])
def _bias_backward(
    hidden, bias, d_output, d_hidden, d_bias, rows, stride,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block, row, column, mask = _tile(rows, WIDTH, ROWS, COLUMNS)
    values = _biased(hidden, bias, row, column, mask, stride, WIDTH)
    step, rise = _slope(values, ACTIVATION)
    gradient = tl.load(d_output + row * WIDTH + column, mask, 0.0).to(tl.float32) * (step + values * rise)
    tl.store(d_hidden + row * WIDTH + column, gradient.to(d_hidden.dtype.element_ty), mask)
    if bias is not None:
        tl.store(d_bias + block * WIDTH + column, tl.sum(gradient, 0)[None, :], column < WIDTH)


class TritonGated(torch.autograd.Function):
    """`gated`."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        require_unit_stride(gate_up)
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        output = gate_up.new_empty(rows, width)
        _gated_forward[_grid(rows, width)](
            gate_up, output, rows, gate_up.stride(0), width, activation, PARTIAL_ROWS, COLUMNS, num_warps=8
        )
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        return output

    @staticmethod
    def backward(ctx: Any, d_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        rows, width = d_output.shape
        d_gate_up = gate_up.new_empty(gate_up.shape)
        _gated_backward[_grid(rows, width)](
            gate_up, dense(d_output), d_gate_up, rows, gate_up.stride(0), width, ctx.activation, PARTIAL_ROWS, COLUMNS,
            num_warps=8,
        )  # fmt: skip
        return d_gate_up, None


class TritonBiasGelu(torch.autograd.Function):
    """`bias_gelu`."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
        require_unit_stride(hidden, bias)
        rows, width = hidden.shape
        output = hidden.new_empty(rows, width)
        _bias_forward[_grid(rows, width)](
            hidden, bias, output, rows, hidden.stride(0), width, activation, PARTIAL_ROWS, COLUMNS, num_warps=8
        )
        ctx.save_for_backward(hidden, bias)
        ctx.activation = activation
        return output

    @staticmethod
    def backward(ctx: Any, d_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        hidden, bias = ctx.saved_tensors
        rows, width = hidden.shape
        d_hidden = hidden.new_empty(rows, width)
        d_bias = None if bias is None else hidden.new_empty(blocks(rows, PARTIAL_ROWS), width, dtype=torch.float32)
        _bias_backward[_grid(rows, width)](
            hidden, bias, dense(d_output), d_hidden, d_bias, rows, hidden.stride(0), width, ctx.activation,
            PARTIAL_ROWS, COLUMNS, num_warps=8,
        )  # fmt: skip
        return d_hidden, None if d_bias is None else d_bias.sum(0).to(bias.dtype), None


def _grid(rows: int, width: int) -> tuple[int]:
    return (blocks(rows, PARTIAL_ROWS) * blocks(width, COLUMNS),)
