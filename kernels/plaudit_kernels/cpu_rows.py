"""What lies between the products of a layer, on the CPU: each operation reads its rows once and writes them once.

Rounding is that of `norm`, `gated` and `rotary`, whose arithmetic this is, with every step of a row in the L1 cache. A
row's arithmetic does not depend on the other rows.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from .cpu_math import beyond, exp, f4, floats, halves, load, rounded, scratch, setting, store, take
from .cpu_runtime import launch

_FASTMATH = {"contract", "nsz"}
_SUMS = {"contract", "nsz", "reassoc"}
"""Sums over a row may be taken in the lanes of the vector unit: in one order, which its width decides."""

_CHUNK = 16
"""Rows that a thread takes at a time."""


def fused_norm(
    hidden_TD: torch.Tensor,
    residual_TD: torch.Tensor | None,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor | None,
    eps: float,
    *,
    centre: bool,
    unit_offset: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, sum) as of `rms_norm`, or with `centre` as of `layer_norm`; without a residual the sum is `hidden`."""
    rows, width = hidden_TD.shape
    normed = torch.empty_like(hidden_TD, memory_format=torch.contiguous_format)
    total = hidden_TD if residual_TD is None else torch.empty_like(normed)
    launch(
        norm_float if hidden_TD.dtype == torch.float32 else norm_bf16,
        rows, width, hidden_TD, 0 if residual_TD is None else residual_TD, weight_D, 0 if bias_D is None else bias_D,
        normed, total, hidden_TD.stride(-2), 0 if residual_TD is None else residual_TD.stride(-2), float(eps),
        int(centre), int(unit_offset), words=width,
    )  # fmt: skip
    return normed, total


def norm_float(table):
    """The kernel in fp32."""
    hidden, residual, weight, bias = floats(table[3]), floats(table[4]), floats(table[5]), floats(table[6])
    _norm(table, hidden, residual, weight, bias, floats(table[7]), floats(table[8]))


def norm_bf16(table):
    """The kernel in bf16."""
    hidden, residual, weight, bias = halves(table[3]), halves(table[4]), halves(table[5]), halves(table[6])
    _norm(table, hidden, residual, weight, bias, halves(table[7]), halves(table[8]))


@njit(fastmath=_FASTMATH, error_model="numpy")
def _norm(table, hidden, residual, weight, bias, normed, total):
    rows, width, eps, centre, unit_offset = table[1], table[2], f4(setting(table[11])), table[12], table[13]
    row = floats(scratch(table, 14))
    while True:
        first = take(table, _CHUNK)
        if first >= rows:
            break
        for n in range(first, min(first + _CHUNK, rows)):
            source = beyond(hidden, n * table[9])
            if table[4]:
                _add(row, source, beyond(residual, n * table[10]), beyond(total, n * width), width)
            else:
                _copy(row, source, width)
            if centre:
                mean = _sum(row, width) / f4(width)
                for i in range(width):
                    row[i] -= mean
            inverse = f4(1.0) / np.sqrt(_square_sum(row, width) / f4(width) + eps)
            target = beyond(normed, n * width)
            if centre:
                _scale_and_shift(target, row, weight, bias, table[6], inverse, width)
            else:
                _scale(target, row, weight, inverse, unit_offset, width)


@njit
def _copy(row, source, width):
    for i in range(width):
        row[i] = load(source, i)


@njit
def _add(row, source, other, total, width):
    for i in range(width):
        value = rounded(total, load(source, i) + load(other, i))
        row[i] = value
        store(total, i, value)


@njit(fastmath=_SUMS)
def _sum(row, width):
    total = f4(0.0)
    for i in range(width):
        total += row[i]
    return total


@njit(fastmath=_SUMS)
def _square_sum(row, width):
    total = f4(0.0)
    for i in range(width):
        total += row[i] * row[i]
    return total


@njit
def _scale(target, row, weight, inverse, unit_offset, width):
    """RMSNorm's end: Gemma's factor is 1 + weight and it rounds once, Llama rounds before the weight multiplies."""
    if unit_offset:
        for i in range(width):
            store(target, i, row[i] * inverse * (f4(1.0) + load(weight, i)))
    else:
        for i in range(width):
            store(target, i, rounded(target, row[i] * inverse) * load(weight, i))


@njit(fastmath=_FASTMATH)
def _scale_and_shift(target, row, weight, bias, shifted, inverse, width):
    if shifted:
        for i in range(width):
            store(target, i, row[i] * inverse * load(weight, i) + load(bias, i))
    else:
        for i in range(width):
            store(target, i, row[i] * inverse * load(weight, i))


