"""Products of bf16 numbers two at a time, for CPUs that have the instruction (AVX-512 BF16): twice the rate of fp32.

A pair is a uint32 of two bf16: that of even depth in its lower half. An instruction multiplies 16 pairs by 16 pairs,
exactly, and adds both products to 16 sums in fp32; subnormal numbers count as 0.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .cpu_math import _FLOATS, LANES, ROWS, _address, beyond, bits_of, float_of

_PAIRS = types.CPointer(types.uint32)
pairs = _address(_PAIRS)


@cache
def multiplies_pairs() -> bool:
    """Whether this CPU has the instruction, and the compiler knows."""
    return bool(binding.get_host_cpu_features().get("avx512bf16"))


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bf16, which llvmlite has no name for."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def _dot(vectors: int, accumulate: bool):
    """c[n * width + lane] = factor * sum over k of b[n * row_step + k * depth_step] * a[k * width + lane], for ROWS n
    and `vectors` times LANES lanes; a product of pairs is the sum of two. With `accumulate` c grows by it."""

    @intrinsic
    def multiply(typing, c, a, b, depth, width, row_step, depth_step, factor):
        def generate(context, builder, signature, arguments):
            c, a, b, depth, width, row_step, depth_step, factor = arguments
            number, sums_type = ir.IntType(64), ir.VectorType(ir.FloatType(), LANES)
            lanes_type, pairs_type = ir.VectorType(ir.IntType(32), LANES), ir.VectorType(_BFloat(), 2 * LANES)
            dot = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(sums_type, [sums_type, pairs_type, pairs_type]),
                "llvm.x86.avx512bf16.dpbf16ps.512",
            )  # fmt: skip

            def spread(value):
                vector = ir.VectorType(value.type, LANES)
                first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
                return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(lanes_type, None))

            def place(pointer, index, kind):
                return builder.bitcast(builder.gep(pointer, [index]), kind.as_pointer())

            def line(n, v):
                return place(c, builder.add(builder.mul(number(n), width), number(v * LANES)), sums_type)

            cells = [(n, v) for n in range(ROWS) for v in range(vectors)]
            sums = {cell: cgutils.alloca_once(builder, sums_type) for cell in cells}
            for cell, total in sums.items():
                builder.store(builder.load(line(*cell), align=4) if accumulate else ir.Constant(sums_type, None), total)
            with cgutils.for_range(builder, depth) as loop:
                row, column = builder.mul(loop.index, width), builder.mul(loop.index, depth_step)
                lanes = [
                    builder.load(place(a, builder.add(row, number(v * LANES)), lanes_type), align=4)
                    for v in range(vectors)
                ]
                for n in range(ROWS):
                    one = builder.load(builder.gep(b, [builder.add(column, builder.mul(number(n), row_step))]), align=2)
                    both = builder.bitcast(spread(one), pairs_type)
                    for v in range(vectors):
                        total = sums[n, v]
                        other = builder.bitcast(lanes[v], pairs_type)
                        builder.store(builder.call(dot, [builder.load(total), other, both]), total)
            for cell, total in sums.items():
                value = builder.load(total)
                value = value if accumulate else builder.fmul(value, spread(factor))
                builder.store(value, line(*cell), align=4)
            return context.get_dummy_value()

        step = types.int64
        return types.void(_FLOATS, _PAIRS, _PAIRS, step, step, step, step, types.float32), generate

    return multiply


def _product(accumulate: bool):
    """c (rows, width) = factor * B (rows, depth) @ a (depth, width) over `depth` pairs; with `accumulate` it is added,
    without the factor. a and c lie row by row, pair (n, k) of B lies at n * row_step + k * depth_step. rows is a
    multiple of ROWS, width of LANES."""
    narrow, wide = _dot(1, accumulate), _dot(2, accumulate)

    @njit
    def product(c, a, b, rows, depth, width, row_step, depth_step, factor):
        for n in range(0, rows, ROWS):
            line, row = beyond(c, n * width), beyond(b, n * row_step)
            for lane in range(0, width // (2 * LANES) * 2 * LANES, 2 * LANES):
                wide(beyond(line, lane), beyond(a, lane), row, depth, width, row_step, depth_step, factor)
            if width % (2 * LANES):
                last = width - LANES
                narrow(beyond(line, last), beyond(a, last), row, depth, width, row_step, depth_step, factor)

    return product


multiply_pairs, add_pairs = _product(False), _product(True)


@njit
def pair_of(low, high):
    """The pair of two fp32 >= 0, each rounded to bf16 (half away from zero)."""
    half = np.uint32(0x8000)
    return ((bits_of(low) + half) >> np.uint32(16)) | ((bits_of(high) + half) & np.uint32(0xFFFF0000))


@njit
def low_of(pair):
    """The lower number of a pair, fp32."""
    return float_of(pair << np.uint32(16))


@njit
def high_of(pair):
    """The higher number of a pair, fp32."""
    return float_of(pair & np.uint32(0xFFFF0000))
