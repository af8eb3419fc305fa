"""Explicit vectors for compiled loops: one value of type `Vector` is WIDTH neighbouring numbers in registers.

A loop written with them needs no luck with the compiler's own vectoriser, which gives up, or checks all pairs of arrays
for overlap, in loops that touch more than a few. Arithmetic (+ - * /) works between vectors and with a number.

Numba's cache on disk watches the file of a loop only: touch the loops' files after a change here.

Arrays are addressed by the flat offset of the first element; they must be C-contiguous. Nothing checks bounds.
"""

from __future__ import annotations

import math
import operator
from fractions import Fraction
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

WIDTH = 16  # of float32: one 512-bit register or two of 256; a cache line


class Vector(types.Type):
    """WIDTH numbers of type `element`."""

    def __init__(self, element: types.Float) -> None:
        self.element = element
        super().__init__(name=f"Vector({element} x {WIDTH})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        element = ir.FloatType() if vector.element == types.float32 else ir.DoubleType()
        super().__init__(manager, vector, ir.VectorType(element, WIDTH))


def _pointer(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
    """Address of a vector from an (array, offset) pair."""
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    element = context.get_value_type(signature.args[0].dtype)
    address = builder.gep(array.data, [arguments[1]])
    return builder.bitcast(address, ir.VectorType(element, WIDTH).as_pointer())


def _alignment(array: types.Array) -> int:
    return array.dtype.bitwidth // 8


@intrinsic
def load(typing_context: Any, array: Any, offset: Any) -> Any:
    """The vector at a flat offset of a contiguous array."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return builder.load(_pointer(context, builder, signature, arguments), align=_alignment(array))

    return Vector(array.dtype)(array, types.intp), emit


@intrinsic
def store(typing_context: Any, array: Any, offset: Any, vector: Any) -> Any:
    """Write a vector at a flat offset of a contiguous array."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        builder.store(arguments[2], _pointer(context, builder, signature, arguments[:2]), align=_alignment(array))
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), emit


@intrinsic
def prefetch(typing_context: Any, array: Any, offset: Any) -> Any:
    """Ask for the cache line at a flat offset, which may lie beyond the array's end."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = builder.module.globals.get("llvm.prefetch.p0") or ir.Function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag]), "llvm.prefetch.p0"
        )
        address = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        builder.call(function, [address, *(ir.Constant(flag, value) for value in (0, 3, 1))])  # read, keep, data
        return context.get_dummy_value()

    return types.void(array, types.intp), emit


@intrinsic
def pick(typing_context: Any, array: Any, offset: Any) -> Any:
    """The number at a flat offset of a contiguous array."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load(builder.gep(data, [arguments[1]]))

    return array.dtype(array, types.intp), emit


@intrinsic
def put(typing_context: Any, array: Any, offset: Any, number: Any) -> Any:
    """Write a number at a flat offset of a contiguous array."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        builder.store(arguments[2], builder.gep(data, [arguments[1]]))
        return context.get_dummy_value()

    return types.void(array, types.intp, array.dtype), emit


@intrinsic
def load_from(typing_context: Any, addresses: Any, index: Any, like: Any, offset: Any) -> Any:
    """The vector at a flat offset of the array at addresses[index] (int64), which has the dtype of the array `like`."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        table = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.load(builder.gep(table.data, [arguments[1]]))
        element = context.get_value_type(like.dtype)
        address = builder.gep(builder.inttoptr(address, element.as_pointer()), [arguments[3]])
        pointer = builder.bitcast(address, ir.VectorType(element, WIDTH).as_pointer())
        return builder.load(pointer, align=_alignment(like))

    return Vector(like.dtype)(addresses, types.intp, like, types.intp), emit


@intrinsic
def spread(typing_context: Any, number: Any) -> Any:
    """The vector that holds one number everywhere."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return _spread(builder, arguments[0])

    return Vector(number)(number), emit


def _spread(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
    empty = ir.Constant(ir.VectorType(number.type, WIDTH), ir.Undefined)
    one = builder.insert_element(empty, number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, empty, ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH))


@intrinsic
def total(typing_context: Any, vector: Any) -> Any:
    """The sum of a vector's numbers, by halves."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        value, width = arguments[0], WIDTH
        while width > 1:
            width //= 2
            halves = (
                builder.shuffle_vector(
                    value, value, ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(start, start + width)))
                )
                for start in (0, width)
            )
            value = builder.fadd(*halves)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return vector.element(vector), emit


