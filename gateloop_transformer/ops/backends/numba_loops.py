"""Kernels of the gate loop at head size 1: gates, recurrence, output and SiLU gate in one pass over memory.

B batch, T time, D channels. One item is a block of channels of one sequence, from the first step to the last.
The forward pass keeps the state before each chunk of steps; the backward pass computes those inside again from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import carray, njit

from gateloop_transformer.ops.backends.numba_cache import kernel
from gateloop_transformer.ops.backends.numba_gates import (
    GIVEN_COMPLEX,
    GIVEN_REAL,
    PAPER,
    POLAR,
    RING,
    SIGMOID,
    activate,
    input_scale,
    input_scale_slope,
    projection_gradient,
    silu,
)
from gateloop_transformer.ops.backends.numba_scans import (
    AHEAD,
    CHUNK,
    DOCUMENTS,
    MAX_ARGUMENTS,
    OPERANDS,
    ROOM,
    SCRATCH,
    D,
    T,
    clear,
    fetch,
    place,
    resets,
    row_of,
    stretch,
)
from gateloop_transformer.ops.backends.numba_simd import (
    F32,
    F64,
    ITEM_SIZE,
    fma,
    fms,
    gather,
    load,
    load_pairs,
    prefetch,
    real_number,
    store,
    store_pairs,
    take_ticket,
    zeros,
)

# Operands. The carry, states before chunks (chunks of all sequences, PADDED) and biases hold each vector's own numbers.
Q, K, V, P, P_IM, S, BIAS, BIAS_IM, CARRY, CARRY_IM, BEFORE, BEFORE_IM = range(OPERANDS, OPERANDS + 48, 4)
Y = OPERANDS + 48
DY, DQ, DK, DV, DP, DP_IM, DS, DBIAS, DBIAS_IM = range(OPERANDS + 48, OPERANDS + 84, 4)
FRACTION = OPERANDS + 84


@njit
def _read_gate(
    gate: Any, kind: Any, wide: Any, strided: Any, lanes: Any, p: Any, row: int, row_im: int, c: int, n: int
) -> Any:
    """The n-th vector of gates of a step, as `activate` gives them; its first channel is c."""
    if gate in (POLAR, PAPER, RING):
        if strided:
            re = gather(row, c, 2 * p[P + 3], kind, lanes)
            im = gather(row + p[P + 3] * ITEM_SIZE[kind], c, 2 * p[P + 3], kind, lanes)
        else:
            re, im = load_pairs(row, c, kind, lanes)
    else:
        re = fetch(row, c, p[P + 3], kind, lanes, strided)
        im = re
        if gate == GIVEN_COMPLEX:
            im = fetch(row_im, c, p[P_IM + 3], kind, lanes, strided)
    if gate == RING:
        re = re + load(p[BIAS], n * lanes, wide, lanes)
        im = im + load(p[BIAS_IM], n * lanes, wide, lanes)
    return activate(gate, wide == F64, re, im)


@njit
def _read_input(
    gate: Any, kind: Any, strided: Any, lanes: Any, p: Any, k_row: int, v_row: int, c: int, m: Any, rest: Any
) -> Any:
    """What a step adds to the state: k v, or v where there is no key, scaled for "ring"."""
    added = fetch(v_row, c, p[V + 3], kind, lanes, strided)
    if gate != SIGMOID:
        added = added * fetch(k_row, c, p[K + 3], kind, lanes, strided)
    if gate == RING:
        added = added * input_scale(m, rest)
    return added


@njit
def _ask_inputs(gate: Any, kind: Any, gate_kind: Any, p: Any, b: int, t: int, c: int) -> None:
    """Have what the state of a step is made of brought to the cache."""
    prefetch(row_of(p, V, b, t) + c * ITEM_SIZE[kind])
    if gate != SIGMOID:
        prefetch(row_of(p, K, b, t) + c * ITEM_SIZE[kind])
    if gate in (POLAR, PAPER, RING):
        prefetch(row_of(p, P, b, t) + 2 * c * ITEM_SIZE[gate_kind])
        prefetch(row_of(p, P, b, t) + 2 * c * ITEM_SIZE[gate_kind] + 64)
    else:
        prefetch(row_of(p, P, b, t) + c * ITEM_SIZE[gate_kind])


@njit
def _ask(gate: Any, kind: Any, gate_kind: Any, swish: Any, p: Any, b: int, t: int, c: int) -> None:
    """Have all inputs of a vector of a step brought to the cache."""
    _ask_inputs(gate, kind, gate_kind, p, b, t, c)
    prefetch(row_of(p, Q, b, t) + c * ITEM_SIZE[kind])
    if swish:
        prefetch(row_of(p, S, b, t) + c * ITEM_SIZE[kind])


@njit
def _ask_rest(gate: Any, kind: Any, gate_kind: Any, swish: Any, p: Any, b: int, t: int, c: int) -> None:
    """Have what the second pass over a chunk needs beyond the first brought to the cache, results' places too."""
    prefetch(row_of(p, Q, b, t) + c * ITEM_SIZE[kind])
    prefetch(row_of(p, DY, b, t) + c * ITEM_SIZE[kind])
    prefetch(row_of(p, DQ, b, t) + c * ITEM_SIZE[kind])
    prefetch(row_of(p, DV, b, t) + c * ITEM_SIZE[kind])
    if gate != SIGMOID:
        prefetch(row_of(p, DK, b, t) + c * ITEM_SIZE[kind])
    if swish:
        prefetch(row_of(p, S, b, t) + c * ITEM_SIZE[kind])
        prefetch(row_of(p, DS, b, t) + c * ITEM_SIZE[kind])
    if gate in (POLAR, PAPER, RING):
        prefetch(row_of(p, DP, b, t) + 2 * c * ITEM_SIZE[gate_kind])
        prefetch(row_of(p, DP, b, t) + 2 * c * ITEM_SIZE[gate_kind] + 64)
    else:
        prefetch(row_of(p, DP, b, t) + c * ITEM_SIZE[gate_kind])


