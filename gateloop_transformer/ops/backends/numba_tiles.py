"""Kernels of the gate loop with a matrix state: chunks of time as small matrix products, everything kept in cache.

B batch, T time, H heads, K key size, V value size; C steps per chunk. One item is a head of a sequence (a row of the
batch, or a document packed in a row), from the first step to the last (backward: from the last to the first).
Derivation: docs/math.md.

Within a chunk D[i, j] = a[j+1] ··· a[i] for i ≥ j, else 0, built row by row: exact at a gate of 0. P[i] is the product
from the chunk's start to i, E[j] that from after j to its end, w that over all of it.

All of this multiplies what a step must not see by 0, which is exact for finite numbers alone. A kernel says in AMISS
whether a result is not finite: then nothing that it wrote counts (see `numba_matrix`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, njit

from gateloop_transformer.ops.backends.numba_cache import kernel
from gateloop_transformer.ops.backends.numba_launch import HEADER
from gateloop_transformer.ops.backends.numba_scans import MAX_ARGUMENTS, stretch
from gateloop_transformer.ops.backends.numba_simd import (
    AVX512,
    F32,
    F64,
    ITEM_SIZE,
    fma,
    fms,
    load,
    multiply_tile,
    spread,
    store,
    take_ticket,
    total,
    zeros,
)

# Products of matrices go by tiles of this many rows and vectors: their sums fit the registers.
_ROWS = 4
_WIDE = 4 if AVX512 else 2
# Integers of this type are no compile-time constants: a helper is compiled once for all their values.
NO, YES = np.int64(0), np.int64(1)
ONE = YES
FULL, LOWER, UPPER = np.int64(0), np.int64(1), np.int64(2)

# Arguments: sizes (KP, VP: K and V filled up to whole vectors; C a multiple of the lanes and of _ROWS), the memory of a
# thread,
HEADS, T, K, V, KP, VP, C, SCRATCH, ROOM, DOCUMENTS = range(HEADER, HEADER + 10)
# operands (address, strides of batch, time and head in bytes), and states, real and imaginary part side by side: STATE
# (sequences, H, 2, KP, VP), the running one, and BEFORE, those before each chunk: sequence by sequence (H, chunks, 2,
# KP, VP). AMISS: 1 as soon as a result is not finite.
QUERY, KEY, VALUE, GATE, GATE_IM, OUT, DY, DQ, DK, DV, DA, DA_IM = (
    np.int64(place) for place in range(HEADER + 10, HEADER + 58, 4)
)
STATE, BEFORE, AMISS = HEADER + 58, HEADER + 59, HEADER + 60


@njit
def _multiply(
    kind: Any,
    lanes: Any,
    a: int,
    a_row: int,
    a_step: int,
    b: int,
    c: int,
    rows: int,
    columns: int,
    depth: int,
    add: int,
    shape: int,
) -> None:
    """C (+)= A B, rows of B and C `columns` apart. LOWER: A[i, l] is 0 for l > i; UPPER: for l < i."""
    size = ITEM_SIZE[kind]
    for i in range(0, rows, _ROWS):
        first = i if shape == UPPER else 0
        steps = (min(i + _ROWS, depth) if shape == LOWER else depth) - first
        left = a + (i * a_row + first * a_step) * size
        n = 0
        while n < columns:
            right = b + (first * columns + n) * size
            target = c + (i * columns + n) * size
            if columns - n >= _WIDE * lanes:
                multiply_tile(
                    left, a_row, a_step, right, columns, target, columns, steps, add, _ROWS, _WIDE, kind, lanes
                )
                n += _WIDE * lanes
            else:
                multiply_tile(left, a_row, a_step, right, columns, target, columns, steps, add, _ROWS, 1, kind, lanes)
                n += lanes


@njit
def _fill(kind: Any, lanes: Any, target: int, count: int) -> None:
    for n in range(0, count, lanes):
        store(target, n, zeros(kind, lanes), kind)


@njit
def _move(source_kind: Any, target_kind: Any, lanes: Any, source: int, target: int, count: int) -> None:
    """`count` neighbours from one kind to another; the last vector overlaps the one before."""
    if count < lanes:
        for n in range(count):
            store(target, n, load(source, n, source_kind, 1), target_kind)
    else:
        for n in range(0, count, lanes):
            at = min(n, count - lanes)
            store(target, at, load(source, at, source_kind, lanes), target_kind)


@njit
def _check(kind: Any, lanes: Any, p: Any, source: int, count: int) -> None:
    """Say so where one of `count` numbers, whole vectors, is not finite: 0 times it is not 0."""
    sums = zeros(kind, lanes)
    for n in range(0, count, lanes):
        sums = fma(load(source, n, kind, lanes), zeros(kind, lanes), sums)
    if total(sums) != 0.0:
        p[AMISS] = 1


@njit
def _transpose(kind: Any, lanes: Any, source: int, target: int, rows: int, columns: int) -> None:
    for i in range(rows):
        for j in range(columns):
            store(target, j * rows + i, load(source, i * columns + j, kind, 1), kind)


@njit
def _tile(
    kind: Any,
    wide: Any,
    lanes: Any,
    p: Any,
    operand: int,
    b: int,
    h: int,
    start: int,
    steps: int,
    count: int,
    padded: int,
    target: int,
    c: int,
) -> None:
    """A chunk of an operand as `c` rows of `padded` numbers; what lies outside of it is 0."""
    for i in range(c):
        row = target + i * padded * ITEM_SIZE[wide]
        if i >= steps or count < padded:
            _fill(wide, lanes, row, padded)
        if i < steps:
            source = p[operand] + b * p[operand + 1] + (start + i) * p[operand + 2] + h * p[operand + 3]
            _move(kind, wide, lanes, source, row, count)


@njit
def _put(
    wide: Any,
    kind: Any,
    lanes: Any,
    p: Any,
    operand: int,
    b: int,
    h: int,
    start: int,
    steps: int,
    count: int,
    padded: int,
    source: int,
) -> None:
    """The opposite of `_tile`."""
    for i in range(steps):
        target = p[operand] + b * p[operand + 1] + (start + i) * p[operand + 2] + h * p[operand + 3]
        _move(wide, kind, lanes, source + i * padded * ITEM_SIZE[wide], target, count)


@njit
def _gates(
    kind: Any,
    wide: Any,
    complex_: Any,
    lanes: Any,
    p: Any,
    b: int,
    h: int,
    start: int,
    steps: int,
    gates: int,
    inside: int,
    starts: int,
    c: int,
) -> None:
    """Gates (re, im) (2, C), 1 after the end; products D (2, C, C) and P (2, C)."""
    size = ITEM_SIZE[wide]
    for i in range(c):
        re, im = zeros(wide, 1) + 1.0, zeros(wide, 1)
        if i < steps:
            row = p[GATE] + b * p[GATE + 1] + (start + i) * p[GATE + 2] + h * p[GATE + 3]
            re = load(row, 0, kind, 1)
            if complex_:
                row = p[GATE_IM] + b * p[GATE_IM + 1] + (start + i) * p[GATE_IM + 2] + h * p[GATE_IM + 3]
                im = load(row, 0, kind, 1)
        store(gates, i, re, wide)
        store(gates, c + i, im, wide)
    inside_im, gates_im, starts_im = inside + c * c * size, gates + c * size, starts + c * size
    for i in range(c):
        a, a_im = spread(gates, i, wide, lanes), spread(gates_im, i, wide, lanes)
        for j in range(0, c, lanes):
            if i == 0:
                store(inside, j, zeros(wide, lanes), wide)
                store(inside_im, j, zeros(wide, lanes), wide)
            else:
                re, im = load(inside, (i - 1) * c + j, wide, lanes), load(inside_im, (i - 1) * c + j, wide, lanes)
                if complex_:
                    store(inside, i * c + j, fms(a_im, im, a * re), wide)
                    store(inside_im, i * c + j, fma(a, im, a_im * re), wide)
                else:
                    store(inside, i * c + j, a * re, wide)
        store(inside, i * c + i, zeros(wide, 1) + 1.0, wide)
        store(inside_im, i * c + i, zeros(wide, 1), wide)
        re, im = load(inside, i * c, wide, 1), load(inside_im, i * c, wide, 1)
        a, a_im = load(gates, 0, wide, 1), load(gates_im, 0, wide, 1)
        if complex_:
            store(starts, i, fms(a_im, im, a * re), wide)
            store(starts_im, i, fma(a, im, a_im * re), wide)
        else:
            store(starts, i, a * re, wide)


@njit
def _chunk_of(p: Any, length: int) -> Any:
    """Steps per chunk of a sequence: fewer where it is shorter than a chunk, for all of one is computed."""
    return min(p[C], max((length + 15) // 16, 1) * 16)


@njit
def _scaled(
    wide: Any, lanes: Any, factors: int, rows: int, columns: int, source: int, target: int, width: int, sign: float
) -> None:
    """target[i, :] = sign · factors[i] · source[i, :], rows of the target `width` apart."""
    for i in range(rows):
        factor = spread(factors, i, wide, lanes) * sign
        for n in range(0, columns, lanes):
            store(target, i * width + n, factor * load(source, i * columns + n, wide, lanes), wide)


@njit
def _times(wide: Any, lanes: Any, x: int, y: int, target: int, count: int) -> None:
    """target = x ∘ y."""
    for n in range(0, count, lanes):
        store(target, n, load(x, n, wide, lanes) * load(y, n, wide, lanes), wide)


@njit
def _step(
    wide: Any,
    complex_: Any,
    lanes: Any,
    count: int,
    weights: int,
    last: int,
    length: int,
    sign: float,
    state: int,
    added: int,
) -> None:
    """state = w · state + added (sign -1: conj(w)), with w the entry `last` of weights (2, length)."""
    size = ITEM_SIZE[wide]
    w = spread(weights, last, wide, lanes)
    for n in range(0, count, lanes):
        re = load(state, n, wide, lanes)
        new = fma(w, re, load(added, n, wide, lanes))
        if complex_:
            w_im = spread(weights, length + last, wide, lanes) * sign
            im = load(state + count * size, n, wide, lanes)
            new_im = fma(w, im, fma(w_im, re, load(added + count * size, n, wide, lanes)))
            new = fms(w_im, im, new)
            store(state + count * size, n, new_im, wide)
        store(state, n, new, wide)


@kernel
def tiles_forward(X: int, A: int, COMPLEX: bool, STATES: bool, LANES: int) -> Callable[[Any], None]:
    """y and the last state; if STATES, instead of y, the state before each chunk."""
    WIDE = F64 if F64 in (X, A) else F32
    SIZE = ITEM_SIZE[WIDE]
    PARTS = 2 if COMPLEX else 1

    def run(pointer: Any) -> None:
        p = carray(pointer, (MAX_ARGUMENTS,))
        kp, vp = p[KP], p[VP]
        state_size = kp * vp
        room = p[SCRATCH] + take_ticket(pointer, 1) * p[ROOM]
        while True:
            item = take_ticket(pointer, 0)
            if item >= p[2]:
                break
            sequence, h = item // p[HEADS], item % p[HEADS]
            b, begin, length, earlier = stretch(p, p[DOCUMENTS], p[T], sequence, p[C])
            c = _chunk_of(p, length)
            q = room
            k = q + c * kp * SIZE
            kt = k + c * kp * SIZE
            q2 = kt + c * kp * SIZE
            v = q2 + 2 * c * kp * SIZE
            ev = v + c * vp * SIZE
            y = ev + c * vp * SIZE
            gates = y + c * vp * SIZE
            starts = gates + 2 * c * SIZE
            inside = starts + 2 * c * SIZE
            scores = inside + 2 * c * c * SIZE
            added = scores + c * c * SIZE
            state = p[STATE] + item * PARTS * state_size * SIZE
            chunks = (length + c - 1) // c
            kept_before = p[BEFORE] + (earlier * p[HEADS] + h * chunks) * PARTS * state_size * SIZE
            for chunk in range(chunks):
                start = begin + chunk * c
                steps = min(c, length - chunk * c)
                _tile(X, WIDE, LANES, p, KEY, b, h, start, steps, p[K], kp, k, c)
                _tile(X, WIDE, LANES, p, VALUE, b, h, start, steps, p[V], vp, v, c)
                _gates(A, WIDE, COMPLEX, LANES, p, b, h, start, steps, gates, inside, starts, c)
                if STATES:
                    kept = kept_before + chunk * PARTS * state_size * SIZE
                    _move(WIDE, WIDE, LANES, state, kept, PARTS * state_size)
                else:
                    _tile(X, WIDE, LANES, p, QUERY, b, h, start, steps, p[K], kp, q, c)
                    _transpose(WIDE, LANES, k, kt, c, kp)
                    _multiply(WIDE, LANES, q, kp, ONE, kt, scores, c, c, kp, NO, FULL)
                    _times(WIDE, LANES, scores, inside, scores, c * c)
                    _multiply(WIDE, LANES, scores, c, ONE, v, y, c, vp, c, NO, LOWER)
                    _scaled(WIDE, LANES, starts, c, kp, q, q2, PARTS * kp, 1.0)
                    if COMPLEX:
                        _scaled(WIDE, LANES, starts + c * SIZE, c, kp, q, q2 + kp * SIZE, PARTS * kp, -1.0)
                    _multiply(
                        WIDE,
                        LANES,
                        q2,
                        PARTS * kp,
                        YES,
                        state,
                        y,
                        c,
                        vp,
                        PARTS * kp,
                        YES,
                        FULL,
                    )
                    _check(WIDE, LANES, p, y, c * vp)
                    _put(WIDE, X, LANES, p, OUT, b, h, start, steps, p[V], vp, y)
                # What the chunk adds to the state: row j of v weighs E[j].
                for part in range(PARTS):
                    ends = inside + (part * c * c + (c - 1) * c) * SIZE
                    _scaled(WIDE, LANES, ends, c, vp, v, ev, vp, 1.0)
                    _multiply(
                        WIDE,
                        LANES,
                        k,
                        YES,
                        kp,
                        ev,
                        added + part * state_size * SIZE,
                        kp,
                        vp,
                        c,
                        NO,
                        FULL,
                    )
                _step(WIDE, COMPLEX, LANES, state_size, starts, c - 1, c, 1.0, state, added)
            # A state that is not finite stays so.
            _check(WIDE, LANES, p, state, PARTS * state_size)

    return run


@njit
def _row_sums(wide: Any, lanes: Any, x: int, y: int, rows: int, columns: int, target: int, sign: float) -> None:
    """target[i] = sign · Σ_n x[i, n] y[i, n]."""
    for i in range(rows):
        sums = zeros(wide, lanes)
        for n in range(0, columns, lanes):
            sums = fma(load(x, i * columns + n, wide, lanes), load(y, i * columns + n, wide, lanes), sums)
        store(target, i, zeros(wide, 1) + total(sums) * sign, wide)


@njit
def _add_scaled(wide: Any, lanes: Any, factors: int, rows: int, columns: int, x: int, target: int, sign: float) -> None:
    """target[i, :] += sign · factors[i] · x[i, :]."""
    for i in range(rows):
        factor = spread(factors, i, wide, lanes) * sign
        for n in range(0, columns, lanes):
            at = i * columns + n
            store(target, at, fma(factor, load(x, at, wide, lanes), load(target, at, wide, lanes)), wide)


@njit
def _gate_gradients(
    kind: Any,
    wide: Any,
    complex_: Any,
    lanes: Any,
    p: Any,
    b: int,
    h: int,
    start: int,
    steps: int,
    inside: int,
    starts: int,
    within: int,
    x: int,
    from_start: int,
    to_end: int,
    corner: float,
    corner_im: float,
    c: int,
) -> None:
    """da[t] = Σ_{i ≥ t > j} W[i, j] conj(D[i, t] D[t-1, j]): no quotient, exact at a gate of 0.

    W is the gradient of D; column -1 stands for the state before the chunk, and the gradient of the state after it
    joins the last row. `x` is room for (2, C, C); from_start and to_end are (2, C).
    """
    size = ITEM_SIZE[wide]
    inside_im, x_im = inside + c * c * size, x + c * c * size
    end, end_im = (c - 1) * c, c * c + (c - 1) * c
    amiss = 0.0
    # X[t, j] = Σ_i conj(D[i, t]) W[i, j] + conj(E[t]) to_end[j]; the imaginary part with its sign turned.
    _multiply(wide, lanes, inside, ONE, c, within, x, c, c, c, NO, UPPER)
    if complex_:
        _multiply(wide, lanes, inside_im, ONE, c, within, x_im, c, c, c, NO, UPPER)
    for t in range(steps):
        e, e_im = spread(inside, end + t, wide, lanes), spread(inside, end_im + t, wide, lanes)
        sums, sums_im = zeros(wide, lanes), zeros(wide, lanes)
        for j in range(0, t, lanes):
            te = load(to_end, j, wide, lanes)
            d = load(inside, (t - 1) * c + j, wide, lanes)
            re = fma(e, te, load(x, t * c + j, wide, lanes))
            if complex_:
                te_im = load(to_end, c + j, wide, lanes)
                d_im = load(inside_im, (t - 1) * c + j, wide, lanes)
                re = fma(e_im, te_im, re)
                im = fms(e_im, te, e * te_im) - load(x_im, t * c + j, wide, lanes)
                sums = fma(re, d, fma(im, d_im, sums))
                sums_im = fma(im, d, fms(re, d_im, sums_im))
            else:
                sums = fma(re, d, sums)
        da, da_im = total(sums), total(sums_im)
        # Column -1: the state before the chunk, whose products are P.
        re, im = total(load(inside, end + t, wide, 1)) * corner, 0.0
        if complex_:
            e1, e2 = total(load(inside, end + t, wide, 1)), total(load(inside, end_im + t, wide, 1))
            re, im = e1 * corner + e2 * corner_im, e1 * corner_im - e2 * corner
        column, column_im = zeros(wide, 1), zeros(wide, 1)
        for i in range(t, c):
            d, f = load(inside, i * c + t, wide, 1), load(from_start, i, wide, 1)
            column = fma(d, f, column)
            if complex_:
                d_im, f_im = load(inside_im, i * c + t, wide, 1), load(from_start, c + i, wide, 1)
                column = fma(d_im, f_im, column)
                column_im = fma(d, f_im, fms(d_im, f, column_im))
        re, im = re + total(column), im + total(column_im)
        p1, p2 = 1.0, 0.0
        if t > 0:
            p1, p2 = total(load(starts, t - 1, wide, 1)), total(load(starts, c + t - 1, wide, 1)) if complex_ else 0.0
        row = p[DA] + b * p[DA + 1] + (start + t) * p[DA + 2] + h * p[DA + 3]
        whole = da + re * p1 + im * p2
        amiss = amiss + whole * 0.0
        store(row, 0, zeros(wide, 1) + whole, kind)
        if complex_:
            row = p[DA_IM] + b * p[DA_IM + 1] + (start + t) * p[DA_IM + 2] + h * p[DA_IM + 3]
            whole = da_im + im * p1 - re * p2
            amiss = amiss + whole * 0.0
            store(row, 0, zeros(wide, 1) + whole, kind)
    if amiss != 0.0:
        p[AMISS] = 1


@kernel
def tiles_backward(X: int, A: int, COMPLEX: bool, LANES: int) -> Callable[[Any], None]:
    """All gradients, from the states before each chunk. STATE holds the gradient of the state after a chunk."""
    WIDE = F64 if F64 in (X, A) else F32
    SIZE = ITEM_SIZE[WIDE]
    PARTS = 2 if COMPLEX else 1

    def run(pointer: Any) -> None:
        p = carray(pointer, (MAX_ARGUMENTS,))
        kp, vp = p[KP], p[VP]
        state_size = kp * vp
        room = p[SCRATCH] + take_ticket(pointer, 1) * p[ROOM]
        while True:
            item = take_ticket(pointer, 0)
            if item >= p[2]:
                break
            sequence, h = item // p[HEADS], item % p[HEADS]
            b, begin, length, earlier = stretch(p, p[DOCUMENTS], p[T], sequence, p[C])
            c = _chunk_of(p, length)
            q = room
            k = q + c * kp * SIZE
            dq = k + c * kp * SIZE
            dk = dq + c * kp * SIZE
            r = dk + c * kp * SIZE
            k2 = r + c * kp * SIZE
            v = k2 + 2 * c * kp * SIZE
            dy = v + c * vp * SIZE
            dv = dy + c * vp * SIZE
            weighed = dv + c * vp * SIZE
            transposed = weighed + c * vp * SIZE
            gates = transposed + c * (kp + vp) * SIZE
            starts = gates + 2 * c * SIZE
            from_start = starts + 2 * c * SIZE
            to_end = from_start + 2 * c * SIZE
            inside = to_end + 2 * c * SIZE
            scores = inside + 2 * c * c * SIZE
            d_scores = scores + c * c * SIZE
            within = d_scores + c * c * SIZE
            x = within + c * c * SIZE
            pulled = x + 2 * c * c * SIZE
            flipped = pulled + 2 * state_size * SIZE
            after = p[STATE] + item * PARTS * state_size * SIZE
            chunks = (length + c - 1) // c
            kept_before = p[BEFORE] + (earlier * p[HEADS] + h * chunks) * PARTS * state_size * SIZE
            for chunk in range(chunks - 1, -1, -1):
                start = begin + chunk * c
                steps = min(c, length - chunk * c)
                before = kept_before + chunk * PARTS * state_size * SIZE
                _tile(X, WIDE, LANES, p, QUERY, b, h, start, steps, p[K], kp, q, c)
                _tile(X, WIDE, LANES, p, KEY, b, h, start, steps, p[K], kp, k, c)
                _tile(X, WIDE, LANES, p, VALUE, b, h, start, steps, p[V], vp, v, c)
                _tile(X, WIDE, LANES, p, DY, b, h, start, steps, p[V], vp, dy, c)
                _gates(A, WIDE, COMPLEX, LANES, p, b, h, start, steps, gates, inside, starts, c)
                # Within the chunk.
                _transpose(WIDE, LANES, k, transposed, c, kp)
                _multiply(WIDE, LANES, q, kp, ONE, transposed, scores, c, c, kp, NO, FULL)
                _transpose(WIDE, LANES, v, transposed, c, vp)
                _multiply(WIDE, LANES, dy, vp, ONE, transposed, d_scores, c, c, vp, NO, FULL)
                _times(WIDE, LANES, scores, d_scores, within, c * c)
                _times(WIDE, LANES, scores, inside, scores, c * c)
                _times(WIDE, LANES, d_scores, inside, d_scores, c * c)
                _multiply(WIDE, LANES, d_scores, c, ONE, k, dq, c, kp, c, NO, LOWER)
                _multiply(WIDE, LANES, d_scores, ONE, c, q, dk, c, kp, c, NO, UPPER)
                _multiply(WIDE, LANES, scores, ONE, c, dy, dv, c, vp, c, NO, UPPER)
                corner, corner_im = 0.0, 0.0
                for part in range(PARTS):
                    offset = part * state_size * SIZE
                    sign = 1.0 - 2.0 * part
                    ends = inside + (part * c * c + (c - 1) * c) * SIZE
                    # From the state before the chunk.
                    _transpose(WIDE, LANES, before + offset, flipped, kp, vp)
                    _multiply(WIDE, LANES, dy, vp, ONE, flipped, r, c, kp, vp, NO, FULL)
                    _row_sums(WIDE, LANES, q, r, c, kp, from_start + part * c * SIZE, sign)
                    _add_scaled(WIDE, LANES, starts + part * c * SIZE, c, kp, r, dq, sign)
                    _scaled(WIDE, LANES, starts + part * c * SIZE, c, vp, dy, weighed, vp, sign)
                    _multiply(
                        WIDE,
                        LANES,
                        q,
                        YES,
                        kp,
                        weighed,
                        pulled + offset,
                        kp,
                        vp,
                        c,
                        NO,
                        FULL,
                    )
                    # To the state after it.
                    _transpose(WIDE, LANES, after + offset, flipped, kp, vp)
                    _multiply(WIDE, LANES, v, vp, ONE, flipped, r, c, kp, vp, NO, FULL)
                    _row_sums(WIDE, LANES, k, r, c, kp, to_end + part * c * SIZE, 1.0)
                    _add_scaled(WIDE, LANES, ends, c, kp, r, dk, 1.0)
                    _scaled(WIDE, LANES, ends, c, kp, k, k2 + part * kp * SIZE, PARTS * kp, 1.0)
                    # Σ after · conj(before).
                    corner += _inner(WIDE, LANES, after + offset, before + offset, state_size)
                    if COMPLEX:
                        other = before + (state_size * SIZE - offset)
                        corner_im -= sign * _inner(WIDE, LANES, after + offset, other, state_size)
                _multiply(WIDE, LANES, k2, PARTS * kp, ONE, after, dv, c, vp, PARTS * kp, YES, FULL)
                _gate_gradients(
                    A,
                    WIDE,
                    COMPLEX,
                    LANES,
                    p,
                    b,
                    h,
                    start,
                    steps,
                    inside,
                    starts,
                    within,
                    x,
                    from_start,
                    to_end,
                    corner,
                    corner_im,
                    c,
                )
                _check(WIDE, LANES, p, dq, c * kp)
                _check(WIDE, LANES, p, dk, c * kp)
                _check(WIDE, LANES, p, dv, c * vp)
                _put(WIDE, X, LANES, p, DQ, b, h, start, steps, p[K], kp, dq)
                _put(WIDE, X, LANES, p, DK, b, h, start, steps, p[K], kp, dk)
                _put(WIDE, X, LANES, p, DV, b, h, start, steps, p[V], vp, dv)
                _step(WIDE, COMPLEX, LANES, state_size, starts, c - 1, c, -1.0, after, pulled)
            _check(WIDE, LANES, p, after, PARTS * state_size)

    return run


@njit
def _inner(wide: Any, lanes: Any, x: int, y: int, count: int) -> Any:
    sums = zeros(wide, lanes)
    for n in range(0, count, lanes):
        sums = fma(load(x, n, wide, lanes), load(y, n, wide, lanes), sums)
    return total(sums)