_LOG_2 = Fraction("0.693147180559945309417232121458176568")

# Per element: bits of the mantissa, bits of the whole, the exponent's bias, limits of x, terms of the series.
_FORMATS = {
    types.float32: (23, 32, 127, (-87.33, 88.37), 8),
    types.float64: (52, 64, 1023, (-708.39, 709.43), 14),
}


def _multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a b + c, fused where the processor can."""
    bits = 32 if isinstance(a.type.element, ir.FloatType) else 64
    name = f"llvm.fmuladd.v{WIDTH}f{bits}"
    kinds = ir.FunctionType(a.type, [a.type] * 3)
    function = builder.module.globals.get(name) or ir.Function(builder.module, kinds, name)
    return builder.call(function, (a, b, c))


@intrinsic
def exp(typing_context: Any, vector: Any) -> Any:
    """e^x, to about one unit in the last place; x is clamped to where the result is a normal number, NaN stays NaN.

    x = k ln 2 + r with |r| <= ln(2) / 2; e^r by its Taylor series; 2^k by putting k into the exponent's bits.
    """
    mantissa, bits, bias, limits, terms = _FORMATS[vector.element]

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        x = arguments[0]
        floats, integers = x.type, ir.VectorType(ir.IntType(bits), WIDTH)

        def number(constant: float) -> ir.Constant:
            return ir.Constant(floats, [constant] * WIDTH)

        def integer(constant: int) -> ir.Constant:
            return ir.Constant(integers, [constant] * WIDTH)

        for comparison, limit in zip("<>", limits, strict=True):
            x = builder.select(builder.fcmp_ordered(comparison, x, number(limit)), number(limit), x)
        # Adding 1.5 * 2^mantissa leaves the rounded integer in the low bits, without a conversion that NaN would break.
        magic = number(1.5 * 2.0**mantissa)
        shifted = _multiply_add(builder, x, number(1 / math.log(2)), magic)
        k = builder.fsub(shifted, magic)
        # ln 2 in two parts; the first is short, so that its product with k is exact.
        short = round(math.log(2) * 2 ** (mantissa // 2)) / 2 ** (mantissa // 2)
        rest = float(_LOG_2 - Fraction(short))
        r = _multiply_add(builder, k, number(-short), x)
        r = _multiply_add(builder, k, number(-rest), r)
        series = number(1 / math.factorial(terms - 1))
        for power in reversed(range(terms - 1)):
            series = _multiply_add(builder, series, r, number(1 / math.factorial(power)))
        exponent = builder.shl(builder.bitcast(shifted, integers), integer(mantissa))
        power_of_two = builder.bitcast(builder.add(exponent, integer(bias << mantissa)), floats)
        return builder.fmul(series, power_of_two)

    return vector(vector), emit


class _Arithmetic(AbstractTemplate):
    """Types of an operator with a vector on one side and the same vector type, or its element, on the other."""

    def generic(self, args: Any, kws: Any) -> Any:
        vectors = [x for x in args if isinstance(x, Vector)]
        if vectors and all(x in (vectors[0], vectors[0].element) for x in args):
            return signature(vectors[0], *args)
        return None


def _define(operation: Any, instruction: str) -> None:
    """Give vectors one arithmetic operator."""
    infer_global(operation)(type("_Operator", (_Arithmetic,), {"key": operation}))

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        sides = (
            value if isinstance(kind, Vector) else _spread(builder, value)
            for kind, value in zip(signature.args, arguments, strict=True)
        )
        return getattr(builder, instruction)(*sides)

    for sides in ((Vector, Vector), (Vector, types.Float), (types.Float, Vector)):
        lower_builtin(operation, *sides)(emit)


_define(operator.add, "fadd")
_define(operator.sub, "fsub")
_define(operator.mul, "fmul")
_define(operator.truediv, "fdiv")
