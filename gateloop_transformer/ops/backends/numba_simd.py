"""SIMD vectors inside Numba: a fixed number of lanes of float32 or float64, loaded from 16-, 32- or 64-bit memory.

Kernels written with these say what the processor does; nothing depends on whether a compiler finds a loop fit to be
vectorised. Memory is given as integer addresses. `kind` and `lanes` are compile-time constants.
"""

from __future__ import annotations

import operator
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, overload, register_model

from gateloop_transformer.ops.backends.numba_cache import processor

# How a number lies in memory.
F32, F64, BF16, F16 = range(4)
ITEM_SIZE = (4, 8, 2, 2)
_STORED = {F32: ir.FloatType(), F64: ir.DoubleType(), BF16: ir.IntType(16), F16: ir.HalfType()}
AVX512 = "avx512f" in processor()[2]
_I32, _I64 = ir.IntType(32), ir.IntType(64)


class Vector(types.Type):
    """`lanes` numbers of `bits` bits."""

    def __init__(self, bits: int, lanes: int) -> None:
        self.bits, self.lanes = bits, lanes
        super().__init__(name=f"vector({bits}, {lanes})")

    @property
    def element(self) -> ir.Type:
        """The LLVM type of one lane."""
        return ir.FloatType() if self.bits == 32 else ir.DoubleType()

    @property
    def llvm(self) -> ir.Type:
        """The LLVM type."""
        return ir.VectorType(self.element, self.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Vector) -> None:
        super().__init__(manager, fe_type, fe_type.llvm)


def _computed(kind: int, lanes: int) -> Vector:
    return Vector(64 if kind == F64 else 32, lanes)


def _constant(kind: Vector, value: float) -> ir.Constant:
    return ir.Constant(kind.llvm, [value] * kind.lanes)


def _splat(builder: Any, kind: Vector, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(kind.llvm, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, kind.lanes), [0] * kind.lanes))


def _call(builder: Any, name: str, kind: Vector, *arguments: Any) -> Any:
    """An LLVM intrinsic of vectors."""
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(kind.llvm, [kind.llvm] * len(arguments)),
        f"llvm.{name}.v{kind.lanes}f{kind.bits}",
    )
    return builder.call(function, arguments)


# ---- arithmetic ------------------------------------------------------------------------------------------


def _binary(operation: Any, instruction: str) -> None:
    @infer_global(operation)
    class _(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) != 2:
                return None
            left, right = args
            if isinstance(left, Vector) and isinstance(right, Vector | types.Float | types.Integer):
                return signature(left, left, left if isinstance(right, Vector) else types.float64)
            if isinstance(right, Vector) and isinstance(left, types.Float | types.Integer):
                return signature(right, types.float64, right)
            return None

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = sig.return_type
        parts = []
        for value, given in zip(args, sig.args, strict=True):
            if isinstance(given, Vector):
                parts.append(value)
            else:
                number = value if kind.bits == 64 else builder.fptrunc(value, kind.element)
                parts.append(_splat(builder, kind, number))
        return getattr(builder, instruction)(*parts)

    lower_builtin(operation, Vector, Vector)(lower)
    lower_builtin(operation, Vector, types.float64)(lower)
    lower_builtin(operation, types.float64, Vector)(lower)


for _operation, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _binary(_operation, _instruction)


@intrinsic
def fma(typingctx: Any, a: Vector, b: Vector, c: Vector) -> Any:
    """a·b + c with one rounding."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, "fma", sig.return_type, *args)

    return a(a, b, c), codegen


@intrinsic
def fms(typingctx: Any, a: Vector, b: Vector, c: Vector) -> Any:
    """c - a·b with one rounding."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, "fma", sig.return_type, builder.fneg(args[0]), args[1], args[2])

    return a(a, b, c), codegen


def _unary(name: str) -> Any:
    @intrinsic
    def function(typingctx: Any, x: Vector) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return _call(builder, name, sig.return_type, args[0])

        return x(x), codegen

    return function


sqrt = _unary("sqrt")
absolute = _unary("fabs")
_library_exp = _unary("exp")
_library_sin = _unary("sin")
_library_cos = _unary("cos")


@intrinsic
def full(typingctx: Any, like: Vector, value: Any) -> Any:
    """Every lane `value`, in the type of `like`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        number = context.cast(builder, args[1], sig.args[1], types.float64)
        kind = sig.return_type
        return _splat(builder, kind, number if kind.bits == 64 else builder.fptrunc(number, kind.element))

    return like(like, value), codegen


@intrinsic
def maximum(typingctx: Any, a: Vector, b: Vector) -> Any:
    """The larger of each lane; b where a is NaN."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[0], args[1])

    return a(a, b), codegen


