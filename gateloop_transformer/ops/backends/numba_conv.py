"""Kernels of the short convolution: one thread takes a block of the steps of one row of the batch.

T steps, L = T + TAPS - 1 inputs, D channels, TAPS taps; weights (TAPS, D).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import carray, njit

from gateloop_transformer.ops.backends.numba_cache import kernel
from gateloop_transformer.ops.backends.numba_gates import silu
from gateloop_transformer.ops.backends.numba_launch import HEADER
from gateloop_transformer.ops.backends.numba_scans import MAX_ARGUMENTS
from gateloop_transformer.ops.backends.numba_simd import F32, F64, ITEM_SIZE, fma, load, store, take_ticket, zeros

# Steps that one item takes; the weights' gradients are summed over them apart.
STEPS = 64
# BLOCKS: items of a row. G: gradients of the sums before the SiLU. SUMS: of the weights, for each item.
T, D, TAPS, BLOCKS, X, W, Y, DY, G, SUMS, DX = range(HEADER, HEADER + 11)


@njit
def _sum(p: Any, x: int, n: int, kind: Any, wide: Any, lanes: Any) -> Any:
    """Σ_i w[i] x[i], x being the address of the first input that a step sees."""
    result = zeros(wide, lanes)
    for tap in range(p[TAPS]):
        result = fma(load(x, tap * p[D] + n, kind, lanes), load(p[W], tap * p[D] + n, wide, lanes), result)
    return result


@kernel
def conv_forward(KIND: int, OUT: int, SILU: bool, LANES: int) -> Callable[[Any], None]:
    """y. KIND, OUT: how inputs and y lie in memory."""
    WIDE = F64 if F64 in (KIND, OUT) else F32

    @njit
    def step(p: Any, x: int, y: int, n: int, lanes: Any) -> None:
        value = _sum(p, x, n, KIND, WIDE, lanes)
        if SILU:
            value, _ = silu(value)
        store(y, n, value, OUT)

    def run(pointer: Any) -> None:
        p = carray(pointer, (MAX_ARGUMENTS,))
        while True:
            item = take_ticket(pointer, 0)
            if item >= p[2]:
                break
            b, first = item // p[BLOCKS], (item % p[BLOCKS]) * STEPS
            for t in range(first, min(first + STEPS, p[T])):
                x = p[X] + (b * (p[T] + p[TAPS] - 1) + t) * p[D] * ITEM_SIZE[KIND]
                y = p[Y] + (b * p[T] + t) * p[D] * ITEM_SIZE[OUT]
                n = 0
                while n + LANES <= p[D]:
                    step(p, x, y, n, LANES)
                    n += LANES
                while n < p[D]:
                    step(p, x, y, n, 1)
                    n += 1

    return run


@kernel
def conv_slopes(KIND: int, OUT: int, SILU: bool, LANES: int) -> Callable[[Any], None]:
    """Gradients of the sums before the SiLU (SILU; in the width of the arithmetic) and of the weights, per item."""
    WIDE = F64 if F64 in (KIND, OUT) else F32

    @njit
    def step(p: Any, x: int, dy: int, g: int, sums: int, n: int, lanes: Any) -> None:
        given = load(dy, n, OUT, lanes)
        if SILU:
            _, slope = silu(_sum(p, x, n, KIND, WIDE, lanes))
            given = given * slope
            store(g, n, given, WIDE)
        for tap in range(p[TAPS]):
            place = tap * p[D] + n
            store(sums, place, fma(given, load(x, place, KIND, lanes), load(sums, place, WIDE, lanes)), WIDE)

    def run(pointer: Any) -> None:
        p = carray(pointer, (MAX_ARGUMENTS,))
        while True:
            item = take_ticket(pointer, 0)
            if item >= p[2]:
                break
            b, first = item // p[BLOCKS], (item % p[BLOCKS]) * STEPS
            sums = p[SUMS] + item * p[TAPS] * p[D] * ITEM_SIZE[WIDE]
            for t in range(first, min(first + STEPS, p[T])):
                x = p[X] + (b * (p[T] + p[TAPS] - 1) + t) * p[D] * ITEM_SIZE[KIND]
                dy = p[DY] + (b * p[T] + t) * p[D] * ITEM_SIZE[OUT]
                g = p[G] + (b * p[T] + t) * p[D] * ITEM_SIZE[WIDE]
                n = 0
                while n + LANES <= p[D]:
                    step(p, x, dy, g, sums, n, LANES)
                    n += LANES
                while n < p[D]:
                    step(p, x, dy, g, sums, n, 1)
                    n += 1

    return run


@kernel
def conv_inputs(KIND: int, GIVEN: int, LANES: int) -> Callable[[Any], None]:
    """Gradients of the inputs; BLOCKS are of inputs here. GIVEN: how the gradients of the sums lie in memory."""
    WIDE = F64 if F64 in (KIND, GIVEN) else F32

    @njit
    def step(p: Any, g: int, dx: int, low: int, high: int, n: int, lanes: Any) -> None:
        result = zeros(WIDE, lanes)
        for tap in range(low, high):
            weight = load(p[W], tap * p[D] + n, WIDE, lanes)
            result = fma(load(g, n - tap * p[D], GIVEN, lanes), weight, result)
        store(dx, n, result, KIND)

    def run(pointer: Any) -> None:
        p = carray(pointer, (MAX_ARGUMENTS,))
        while True:
            item = take_ticket(pointer, 0)
            if item >= p[2]:
                break
            b, first, length = item // p[BLOCKS], (item % p[BLOCKS]) * STEPS, p[T] + p[TAPS] - 1
            for r in range(first, min(first + STEPS, length)):
                # Step r - tap saw input r by that tap, if there is such a step.
                low, high = max(r - p[T] + 1, 0), min(r + 1, p[TAPS])
                g = p[G] + (b * p[T] + r) * p[D] * ITEM_SIZE[GIVEN]
                dx = p[DX] + (b * length + r) * p[D] * ITEM_SIZE[KIND]
                n = 0
                while n + LANES <= p[D]:
                    step(p, g, dx, low, high, n, LANES)
                    n += LANES
                while n < p[D]:
                    step(p, g, dx, low, high, n, 1)
                    n += 1

    return run
