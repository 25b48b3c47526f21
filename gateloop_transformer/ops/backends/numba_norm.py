"""Kernels of the RMS norm: one thread takes a block of rows; sums over rows are added block by block, in order.

R rows, D channels; rows take the G rows of gamma in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import carray, njit

from gateloop_transformer.ops.backends.numba_cache import kernel
from gateloop_transformer.ops.backends.numba_launch import HEADER
from gateloop_transformer.ops.backends.numba_scans import MAX_ARGUMENTS
from gateloop_transformer.ops.backends.numba_simd import (
    F32,
    F64,
    ITEM_SIZE,
    fma,
    full,
    load,
    maximum,
    sqrt,
    store,
    take_ticket,
    total,
    zeros,
)

# Rows that one item takes; gamma's gradient is summed over them apart.
ROWS = 64
R, D, G, X, GAMMA, Y, DY, DX, DGAMMA = range(HEADER, HEADER + 9)
# The original's limit on a norm that is divided by.
_TINY = 1e-12


@njit
def _square_sum(x: int, kind: Any, wide: Any, lanes: Any, count: int) -> Any:
    """Σ x², one lane."""
    sums, n = zeros(wide, lanes), 0
    while n + lanes <= count:
        value = load(x, n, kind, lanes)
        sums = fma(value, value, sums)
        n += lanes
    result = zeros(wide, 1) + total(sums)
    while n < count:
        value = load(x, n, kind, 1)
        result = fma(value, value, result)
        n += 1
    return result


@njit
def _scale(norm: Any, count: int) -> Any:
    """√D / max(‖x‖, 1e-12)."""
    return total(sqrt(full(norm, float(count))) / maximum(norm, full(norm, _TINY)))


@kernel
def norm_forward(KIND: int, GAIN: int, OUT: int, LANES: int) -> Callable[[Any], None]:
    """y = √D · x / max(‖x‖, 1e-12) · gamma. KIND, GAIN, OUT: how x, gamma and y lie in memory."""
    WIDE = F64 if F64 in (KIND, GAIN) else F32

    def run(pointer: Any) -> None:
        p = carray(pointer, (MAX_ARGUMENTS,))
        while True:
            item = take_ticket(pointer, 0)
            if item >= p[2]:
                break
            for row in range(item * ROWS, min((item + 1) * ROWS, p[R])):
                x, y = p[X] + row * p[D] * ITEM_SIZE[KIND], p[Y] + row * p[D] * ITEM_SIZE[OUT]
                gamma = p[GAMMA] + (row % p[G]) * p[D] * ITEM_SIZE[GAIN]
                r = _scale(sqrt(_square_sum(x, KIND, WIDE, LANES, p[D])), p[D])
                n = 0
                while n + LANES <= p[D]:
                    store(y, n, load(x, n, KIND, LANES) * r * load(gamma, n, GAIN, LANES), OUT)
                    n += LANES
                while n < p[D]:
                    store(y, n, load(x, n, KIND, 1) * r * load(gamma, n, GAIN, 1), OUT)
                    n += 1

    return run


@kernel
def norm_backward(KIND: int, GAIN: int, OUT: int, LANES: int) -> Callable[[Any], None]:
    """Gradients of x and, summed over the rows of each item, of gamma (items, G, D)."""
    WIDE = F64 if F64 in (KIND, GAIN) else F32

    def run(pointer: Any) -> None:
        p = carray(pointer, (MAX_ARGUMENTS,))
        while True:
            item = take_ticket(pointer, 0)
            if item >= p[2]:
                break
            for row in range(item * ROWS, min((item + 1) * ROWS, p[R])):
                x, dx = p[X] + row * p[D] * ITEM_SIZE[KIND], p[DX] + row * p[D] * ITEM_SIZE[KIND]
                dy = p[DY] + row * p[D] * ITEM_SIZE[OUT]
                gamma = p[GAMMA] + (row % p[G]) * p[D] * ITEM_SIZE[GAIN]
                sums_row = p[DGAMMA] + (item * p[G] + row % p[G]) * p[D] * ITEM_SIZE[WIDE]
                square = _square_sum(x, KIND, WIDE, LANES, p[D])
                r = _scale(sqrt(square), p[D])
                # Σ dy gamma x, and gamma's gradient.
                sums, n = zeros(WIDE, LANES), 0
                while n + LANES <= p[D]:
                    value, given = load(x, n, KIND, LANES), load(dy, n, OUT, LANES)
                    sums = fma(given * load(gamma, n, GAIN, LANES), value, sums)
                    store(sums_row, n, fma(given * r, value, load(sums_row, n, WIDE, LANES)), WIDE)
                    n += LANES
                inner = zeros(WIDE, 1) + total(sums)
                while n < p[D]:
                    value, given = load(x, n, KIND, 1), load(dy, n, OUT, 1)
                    inner = fma(given * load(gamma, n, GAIN, 1), value, inner)
                    store(sums_row, n, fma(given * r, value, load(sums_row, n, WIDE, 1)), WIDE)
                    n += 1
                # Below the limit the norm is a constant.
                share = total(inner / square) if total(sqrt(square)) > _TINY else 0.0
                n = 0
                while n + LANES <= p[D]:
                    given = load(dy, n, OUT, LANES) * load(gamma, n, GAIN, LANES)
                    store(dx, n, (given - load(x, n, KIND, LANES) * share) * r, KIND)
                    n += LANES
                while n < p[D]:
                    given = load(dy, n, OUT, 1) * load(gamma, n, GAIN, 1)
                    store(dx, n, (given - load(x, n, KIND, 1) * share) * r, KIND)
                    n += 1

    return run