@kernel
def loop_forward(X: int, A: int, GATE: int, SWISH: bool, STRIDED: bool, LANES: int) -> Callable[[Any], None]:
    """y (times SiLU(s) if SWISH), the last state in the carry, and the state before each chunk.

    X: how q, k, v, s and y lie in memory; A: gates or projections.
    """
    WIDE = F64 if F64 in (X, A) else F32
    COMPLEX = GATE not in (GIVEN_REAL, SIGMOID)

    def run(pointer: Any) -> None:
        p = carray(pointer, (MAX_ARGUMENTS,))
        last = p[D] - LANES
        while True:
            item = take_ticket(pointer, 0)
            if item >= p[2]:
                break
            sequence, first, end = place(p, item)
            b, begin, steps, chunk = stretch(p, p[DOCUMENTS], p[T], sequence, CHUNK)
            carry, carry_im = row_of(p, CARRY, sequence, 0), row_of(p, CARRY_IM, sequence, 0)
            for t in range(begin, begin + steps):
                if (t - begin) % CHUNK == 0:
                    _keep(p, sequence, chunk + (t - begin) // CHUNK, first, end, COMPLEX, WIDE, LANES)
                k_row, v_row, q_row = row_of(p, K, b, t), row_of(p, V, b, t), row_of(p, Q, b, t)
                a_row, a_row_im = row_of(p, P, b, t), row_of(p, P_IM, b, t)
                s_row, y_row = row_of(p, S, b, t), row_of(p, Y, b, t)
                if resets(p, b, t):
                    # Neither the state nor the gate is multiplied: what is not finite times 0 is NaN.
                    for n in range(first, end):
                        c = min(n * LANES, last)
                        u, u_im, m, rest = _read_gate(GATE, A, WIDE, STRIDED, LANES, p, a_row, a_row_im, c, n)
                        added = _read_input(GATE, X, STRIDED, LANES, p, k_row, v_row, c, m, rest)
                        new = zeros(WIDE, LANES) + added
                        store(carry, n * LANES, new, WIDE)
                        if COMPLEX:
                            store(carry_im, n * LANES, zeros(WIDE, LANES), WIDE)
                        y = fetch(q_row, c, p[Q + 3], X, LANES, STRIDED) * new
                        if SWISH:
                            gain, _ = silu(fetch(s_row, c, p[S + 3], X, LANES, STRIDED))
                            y = y * gain
                        store(y_row, c, y, X)
                    continue
                for n in range(first, end):
                    c = min(n * LANES, last)
                    if not STRIDED:
                        _ask(GATE, X, A, SWISH, p, b, t + AHEAD, c)
                    u, u_im, m, rest = _read_gate(GATE, A, WIDE, STRIDED, LANES, p, a_row, a_row_im, c, n)
                    added = _read_input(GATE, X, STRIDED, LANES, p, k_row, v_row, c, m, rest)
                    a = m if GATE == SIGMOID else (u if GATE in (GIVEN_REAL, GIVEN_COMPLEX) else u * m)
                    h = load(carry, n * LANES, WIDE, LANES)
                    new = fma(a, h, added)
                    if COMPLEX:
                        a_im = u_im if GATE == GIVEN_COMPLEX else u_im * m
                        h_im = load(carry_im, n * LANES, WIDE, LANES)
                        new = fms(a_im, h_im, new)
                        store(carry_im, n * LANES, fma(a, h_im, a_im * h), WIDE)
                    store(carry, n * LANES, new, WIDE)
                    y = fetch(q_row, c, p[Q + 3], X, LANES, STRIDED) * new
                    if SWISH:
                        gain, _ = silu(fetch(s_row, c, p[S + 3], X, LANES, STRIDED))
                        y = y * gain
                    store(y_row, c, y, X)

    return run


@njit
def _keep(p: Any, sequence: int, chunk: int, first: int, end: int, complex_: Any, wide: Any, lanes: Any) -> None:
    """The state before a chunk, for the backward pass."""
    for n in range(first, end):
        h = load(row_of(p, CARRY, sequence, 0), n * lanes, wide, lanes)
        store(row_of(p, BEFORE, chunk, 0), n * lanes, h, wide)
        if complex_:
            h_im = load(row_of(p, CARRY_IM, sequence, 0), n * lanes, wide, lanes)
            store(row_of(p, BEFORE_IM, chunk, 0), n * lanes, h_im, wide)


@kernel
def loop_backward(X: int, A: int, GATE: int, SWISH: bool, STRIDED: bool, LANES: int) -> Callable[[Any], None]:
    """Gradients of q, k, v, s, of gates or projections and of biases (partial sums per chunk); chunks from the last.

    The carry is the gradient that reaches the step before: conj(a) times that of a step's state.
    """
    WIDE = F64 if F64 in (X, A) else F32
    COMPLEX = GATE not in (GIVEN_REAL, SIGMOID)
    # Per step and vector in scratch: u, m and rest of the gate, the state before the step.
    SLOTS = 6 if COMPLEX else 3
    U_IM, M, REST, H, H_IM = (1, 2, 3, 4, 5) if COMPLEX else (0, 0, 1, 2, 2)

    def run(pointer: Any) -> None:
        p = carray(pointer, (MAX_ARGUMENTS,))
        last = p[D] - LANES
        room = p[SCRATCH] + take_ticket(pointer, 1) * p[ROOM]
        fraction = real_number(p[FRACTION])
        item, left = 0, 0
        while True:
            if left == 0:
                item = take_ticket(pointer, 0)
                if item >= p[2]:
                    break
            sequence, first, end = place(p, item)
            b, begin, steps, chunk = stretch(p, p[DOCUMENTS], p[T], sequence, CHUNK)
            left = (left if left > 0 else (steps + CHUNK - 1) // CHUNK) - 1
            if left < 0:
                left = 0
                continue
            chunk += left
            start, stop = begin + left * CHUNK, begin + min((left + 1) * CHUNK, steps)
            stride = (end - first) * SLOTS * LANES
            cell = 0
            for n in range(first, end):
                store(room, cell + H * LANES, load(row_of(p, BEFORE, chunk, 0), n * LANES, WIDE, LANES), WIDE)
                if COMPLEX:
                    h_im = load(row_of(p, BEFORE_IM, chunk, 0), n * LANES, WIDE, LANES)
                    store(room, cell + H_IM * LANES, h_im, WIDE)
                cell += SLOTS * LANES
            cell = 0
            for t in range(start, stop):
                k_row, v_row = row_of(p, K, b, t), row_of(p, V, b, t)
                a_row, a_row_im = row_of(p, P, b, t), row_of(p, P_IM, b, t)
                anew = resets(p, b, t)
                for n in range(first, end):
                    c = min(n * LANES, last)
                    if not STRIDED:
                        _ask_rest(GATE, X, A, SWISH, p, b, t, c)
                    u, u_im, m, rest = _read_gate(GATE, A, WIDE, STRIDED, LANES, p, a_row, a_row_im, c, n)
                    m = u if GATE == GIVEN_REAL else m
                    added = _read_input(GATE, X, STRIDED, LANES, p, k_row, v_row, c, m, rest)
                    h = zeros(WIDE, LANES) if anew else load(room, cell + H * LANES, WIDE, LANES)
                    if COMPLEX:
                        h_im = zeros(WIDE, LANES) if anew else load(room, cell + H_IM * LANES, WIDE, LANES)
                        a, a_im = u * m, u_im * m
                        if anew:
                            a, a_im = zeros(WIDE, LANES), zeros(WIDE, LANES)
                        store(room, cell, u, WIDE)
                        store(room, cell + U_IM * LANES, u_im, WIDE)
                        store(room, cell + stride + H * LANES, fms(a_im, h_im, fma(a, h, added)), WIDE)
                        store(room, cell + stride + H_IM * LANES, fma(a, h_im, a_im * h), WIDE)
                    else:
                        a = zeros(WIDE, LANES) if anew else m
                        store(room, cell + stride + H * LANES, fma(a, h, added), WIDE)
                    store(room, cell + M * LANES, m, WIDE)
                    store(room, cell + REST * LANES, rest, WIDE)
                    cell += SLOTS * LANES
            carry, carry_im = row_of(p, CARRY, sequence, 0), row_of(p, CARRY_IM, sequence, 0)
            for t in range(stop - 1, start - 1, -1):
                cell, anew = (t - start) * stride, resets(p, b, t)
                k_row, v_row = row_of(p, K, b, t), row_of(p, V, b, t)
                q_row, s_row, dy_row = row_of(p, Q, b, t), row_of(p, S, b, t), row_of(p, DY, b, t)
                dq_row, dk_row, dv_row = row_of(p, DQ, b, t), row_of(p, DK, b, t), row_of(p, DV, b, t)
                dp_row, dp_row_im, ds_row = row_of(p, DP, b, t), row_of(p, DP_IM, b, t), row_of(p, DS, b, t)
                for n in range(first, end):
                    c = min(n * LANES, last)
                    if not STRIDED:
                        _ask_inputs(GATE, X, A, p, b, t - CHUNK, c)
                    before = zeros(WIDE, LANES) if anew else load(room, cell + H * LANES, WIDE, LANES)
                    now = load(room, cell + stride + H * LANES, WIDE, LANES)
                    m = load(room, cell + M * LANES, WIDE, LANES)
                    rest = load(room, cell + REST * LANES, WIDE, LANES)
                    u = load(room, cell, WIDE, LANES)
                    u_im = load(room, cell + U_IM * LANES, WIDE, LANES)
                    dy = fetch(dy_row, c, p[DY + 3], X, LANES, STRIDED)
                    q = fetch(q_row, c, p[Q + 3], X, LANES, STRIDED)
                    dq = now * dy
                    pulled = q * dy
                    if SWISH:
                        gain, slope = silu(fetch(s_row, c, p[S + 3], X, LANES, STRIDED))
                        store(ds_row, c, (dq * q) * slope, X)
                        dq = dq * gain
                        pulled = pulled * gain
                    store(dq_row, c, dq, X)
                    g = pulled + load(carry, n * LANES, WIDE, LANES)
                    g_im = g
                    if COMPLEX:
                        g_im = load(carry_im, n * LANES, WIDE, LANES)
                        a, a_im = u * m, u_im * m
                        store(carry, n * LANES, fma(a, g, a_im * g_im), WIDE)
                        store(carry_im, n * LANES, fms(a_im, g, a * g_im), WIDE)
                    else:
                        store(carry, n * LANES, m * g, WIDE)
                    v = fetch(v_row, c, p[V + 3], X, LANES, STRIDED)
                    # A gate that only forgets has no gradient, not even where g is not finite.
                    da = zeros(WIDE, LANES) if anew else g * before
                    if GATE == SIGMOID:
                        store(dv_row, c, g, X)
                        store(dp_row, c, (da * (m * rest)) * fraction, A)
                    else:
                        k = fetch(k_row, c, p[K + 3], X, LANES, STRIDED)
                        scaled = g
                        if GATE == RING:
                            scaled = g * input_scale(m, rest)
                        store(dk_row, c, scaled * v, X)
                        store(dv_row, c, scaled * k, X)
                        if COMPLEX:
                            before_im = zeros(WIDE, LANES) if anew else load(room, cell + H_IM * LANES, WIDE, LANES)
                            da_im = da
                            if not anew:
                                da = fma(g_im, before_im, da)
                                da_im = fms(g, before_im, g_im * before)
                            dz, dz_im = projection_gradient(GATE, u, u_im, m, rest, da, da_im)
                            if GATE == RING:
                                dz = fms((g * k) * v, input_scale_slope(m, rest), dz)
                                sums = load(row_of(p, DBIAS, chunk, 0), n * LANES, WIDE, LANES)
                                store(row_of(p, DBIAS, chunk, 0), n * LANES, sums + dz, WIDE)
                                sums = load(row_of(p, DBIAS_IM, chunk, 0), n * LANES, WIDE, LANES)
                                store(row_of(p, DBIAS_IM, chunk, 0), n * LANES, sums + dz_im, WIDE)
                            if GATE == GIVEN_COMPLEX:
                                store(dp_row, c, dz, A)
                                store(dp_row_im, c, dz_im, A)
                            else:
                                store_pairs(dp_row, c, dz * fraction, dz_im * fraction, A)
                        else:
                            store(dp_row, c, da, A)
                    cell += SLOTS * LANES
                if anew:
                    clear(carry, first, end, WIDE, LANES)
                    if COMPLEX:
                        clear(carry_im, first, end, WIDE, LANES)

    return run