@intrinsic
def where_less(typingctx: Any, x: Vector, limit: Any, yes: Vector, no: Vector) -> Any:
    """`yes` in the lanes where x < limit, else `no`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = sig.args[0]
        number = context.cast(builder, args[1], sig.args[1], types.float64)
        number = number if kind.bits == 64 else builder.fptrunc(number, kind.element)
        return builder.select(builder.fcmp_ordered("<", args[0], _splat(builder, kind, number)), args[2], args[3])

    return x(x, limit, x, x), codegen


@intrinsic
def total(typingctx: Any, x: Vector) -> Any:
    """The sum of the lanes as float64, added as a tree of fixed shape."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind, value = sig.args[0], args[0]
        lanes = kind.lanes
        while lanes > 1:
            half = lanes // 2
            order = [*range(half, lanes), *range(half)] + [0] * (kind.lanes - lanes)
            mask = ir.Constant(ir.VectorType(_I32, kind.lanes), order)
            value = builder.fadd(value, builder.shuffle_vector(value, value, mask))
            lanes = half
        number = builder.extract_element(value, _I32(0))
        return number if kind.bits == 64 else builder.fpext(number, ir.DoubleType())

    return types.float64(x), codegen


# ---- memory ----------------------------------------------------------------------------------------------


def _pointer(builder: Any, address: Any, index: Any, stored: ir.Type) -> Any:
    return builder.gep(builder.inttoptr(address, stored.as_pointer()), [index])


def _load(builder: Any, pointer: Any, kind: int, lanes: int) -> Any:
    stored = _STORED[kind]
    value = builder.load(builder.bitcast(pointer, ir.VectorType(stored, lanes).as_pointer()), align=ITEM_SIZE[kind])
    return _widened(builder, value, kind, lanes)


def _widened(builder: Any, value: Any, kind: int, lanes: int) -> Any:
    if kind == BF16:
        wide = builder.zext(value, ir.VectorType(_I32, lanes))
        wide = builder.shl(wide, ir.Constant(wide.type, [16] * lanes))
        return builder.bitcast(wide, ir.VectorType(ir.FloatType(), lanes))
    return builder.fpext(value, ir.VectorType(ir.FloatType(), lanes)) if kind == F16 else value


def _narrowed(builder: Any, value: Any, kind: int, lanes: int) -> Any:
    if kind == F16:
        return builder.fptrunc(value, ir.VectorType(ir.HalfType(), lanes))
    if kind != BF16:
        return value
    integers = ir.VectorType(_I32, lanes)

    def each(number: int) -> ir.Constant:
        return ir.Constant(integers, [number] * lanes)

    # Round to nearest, ties to even; a NaN stays one.
    bits = builder.bitcast(value, integers)
    odd = builder.and_(builder.lshr(bits, each(16)), each(1))
    rounded = builder.lshr(builder.add(builder.add(bits, each(0x7FFF)), odd), each(16))
    rounded = builder.select(builder.fcmp_unordered("uno", value, value), each(0x7FC0), rounded)
    return builder.trunc(rounded, ir.VectorType(ir.IntType(16), lanes))


def _store(builder: Any, value: Any, pointer: Any, kind: int, lanes: int) -> None:
    value = _narrowed(builder, value, kind, lanes)
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=ITEM_SIZE[kind])


@intrinsic(prefer_literal=True)
def load(typingctx: Any, address: Any, index: Any, kind: Any, lanes: Any) -> Any:
    """`lanes` numbers of `kind`, from the index-th after `address` on."""
    memory, count = kind.literal_value, lanes.literal_value

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _load(builder, _pointer(builder, args[0], args[1], _STORED[memory]), memory, count)

    return _computed(memory, count)(types.int64, types.int64, kind, lanes), codegen


@intrinsic(prefer_literal=True)
def gather(typingctx: Any, address: Any, index: Any, stride: Any, kind: Any, lanes: Any) -> Any:
    """As `load`, for numbers `stride` apart; `index` counts numbers, not places in memory."""
    memory, count = kind.literal_value, lanes.literal_value
    stored = _STORED[memory]

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(builder, args[0], builder.mul(args[1], args[2]), stored)
        value = ir.Constant(ir.VectorType(stored, count), ir.Undefined)
        for lane in range(count):
            place = builder.gep(pointer, [builder.mul(args[2], _I64(lane))])
            value = builder.insert_element(value, builder.load(place), _I32(lane))
        return _widened(builder, value, memory, count)

    return _computed(memory, count)(types.int64, types.int64, types.int64, kind, lanes), codegen


