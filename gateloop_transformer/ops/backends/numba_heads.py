"""Kernels of the gate loop with small matrix states: step by step, a lane for each head.

B batch, T time, H heads, K key size, V value size. One item is as many neighbouring heads as there are lanes, of a
sequence (a row of the batch, or a document packed in a row). Operands have the heads last, filled up to whole vectors:
(B, T, K or V, HP), all in the precision that is computed in. States are kept every C steps and computed again between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, njit

from gateloop_transformer.ops.backends.numba_cache import kernel
from gateloop_transformer.ops.backends.numba_launch import HEADER
from gateloop_transformer.ops.backends.numba_scans import MAX_ARGUMENTS, begins, stretch
from gateloop_transformer.ops.backends.numba_simd import ITEM_SIZE, fma, fms, load, store, take_ticket, zeros

# Arguments: sizes, the memory of a thread,
HP, T, K, V, C, SCRATCH, ROOM, DOCUMENTS = range(HEADER, HEADER + 8)
# operands (address, strides of batch and time in bytes), and states: STATE (sequences, parts, K, V, HP), the running
# one, and BEFORE, those before each chunk: (chunks of all sequences, parts, K, V, HP). ANEW marks the steps that begin
# anew (address, strides of batch and time).
QUERY, KEY, VALUE, GATE, GATE_IM, OUT, DY, DQ, DK, DV, DA, DA_IM = (
    np.int64(place) for place in range(HEADER + 8, HEADER + 44, 3)
)
STATE, BEFORE, ANEW = HEADER + 44, HEADER + 45, np.int64(HEADER + 46)


@njit
def _row(p: Any, operand: int, b: int, t: int, first: int) -> Any:
    """Where an operand has step t of some heads."""
    return p[operand] + b * p[operand + 1] + t * p[operand + 2] + first


@njit
def _copy(kind: Any, lanes: Any, source: int, source_apart: int, target: int, target_apart: int, count: int) -> None:
    """`count` vectors, each so many bytes from the next."""
    for n in range(count):
        store(target + n * target_apart, 0, load(source + n * source_apart, 0, kind, lanes), kind)


@njit
def _forget(kind: Any, lanes: Any, state: int, count: int) -> None:
    """A state of 0: gates multiply what they forget, and 0 times NaN is NaN."""
    for n in range(count):
        store(state, n * lanes, zeros(kind, lanes), kind)


@njit
def _advance(kind: Any, complex_: Any, lanes: Any, p: Any, b: int, t: int, first: int, old: int, new: int) -> None:
    """new = a · old + k ⊗ v, states as neighbouring vectors (parts, K, V)."""
    size = ITEM_SIZE[kind]
    apart, width = p[HP] * size, lanes * size
    half = p[K] * p[V] * width
    a = load(_row(p, GATE, b, t, first), 0, kind, lanes)
    a_im = load(_row(p, GATE_IM, b, t, first), 0, kind, lanes) if complex_ else a
    keys, values = _row(p, KEY, b, t, first), _row(p, VALUE, b, t, first)
    for i in range(p[K]):
        k = load(keys + i * apart, 0, kind, lanes)
        for j in range(p[V]):
            at = (i * p[V] + j) * width
            re = load(old + at, 0, kind, lanes)
            grown = fma(a, re, k * load(values + j * apart, 0, kind, lanes))
            if complex_:
                im = load(old + half + at, 0, kind, lanes)
                store(new + half + at, 0, fma(a, im, a_im * re), kind)
                grown = fms(a_im, im, grown)
            store(new + at, 0, grown, kind)


@njit
def _read(kind: Any, lanes: Any, p: Any, b: int, t: int, first: int, state: int) -> None:
    """y[t] = Re(q S)."""
    apart, width = p[HP] * ITEM_SIZE[kind], lanes * ITEM_SIZE[kind]
    queries, outputs = _row(p, QUERY, b, t, first), _row(p, OUT, b, t, first)
    for j in range(p[V]):
        y = zeros(kind, lanes)
        for i in range(p[K]):
            q = load(queries + i * apart, 0, kind, lanes)
            y = fma(q, load(state + (i * p[V] + j) * width, 0, kind, lanes), y)
        store(outputs + j * apart, 0, y, kind)


@kernel
def heads_forward(WIDE: int, COMPLEX: bool, STATES: bool, LANES: int) -> Callable[[Any], None]:
    """y and the last state; if STATES, instead of y, the state before each chunk."""
    SIZE = ITEM_SIZE[WIDE]
    PARTS = 2 if COMPLEX else 1

    def run(pointer: Any) -> None:
        p = carray(pointer, (MAX_ARGUMENTS,))
        apart, width = p[HP] * SIZE, LANES * SIZE
        count = PARTS * p[K] * p[V]
        state = p[SCRATCH] + take_ticket(pointer, 1) * p[ROOM]
        groups = p[HP] // LANES
        while True:
            item = take_ticket(pointer, 0)
            if item >= p[2]:
                break
            sequence, first = item // groups, (item % groups) * width
            b, begin, length, earlier = stretch(p, p[DOCUMENTS], p[T], sequence, p[C])
            own = p[STATE] + sequence * count * apart + first
            _copy(WIDE, LANES, own, apart, state, width, count)
            for t in range(length):
                if STATES and t % p[C] == 0:
                    before = p[BEFORE] + (earlier + t // p[C]) * count * apart + first
                    _copy(WIDE, LANES, state, width, before, apart, count)
                if begins(p, ANEW, b, begin + t):
                    _forget(WIDE, LANES, state, count)
                _advance(WIDE, COMPLEX, LANES, p, b, begin + t, first, state, state)
                if not STATES:
                    _read(WIDE, LANES, p, b, begin + t, first, state)
            _copy(WIDE, LANES, state, width, own, apart, count)

    return run


@njit
def _retreat(
    kind: Any, complex_: Any, lanes: Any, p: Any, b: int, t: int, first: int, before: int, after: int, grad: int
) -> None:
    """Gradients of step t from the states around it; `grad` is that of the state after it, then of the one before."""
    size = ITEM_SIZE[kind]
    apart, width = p[HP] * size, lanes * size
    half = p[K] * p[V] * width
    a = load(_row(p, GATE, b, t, first), 0, kind, lanes)
    a_im = load(_row(p, GATE_IM, b, t, first), 0, kind, lanes) if complex_ else a
    queries, keys = _row(p, QUERY, b, t, first), _row(p, KEY, b, t, first)
    values, outputs, d_values = _row(p, VALUE, b, t, first), _row(p, DY, b, t, first), _row(p, DV, b, t, first)
    da, da_im = zeros(kind, lanes), zeros(kind, lanes)
    for i in range(p[K]):
        q, k = load(queries + i * apart, 0, kind, lanes), load(keys + i * apart, 0, kind, lanes)
        dq, dk = zeros(kind, lanes), zeros(kind, lanes)
        for j in range(p[V]):
            at = (i * p[V] + j) * width
            dy, v = load(outputs + j * apart, 0, kind, lanes), load(values + j * apart, 0, kind, lanes)
            g = fma(q, dy, load(grad + at, 0, kind, lanes))
            dq = fma(load(after + at, 0, kind, lanes), dy, dq)
            dk = fma(g, v, dk)
            dv = zeros(kind, lanes) if i == 0 else load(d_values + j * apart, 0, kind, lanes)
            store(d_values + j * apart, 0, fma(g, k, dv), kind)
            s = load(before + at, 0, kind, lanes)
            da = fma(g, s, da)
            passed = a * g
            if complex_:
                g_im, s_im = load(grad + half + at, 0, kind, lanes), load(before + half + at, 0, kind, lanes)
                da = fma(g_im, s_im, da)
                da_im = fms(g, s_im, fma(g_im, s, da_im))
                passed = fma(a_im, g_im, passed)
                store(grad + half + at, 0, fms(a_im, g, a * g_im), kind)
            store(grad + at, 0, passed, kind)
        store(_row(p, DQ, b, t, first) + i * apart, 0, dq, kind)
        store(_row(p, DK, b, t, first) + i * apart, 0, dk, kind)
    store(_row(p, DA, b, t, first), 0, da, kind)
    if complex_:
        store(_row(p, DA_IM, b, t, first), 0, da_im, kind)


@kernel
def heads_backward(WIDE: int, COMPLEX: bool, LANES: int) -> Callable[[Any], None]:
    """All gradients, from the states before each chunk. STATE holds the gradient of the last state."""
    SIZE = ITEM_SIZE[WIDE]
    PARTS = 2 if COMPLEX else 1

    def run(pointer: Any) -> None:
        p = carray(pointer, (MAX_ARGUMENTS,))
        apart, width = p[HP] * SIZE, LANES * SIZE
        count = PARTS * p[K] * p[V]
        grad = p[SCRATCH] + take_ticket(pointer, 1) * p[ROOM]
        # What a step that begins anew finds; the states of a chunk, the one before it first.
        nothing = grad + count * width
        states = nothing + count * width
        _forget(WIDE, LANES, nothing, count)
        groups = p[HP] // LANES
        while True:
            item = take_ticket(pointer, 0)
            if item >= p[2]:
                break
            sequence, first = item // groups, (item % groups) * width
            b, begin, length, earlier = stretch(p, p[DOCUMENTS], p[T], sequence, p[C])
            own = p[STATE] + sequence * count * apart + first
            _copy(WIDE, LANES, own, apart, grad, width, count)
            for chunk in range((length + p[C] - 1) // p[C] - 1, -1, -1):
                start, steps = chunk * p[C], min(p[C], length - chunk * p[C])
                before = p[BEFORE] + (earlier + chunk) * count * apart + first
                _copy(WIDE, LANES, before, apart, states, width, count)
                for n in range(steps):
                    t, new = begin + start + n, states + (n + 1) * count * width
                    old = nothing if begins(p, ANEW, b, t) else new - count * width
                    _advance(WIDE, COMPLEX, LANES, p, b, t, first, old, new)
                for n in range(steps - 1, -1, -1):
                    t, new = begin + start + n, states + (n + 1) * count * width
                    anew = begins(p, ANEW, b, t)
                    old = nothing if anew else new - count * width
                    _retreat(WIDE, COMPLEX, LANES, p, b, t, first, old, new, grad)
                    if anew:
                        _forget(WIDE, LANES, grad, count)
            _copy(WIDE, LANES, grad, width, own, apart, count)

    return run