def fused_gated(gate_up_TE: torch.Tensor, tanh: bool) -> torch.Tensor:
    """`gated` with SiLU, or with `tanh` GELU by its tanh approximation."""
    rows, columns = gate_up_TE.shape
    output = gate_up_TE.new_empty(rows, columns // 2)
    kernel = gated_float if gate_up_TE.dtype == torch.float32 else gated_bf16
    launch(kernel, rows, columns // 2, gate_up_TE, output, gate_up_TE.stride(-2), int(tanh))
    return output


def gated_float(table):
    """The kernel in fp32."""
    _gated(table, floats(table[3]), floats(table[4]))


def gated_bf16(table):
    """The kernel in bf16."""
    _gated(table, halves(table[3]), halves(table[4]))


@njit
def _gated(table, gate_up, output):
    rows, width = table[1], table[2]
    while True:
        first = take(table, _CHUNK)
        if first >= rows:
            break
        for n in range(first, min(first + _CHUNK, rows)):
            gate = beyond(gate_up, n * table[5])
            if table[6]:
                _gelu_times(gate, beyond(gate, width), beyond(output, n * width), width)
            else:
                _silu_times(gate, beyond(gate, width), beyond(output, n * width), width)


@njit(fastmath=_FASTMATH, error_model="numpy")
def _silu_times(gate, up, output, width):
    for i in range(width):
        x = load(gate, i)
        activated = x / (f4(1.0) + exp(min(-x, f4(88.0))))
        store(output, i, rounded(output, activated) * load(up, i))


@njit(fastmath=_FASTMATH, error_model="numpy")
def _gelu_times(gate, up, output, width):
    for i in range(width):
        x = load(gate, i)
        twice = f4(1.5957691216057308) * (x + f4(0.044715) * x * x * x)  # (1 + tanh u) / 2 is 1 / (1 + exp(-2u))
        activated = x / (f4(1.0) + exp(min(-twice, f4(88.0))))
        store(output, i, rounded(output, activated) * load(up, i))


def fused_rotary(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    eps: float,
    unit_offset: bool,
) -> None:
    """`rotary`, in place."""
    tokens, heads, width = query_THD.shape
    kernel = rotary_float if query_THD.dtype == torch.float32 else rotary_bf16
    norms = [0 if norm is None else norm for norm in (query_norm, key_norm)]
    launch(
        kernel, tokens, width, query_THD, key_TKD, cos_TR, sin_TR, *norms, heads, key_TKD.shape[1],
        *query_THD.stride()[:2], *key_TKD.stride()[:2], cos_TR.shape[-1] // 2, cos_TR.stride(0), float(eps),
        int(unit_offset), words=width,
    )  # fmt: skip


def rotary_float(table):
    """The kernel in fp32."""
    query, key, cos, sin = floats(table[3]), floats(table[4]), floats(table[5]), floats(table[6])
    _rotary(table, query, key, cos, sin, floats(table[7]), floats(table[8]))


def rotary_bf16(table):
    """The kernel in bf16."""
    query, key, cos, sin = halves(table[3]), halves(table[4]), halves(table[5]), halves(table[6])
    _rotary(table, query, key, cos, sin, halves(table[7]), halves(table[8]))


@njit(error_model="numpy")
def _rotary(table, query, key, cos, sin, query_norm, key_norm):
    tokens, width, half, eps, unit_offset = table[1], table[2], table[15], f4(setting(table[17])), table[18]
    row = floats(scratch(table, 19))
    while True:
        first = take(table, _CHUNK)
        if first >= tokens:
            break
        for n in range(first, min(first + _CHUNK, tokens)):
            cosines, sines = beyond(cos, n * table[16]), beyond(sin, n * table[16])
            for head in range(table[9]):
                vector = beyond(query, n * table[11] + head * table[12])
                if table[7]:
                    _norm_head(vector, row, query_norm, eps, unit_offset, width)
                _turn(vector, cosines, sines, half)
            for head in range(table[10]):
                vector = beyond(key, n * table[13] + head * table[14])
                if table[8]:
                    _norm_head(vector, row, key_norm, eps, unit_offset, width)
                _turn(vector, cosines, sines, half)


@njit(error_model="numpy")
def _norm_head(vector, row, weight, eps, unit_offset, width):
    _copy(row, vector, width)
    inverse = f4(1.0) / np.sqrt(_square_sum(row, width) / f4(width) + eps)
    _scale(vector, row, weight, inverse, unit_offset, width)


@njit
def _turn(vector, cosines, sines, half):
    """Both products are rounded, then their sum: no contraction here."""
    for i in range(half):
        first, second, cosine, sine = load(vector, i), load(vector, half + i), load(cosines, i), load(sines, i)
        store(vector, i, rounded(vector, first * cosine) - rounded(vector, second * sine))
        store(vector, half + i, rounded(vector, second * cosine) + rounded(vector, first * sine))