@intrinsic(prefer_literal=True)
def store(typingctx: Any, address: Any, index: Any, value: Any, kind: Any) -> Any:
    """Write all lanes of `value` as numbers of `kind`."""
    memory = kind.literal_value

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(builder, args[0], args[1], _STORED[memory])
        _store(builder, args[2], pointer, memory, sig.args[2].lanes)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, value, kind), codegen


@intrinsic(prefer_literal=True)
def load_pairs(typingctx: Any, address: Any, index: Any, kind: Any, lanes: Any) -> Any:
    """`lanes` neighbouring pairs as two vectors: the first of each pair, the second of each."""
    memory, count = kind.literal_value, lanes.literal_value
    vector = _computed(memory, count)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(builder, args[0], builder.mul(args[1], _I64(2)), _STORED[memory])
        low = _load(builder, pointer, memory, count)
        high = _load(builder, builder.gep(pointer, [_I64(count)]), memory, count)
        parts = [
            builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, count), list(range(first, 2 * count, 2))))
            for first in (0, 1)
        ]
        return context.make_tuple(builder, sig.return_type, parts)

    return types.UniTuple(vector, 2)(types.int64, types.int64, kind, lanes), codegen


@intrinsic(prefer_literal=True)
def store_pairs(typingctx: Any, address: Any, index: Any, first: Any, second: Any, kind: Any) -> Any:
    """Write first and second of each pair next to each other."""
    memory, count = kind.literal_value, first.lanes

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(builder, args[0], builder.mul(args[1], _I64(2)), _STORED[memory])
        order = [lane for pair in zip(range(count), range(count, 2 * count), strict=True) for lane in pair]
        for half in (0, 1):
            mask = ir.Constant(ir.VectorType(_I32, count), order[half * count : (half + 1) * count])
            value = builder.shuffle_vector(args[2], args[3], mask)
            _store(builder, value, builder.gep(pointer, [_I64(half * count)]), memory, count)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, first, first, kind), codegen


@intrinsic(prefer_literal=True)
def spread(typingctx: Any, address: Any, index: Any, kind: Any, lanes: Any) -> Any:
    """One number of `kind` in every lane."""
    memory, vector = kind.literal_value, _computed(kind.literal_value, lanes.literal_value)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = builder.load(_pointer(builder, args[0], args[1], _STORED[memory]))
        one = builder.insert_element(ir.Constant(ir.VectorType(value.type, 1), ir.Undefined), value, _I32(0))
        number = builder.extract_element(_widened(builder, one, memory, 1), _I32(0))
        return _splat(builder, vector, number)

    return vector(types.int64, types.int64, kind, lanes), codegen


@intrinsic(prefer_literal=True)
def multiply_tile(
    typingctx: Any,
    a: Any,
    a_row: Any,
    a_step: Any,
    b: Any,
    b_step: Any,
    c: Any,
    c_row: Any,
    depth: Any,
    add: Any,
    rows: Any,
    vectors: Any,
    kind: Any,
    lanes: Any,
) -> Any:
    """C (+)= A B for `rows` rows and `vectors` vectors of columns, all sums held in registers.

    A[i, l] lies at a + i·a_row + l·a_step, B[l, :] at b + l·b_step, C[i, :] at c + i·c_row, counted in numbers.
    """
    vector = _computed(kind.literal_value, lanes.literal_value)
    size, R, N, L = ITEM_SIZE[kind.literal_value], rows.literal_value, vectors.literal_value, lanes.literal_value

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a, a_row, a_step, b, b_step, c, c_row, depth, add = args[:9]

        def place(base: Any, *terms: Any) -> Any:
            pointer = builder.inttoptr(base, vector.element.as_pointer())
            for term in terms:
                pointer = builder.gep(pointer, [term])
            return pointer

        def whole(pointer: Any) -> Any:
            return builder.bitcast(pointer, vector.llvm.as_pointer())

        targets = [[place(c, builder.mul(c_row, _I64(i)), _I64(n * L)) for n in range(N)] for i in range(R)]
        sums = [[cgutils.alloca_once(builder, vector.llvm) for _ in range(N)] for _ in range(R)]
        with builder.if_else(builder.icmp_signed("!=", add, _I64(0))) as (then, otherwise):
            with then:
                for i in range(R):
                    for n in range(N):
                        builder.store(builder.load(whole(targets[i][n]), align=size), sums[i][n])
            with otherwise:
                for i in range(R):
                    for n in range(N):
                        builder.store(_constant(vector, 0.0), sums[i][n])
        with cgutils.for_range(builder, depth, intp=_I64) as loop:
            step = loop.index
            right = [
                builder.load(whole(place(b, builder.mul(step, b_step), _I64(n * L))), align=size) for n in range(N)
            ]
            for i in range(R):
                left = builder.load(place(a, builder.mul(a_row, _I64(i)), builder.mul(step, a_step)))
                left = _splat(builder, vector, left)
                for n in range(N):
                    builder.store(_call(builder, "fma", vector, left, right[n], builder.load(sums[i][n])), sums[i][n])
        for i in range(R):
            for n in range(N):
                builder.store(builder.load(sums[i][n]), whole(targets[i][n]), align=size)
        return context.get_dummy_value()

    numbers = [types.int64] * 9
    return types.none(*numbers, rows, vectors, kind, lanes), codegen


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Have the line of memory at `address`, which need not exist, brought to the cache."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(fetch, [pointer, _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.none(types.int64), codegen


