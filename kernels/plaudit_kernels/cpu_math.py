"""What the fused CPU kernels are made of, compiled by Numba: typed memory, bf16, exp, and a small matrix product.

`memory` below is an address with a type: of float32, or of uint16 that hold bf16. Kernels are written once and compiled
for either. Products accumulate in fp32 by fused multiply-add in one fixed order, each lane for itself: the bits of a
lane do not depend on what lies in the others.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

LANES = 16
"""Columns of the small product: two AVX2 registers, one of AVX-512."""

ROWS = 4
"""Rows of it. 4 x 16 sums stay in registers and hide the latency of the multiply-add."""

f4 = np.float32

_FLOATS = types.CPointer(types.float32)
_HALVES = types.CPointer(types.uint16)
_TABLE = types.CPointer(types.int64)
_SIGNED = types.CPointer(types.int32)


def _address(pointer):
    @intrinsic
    def cast(typing, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(pointer))

        return pointer(types.int64), generate

    return cast


floats, halves, integers, signed = _address(_FLOATS), _address(_HALVES), _address(_TABLE), _address(_SIGNED)


@intrinsic
def take(typing, table, count):
    """The next `count` pieces of work: the number of the first. Each is given to one thread."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", arguments[0], arguments[1], "monotonic")

    return types.int64(_TABLE, types.int64), generate


@njit
def scratch(table, slot):
    """The address of this thread's memory, of which `launch` wrote address, words and count of threads from `slot` on.
    To be asked for once a thread."""
    return table[slot] + 4 * table[slot + 1] * take(beyond(table, slot + 2), 1)


def _bitcast(result, argument):
    @intrinsic
    def cast(typing, value):
        def generate(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], context.get_value_type(result))

        return result(argument), generate

    return cast


bits_of = _bitcast(types.uint32, types.float32)
float_of = _bitcast(types.float32, types.uint32)
setting = _bitcast(types.float64, types.int64)
"""A float64 of the table from its slot."""


@intrinsic
def beyond(typing, pointer, count):
    """The address `count` elements further."""

    def generate(context, builder, signature, arguments):
        return builder.gep(arguments[0], [arguments[1]])

    return pointer(pointer, types.int64), generate


def rounded(memory, value):
    """`value` as it would be if it were stored in `memory` and loaded again."""


def load(memory, place):
    """Element `place` of `memory`, fp32."""


def store(memory, place, value):
    """Write fp32 `value` to element `place`, rounded to nearest even."""


@njit
def _to_bf16(value):
    bits = bits_of(value)
    return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@overload(rounded)
def _rounded(memory, value):
    if memory == _FLOATS:
        return lambda memory, value: value
    return lambda memory, value: float_of(_to_bf16(value) << np.uint32(16))


@overload(load)
def _load(memory, place):
    if memory == _FLOATS:
        return lambda memory, place: memory[place]
    return lambda memory, place: float_of(np.uint32(memory[place]) << np.uint32(16))


@overload(store)
def _store(memory, place, value):
    def write_float(memory, place, value):
        memory[place] = value

    def write_half(memory, place, value):
        memory[place] = np.uint16(_to_bf16(value))

    return write_float if memory == _FLOATS else write_half


_ROUND = f4(12582912.0)
"""1.5 * 2^23: adding and taking it away leaves a number rounded to an integer, which is then in its lowest bits."""


@njit
def exp(x):
    """e^x for x <= 88, within 2 units of the last place; below -87 it is e^-87, about 1.6e-38. The range is reduced to
    +-ln(2)/2, where the polynomial of Cephes' expf holds."""
    x = max(x, f4(-87.0))
    shifted = x * f4(1.44269504088896341) + _ROUND
    n = shifted - _ROUND
    r = x - n * f4(0.693359375)
    r = r - n * f4(-2.12194440e-4)
    p = f4(1.9875691500e-4)
    p = p * r + f4(1.3981999507e-3)
    p = p * r + f4(8.3334519073e-3)
    p = p * r + f4(4.1665795894e-2)
    p = p * r + f4(1.6666665459e-1)
    p = p * r + f4(5.0000001201e-1)
    power = (bits_of(shifted) - bits_of(_ROUND) + np.uint32(127)) << np.uint32(23)
    return (p * (r * r) + r + f4(1.0)) * float_of(power)


@njit
def exp2(x):
    """2^x for x <= 127, within 2 units of the last place; below -126 it is 2^-126. Polynomial of Cephes' exp2f."""
    x = max(x, f4(-126.0))
    shifted = x + _ROUND
    r = x - (shifted - _ROUND)
    p = f4(1.535336188319500e-4)
    p = p * r + f4(1.339887440266574e-3)
    p = p * r + f4(9.618437357674640e-3)
    p = p * r + f4(5.550332471162809e-2)
    p = p * r + f4(2.402264791363012e-1)
    p = p * r + f4(6.931472028550421e-1)
    power = (bits_of(shifted) - bits_of(_ROUND) + np.uint32(127)) << np.uint32(23)
    return (p * r + f4(1.0)) * float_of(power)


@intrinsic
def _multiply(typing, c, a, b, depth, width, row_step, depth_step):
    """c[n * width + lane] += sum over k of b[n * row_step + k * depth_step] * a[k * width + lane], for ROWS n and
    LANES lanes. Written in LLVM's own language, since the sums must stay in registers over the loop."""

    def generate(context, builder, signature, arguments):
        c, a, b, depth, width, row_step, depth_step = arguments
        vector = ir.VectorType(ir.FloatType(), LANES)
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{LANES}f32"
        )
        nothing, first = ir.Constant(vector, ir.Undefined), ir.Constant(ir.IntType(32), 0)
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        number = ir.IntType(64)

        def place(pointer, index):
            return builder.bitcast(builder.gep(pointer, [index]), vector.as_pointer())

        def read(pointer, index):
            value = builder.load(place(pointer, index))
            value.align = 4
            return value

        sums = []
        for n in range(ROWS):
            sums.append(cgutils.alloca_once(builder, vector))
            builder.store(read(c, builder.mul(number(n), width)), sums[n])
        with cgutils.for_range(builder, depth) as loop:
            lanes = read(a, builder.mul(loop.index, width))
            column = builder.mul(loop.index, depth_step)
            for n, total in enumerate(sums):
                one = builder.load(builder.gep(b, [builder.add(column, builder.mul(number(n), row_step))]))
                spread = builder.shuffle_vector(builder.insert_element(nothing, one, first), nothing, everywhere)
                builder.store(builder.call(fma, [spread, lanes, builder.load(total)]), total)
        for n, total in enumerate(sums):
            builder.store(builder.load(total), place(c, builder.mul(number(n), width))).align = 4
        return context.get_dummy_value()

    step = types.int64
    return types.void(_FLOATS, _FLOATS, _FLOATS, step, step, step, step), generate


@njit
def add_product(c, a, b, rows, depth, width, row_step, depth_step):
    """c (rows, width) += B (rows, depth) @ a (depth, width); a and c lie row by row, element (n, k) of B lies at
    n * row_step + k * depth_step. rows a multiple of ROWS, width of LANES; all fp32."""
    for n in range(0, rows, ROWS):
        for lane in range(0, width, LANES):
            _multiply(
                beyond(c, n * width + lane), beyond(a, lane), beyond(b, n * row_step),
                depth, width, row_step, depth_step,
            )  # fmt: skip