@intrinsic
def take_ticket(typingctx: Any, arguments: Any, place: Any) -> Any:
    """The integer at `place` of the arguments before this adds one to it, as one indivisible step."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), _I64(1), "monotonic")

    return types.int64(types.CPointer(types.int64), types.int64), codegen


@intrinsic
def real_number(typingctx: Any, bits: Any) -> Any:
    """The float64 whose bits are this integer."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), codegen


@intrinsic
def byte(typingctx: Any, address: Any) -> Any:
    """The byte at an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = builder.load(builder.inttoptr(args[0], ir.IntType(8).as_pointer()))
        return builder.zext(value, ir.IntType(64))

    return types.int64(types.int64), codegen


@intrinsic(prefer_literal=True)
def zeros(typingctx: Any, kind: Any, lanes: Any) -> Any:
    """A vector of zeros in the precision that numbers of `kind` are computed in."""
    vector = _computed(kind.literal_value, lanes.literal_value)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _constant(vector, 0.0)

    return vector(kind, lanes), codegen


# ---- elementary functions --------------------------------------------------------------------------------


@intrinsic
def _quadrant(typingctx: Any, x: Vector) -> Any:
    """x (float32) less the nearest multiple of π/2, taken in float64, and that multiple modulo 4."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = sig.args[0]
        wide = Vector(64, kind.lanes)
        value = builder.fpext(args[0], wide.llvm)
        turns = _call(builder, "rint", wide, builder.fmul(value, _constant(wide, 0.6366197723675814)))
        rest = _call(builder, "fma", wide, turns, _constant(wide, -1.5707963267948966), value)
        rest = _call(builder, "fma", wide, turns, _constant(wide, -6.123233995736766e-17), rest)
        # Whole turns leave the count before it becomes an integer: it may be large.
        whole = _call(builder, "floor", wide, builder.fmul(turns, _constant(wide, 0.25)))
        quarter = _call(builder, "fma", wide, whole, _constant(wide, -4.0), turns)
        parts = [builder.fptrunc(rest, kind.llvm), builder.fptrunc(quarter, kind.llvm)]
        return context.make_tuple(builder, sig.return_type, parts)

    return types.UniTuple(x, 2)(x), codegen


@intrinsic
def _power_of_two(typingctx: Any, x: Vector, mantissa: Vector) -> Any:
    """mantissa · 2^n for float32, where x is n + 1.5·2^23: its last bits are those of n."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = sig.return_type
        integers = ir.VectorType(_I32, kind.lanes)
        shift = ir.Constant(integers, [23] * kind.lanes)
        exponent = builder.shl(builder.bitcast(args[0], integers), shift)
        return builder.bitcast(builder.add(builder.bitcast(args[1], integers), exponent), kind.llvm)

    return x(x, mantissa), codegen


def decay(x: Any) -> Any:
    """e^-x for x ≥ -80, for sigmoids: its relative error is 2 ulp where it is near 1 and grows with x. NaN for NaN."""
    raise NotImplementedError("inside Numba only")


@overload(decay)
def _decay(x: Any) -> Any:
    return _decay64 if x.bits == 64 else _decay32


def _decay64(x: Any) -> Any:
    return _library_exp(0.0 - x)


def _decay32(x: Any) -> Any:
    less = 0.0 - x
    t = where_less(less, -87.0, full(x, -87.0), less) * 1.4426950408889634
    n = t + 12582912.0
    f = t - (n - 12582912.0)
    square = f * f
    low = fma(full(x, 0.24022650718688965), square, fma(full(x, 0.6931471824645996), f, full(x, 1.0)))
    high = fma(full(x, 0.009618354961276054), f, full(x, 0.05550340190529823))
    top = fma(full(x, 0.00015469732752535492), f, full(x, 0.0013398866271600127))
    high = fma(top, square, high)
    return _power_of_two(n, fma(high, square * f, low))


@intrinsic
def inverse_sqrt(typingctx: Any, x: Vector) -> Any:
    """1/√x within 2 ulp for normal x."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind, value = sig.return_type, args[0]
        if not (AVX512 and kind.bits == 32 and kind.lanes == 16):
            return builder.fdiv(_constant(kind, 1.0), _call(builder, "sqrt", kind, value))
        mask = ir.IntType(16)
        name = "llvm.x86.avx512.rsqrt14.ps.512"
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(kind.llvm, [kind.llvm, kind.llvm, mask]), name
        )
        guess = builder.call(function, [value, value, mask(0xFFFF)])
        # One step of Newton: from 14 bits to all.
        half = builder.fmul(builder.fmul(value, guess), guess)
        rest = _call(builder, "fma", kind, half, _constant(kind, -0.5), _constant(kind, 0.5))
        return _call(builder, "fma", kind, guess, rest, guess)

    return x(x), codegen


def _all(builder: Any, kind: Vector, flags: Any) -> Any:
    """Whether all lanes of a comparison are true."""
    bits = ir.IntType(kind.lanes)
    return builder.icmp_unsigned("==", builder.bitcast(flags, bits), bits((1 << kind.lanes) - 1))


@intrinsic
def all_above(typingctx: Any, x: Vector, low: Any) -> Any:
    """Whether low < x in every lane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = sig.args[0]
        number = context.cast(builder, args[1], sig.args[1], types.float64)
        number = number if kind.bits == 64 else builder.fptrunc(number, kind.element)
        return _all(builder, kind, builder.fcmp_ordered(">", args[0], _splat(builder, kind, number)))

    return types.boolean(x, low), codegen


@intrinsic
def all_between(typingctx: Any, x: Vector, low: Any, high: Any) -> Any:
    """Whether low < x < high in every lane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = sig.args[0]

        def each(number: Any, given: Any) -> Any:
            number = context.cast(builder, number, given, types.float64)
            return _splat(builder, kind, number if kind.bits == 64 else builder.fptrunc(number, kind.element))

        inside = builder.and_(
            builder.fcmp_ordered(">", args[0], each(args[1], sig.args[1])),
            builder.fcmp_ordered("<", args[0], each(args[2], sig.args[2])),
        )
        return _all(builder, kind, inside)

    return types.boolean(x, low, high), codegen


def sine_cosine(x: Any) -> Any:
    """(sin x, cos x) for x in radians; float32 is reduced in float64, so that long phases keep their digits."""
    raise NotImplementedError("inside Numba only")


@overload(sine_cosine)
def _sine_cosine(x: Any) -> Any:
    return _sine_cosine64 if x.bits == 64 else _sine_cosine32


def _sine_cosine64(x: Any) -> Any:
    return _library_sin(x), _library_cos(x)


def _sine_cosine32(x: Any) -> Any:
    r, quarter = _quadrant(x)
    square = r * r
    s = fma(full(x, -1.9515295891e-4), square, full(x, 8.3321608736e-3))
    s = fma(fma(s, square, full(x, -1.6666654611e-1)), square * r, r)
    c = fma(full(x, 2.443315711809948e-5), square, full(x, -1.388731625493765e-3))
    c = fma(c, square, full(x, 4.166664568298827e-2))
    c = fma(c, square * square, fms(full(x, 0.5), square, full(x, 1.0)))
    odd = absolute(absolute(quarter - 2.0) - 1.0)
    sine, cosine = where_less(odd, 0.5, c, s), where_less(odd, 0.5, s, c)
    sine = where_less(quarter, 1.5, sine, 0.0 - sine)
    return sine, where_less(absolute(quarter - 1.5), 1.0, 0.0 - cosine, cosine)
