"""Kernels of the elementwise recurrences: one thread runs a block of channels of one row of the batch through time.

B batch, T time, D channels. A sequence is a row of the batch, or a document packed among others in a row. A block's
state stays in the cache; every number of the inputs is read once from memory and every result written once. Where D is
not a multiple of the lanes the last vector overlaps the one before: its channels are computed twice, to the same bits.
Arguments: see `numba_cpu.py`, which fills them in this order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import carray, njit

from gateloop_transformer.ops.backends.numba_cache import kernel
from gateloop_transformer.ops.backends.numba_launch import HEADER
from gateloop_transformer.ops.backends.numba_simd import (
    F32,
    F64,
    ITEM_SIZE,
    byte,
    fma,
    fms,
    gather,
    load,
    prefetch,
    store,
    take_ticket,
    zeros,
)

# Steps between two states that the forward pass keeps for the backward pass.
CHUNK = 16
MAX_ARGUMENTS = 96


@njit
def fetch(row: Any, channel: Any, stride: Any, kind: Any, lanes: Any, strided: Any) -> Any:
    """One vector of an operand: neighbours, or numbers apart."""
    return gather(row, channel, stride, kind, lanes) if strided else load(row, channel, kind, lanes)


# Arguments that all kernels begin with. BLOCKS: of channels in a row of the batch; WIDTH: vectors in a block; SCRATCH,
# ROOM: address and size of a thread's memory; DOCUMENTS: see `stretch`; RESETS: an operand, see `row_of`, of bytes.
BLOCKS, VECTORS, WIDTH, T, D, SCRATCH, ROOM, DOCUMENTS, RESETS = range(HEADER, HEADER + 9)
OPERANDS = HEADER + 12
# Steps that memory is asked for ahead: the processor's own guesses end at every page.
AHEAD = 8


@njit
def row_of(p: Any, operand: int, b: int, t: int) -> Any:
    """The address of an operand's first channel. An operand is four integers: its address, the strides of
    batch and time in bytes, the stride of channels in numbers.
    """
    return p[operand] + b * p[operand + 1] + t * p[operand + 2]


@njit
def place(p: Any, item: int) -> Any:
    """What an item is: its sequence, its first vector and the one after its last."""
    first = (item % p[BLOCKS]) * p[WIDTH]
    return item // p[BLOCKS], first, min(first + p[WIDTH], p[VECTORS])


@njit
def stretch(p: Any, documents: int, T: int, n: int, chunk: int) -> Any:
    """Where sequence n lies: its row of the batch, its first step, its steps, and how many chunks (of `chunk` steps)
    the sequences before it have. `documents`: where the arguments list these three numbers for each document; 0 for
    rows of one length.
    """
    if documents == 0:
        return n, 0, T, n * ((T + chunk - 1) // chunk)
    at = documents + 3 * n
    return 0, p[at], p[at + 1], p[at + 2]


@njit
def begins(p: Any, marks: int, b: int, t: int) -> Any:
    """Whether a step begins anew. `marks`: an operand of bytes; its address is 0 where no step does."""
    return p[marks] != 0 and byte(row_of(p, marks, b, t)) != 0


@njit
def resets(p: Any, b: int, t: int) -> Any:
    """Whether a step begins anew, where the marks stand in their usual place."""
    return begins(p, RESETS, b, t)


@njit
def clear(state: int, first: int, end: int, kind: Any, lanes: Any) -> None:
    """Zero for some vectors of a state."""
    for n in range(first, end):
        store(state, n * lanes, zeros(kind, lanes), kind)


# ---- h[t] = a[t] h[t-1] + x[t] ---------------------------------------------------------------------------

# The carry is the running state (sequences, lanes of all vectors): where vectors overlap, each has its own.
SCAN_A, SCAN_A_IM, SCAN_X, SCAN_X_IM, SCAN_H, SCAN_H_IM, SCAN_CARRY, SCAN_CARRY_IM = range(OPERANDS, OPERANDS + 32, 4)


@kernel
def scan_forward(
    A: int, X: int, H: int, COMPLEX_A: bool, COMPLEX_X: bool, STRIDED: bool, LANES: int
) -> Callable[[Any], None]:
    """All states. A, X, H: how gates, inputs and states lie in memory."""
    WIDE = F64 if F64 in (A, X, H) else F32
    COMPLEX = COMPLEX_A or COMPLEX_X

    def run(pointer: Any) -> None:
        p = carray(pointer, (MAX_ARGUMENTS,))
        last = p[D] - LANES
        while True:
            item = take_ticket(pointer, 0)
            if item >= p[2]:
                break
            sequence, first, end = place(p, item)
            b, begin, steps, _ = stretch(p, p[DOCUMENTS], p[T], sequence, CHUNK)
            carry, carry_im = row_of(p, SCAN_CARRY, sequence, 0), row_of(p, SCAN_CARRY_IM, sequence, 0)
            for t in range(begin, begin + steps):
                a_row, a_row_im = row_of(p, SCAN_A, b, t), row_of(p, SCAN_A_IM, b, t)
                x_row, x_row_im = row_of(p, SCAN_X, b, t), row_of(p, SCAN_X_IM, b, t)
                h_row, h_row_im = row_of(p, SCAN_H, b, t), row_of(p, SCAN_H_IM, b, t)
                if resets(p, b, t):
                    # Neither the state nor the gate is looked at: what is not finite times 0 is NaN.
                    for n in range(first, end):
                        c = min(n * LANES, last)
                        x = fetch(x_row, c, p[SCAN_X + 3], X, LANES, STRIDED)
                        store(carry, n * LANES, x, WIDE)
                        store(h_row, c, x, H)
                        if COMPLEX:
                            x_im = zeros(WIDE, LANES)
                            if COMPLEX_X:
                                x_im = fetch(x_row_im, c, p[SCAN_X_IM + 3], X, LANES, STRIDED)
                            store(carry_im, n * LANES, x_im, WIDE)
                            store(h_row_im, c, x_im, H)
                    continue
                for n in range(first, end):
                    c = min(n * LANES, last)
                    if not STRIDED:
                        prefetch(a_row + AHEAD * p[SCAN_A + 2] + c * ITEM_SIZE[A])
                        prefetch(x_row + AHEAD * p[SCAN_X + 2] + c * ITEM_SIZE[X])
                    a = fetch(a_row, c, p[SCAN_A + 3], A, LANES, STRIDED)
                    x = fetch(x_row, c, p[SCAN_X + 3], X, LANES, STRIDED)
                    h = load(carry, n * LANES, WIDE, LANES)
                    new = fma(a, h, x)
                    if COMPLEX:
                        h_im = load(carry_im, n * LANES, WIDE, LANES)
                        new_im = a * h_im
                        if COMPLEX_A:
                            a_im = fetch(a_row_im, c, p[SCAN_A_IM + 3], A, LANES, STRIDED)
                            new = fms(a_im, h_im, new)
                            new_im = fma(a_im, h, new_im)
                        if COMPLEX_X:
                            new_im = new_im + fetch(x_row_im, c, p[SCAN_X_IM + 3], X, LANES, STRIDED)
                        store(carry_im, n * LANES, new_im, WIDE)
                        store(h_row_im, c, new_im, H)
                    store(carry, n * LANES, new, WIDE)
                    store(h_row, c, new, H)

    return run


SCAN_B_DH, SCAN_B_DH_IM, SCAN_B_A, SCAN_B_A_IM, SCAN_B_H, SCAN_B_H_IM, SCAN_B_START, SCAN_B_START_IM = range(
    OPERANDS, OPERANDS + 32, 4
)
SCAN_B_DA, SCAN_B_DA_IM, SCAN_B_DX, SCAN_B_DX_IM, SCAN_B_CARRY, SCAN_B_CARRY_IM = range(OPERANDS + 32, OPERANDS + 56, 4)


@kernel
def scan_backward(
    DH: int, A: int, H: int, X: int, COMPLEX_A: bool, COMPLEX_X: bool, COMPLEX: bool, STRIDED: bool, LANES: int
) -> Callable[[Any], None]:
    """Gradients of gates and inputs, every operand reversed in time. DH, A, H, X: how the gradient of the states, the
    gates, the states and the inputs lie in memory; COMPLEX: the states are. The carry is the gradient that reaches the
    step before: conj(a) times that of its state; START the state before the first step.
    """
    WIDE = F64 if F64 in (DH, A, H, X) else F32

    def run(pointer: Any) -> None:
        p = carray(pointer, (MAX_ARGUMENTS,))
        last = p[D] - LANES
        while True:
            item = take_ticket(pointer, 0)
            if item >= p[2]:
                break
            sequence, first, end = place(p, item)
            b, begin, steps, _ = stretch(p, p[DOCUMENTS], p[T], sequence, CHUNK)
            carry, carry_im = row_of(p, SCAN_B_CARRY, sequence, 0), row_of(p, SCAN_B_CARRY_IM, sequence, 0)
            start, start_im = row_of(p, SCAN_B_START, sequence, 0), row_of(p, SCAN_B_START_IM, sequence, 0)
            for t in range(begin, begin + steps):
                g_row, g_row_im = row_of(p, SCAN_B_DH, b, t), row_of(p, SCAN_B_DH_IM, b, t)
                a_row, a_row_im = row_of(p, SCAN_B_A, b, t), row_of(p, SCAN_B_A_IM, b, t)
                h_row, h_row_im = row_of(p, SCAN_B_H, b, t + 1), row_of(p, SCAN_B_H_IM, b, t + 1)
                da_row, da_row_im = row_of(p, SCAN_B_DA, b, t), row_of(p, SCAN_B_DA_IM, b, t)
                dx_row, dx_row_im = row_of(p, SCAN_B_DX, b, t), row_of(p, SCAN_B_DX_IM, b, t)
                final, anew = t + 1 == begin + steps, resets(p, b, t)
                for n in range(first, end):
                    c = min(n * LANES, last)
                    if not STRIDED:
                        prefetch(a_row + AHEAD * p[SCAN_B_A + 2] + c * ITEM_SIZE[A])
                        prefetch(g_row + AHEAD * p[SCAN_B_DH + 2] + c * ITEM_SIZE[DH])
                        prefetch(h_row + AHEAD * p[SCAN_B_H + 2] + c * ITEM_SIZE[H])
                    a = fetch(a_row, c, p[SCAN_B_A + 3], A, LANES, STRIDED)
                    g = fetch(g_row, c, p[SCAN_B_DH + 3], DH, LANES, STRIDED) + load(carry, n * LANES, WIDE, LANES)
                    if anew:
                        h = zeros(WIDE, LANES)
                    elif final:
                        h = load(start, n * LANES, WIDE, LANES)
                    else:
                        h = fetch(h_row, c, p[SCAN_B_H + 3], H, LANES, STRIDED)
                    da = g * h
                    pulled = a * g
                    if COMPLEX:
                        g_im = load(carry_im, n * LANES, WIDE, LANES)
                        g_im = g_im + fetch(g_row_im, c, p[SCAN_B_DH_IM + 3], DH, LANES, STRIDED)
                        if anew:
                            h_im = zeros(WIDE, LANES)
                        elif final:
                            h_im = load(start_im, n * LANES, WIDE, LANES)
                        else:
                            h_im = fetch(h_row_im, c, p[SCAN_B_H_IM + 3], H, LANES, STRIDED)
                        da = fma(g_im, h_im, da)
                        pulled_im = a * g_im
                        if COMPLEX_A:
                            a_im = fetch(a_row_im, c, p[SCAN_B_A_IM + 3], A, LANES, STRIDED)
                            pulled = fma(a_im, g_im, pulled)
                            pulled_im = fms(a_im, g, pulled_im)
                            da_im = zeros(WIDE, LANES) if anew else fms(g, h_im, g_im * h)
                            store(da_row_im, c, da_im, A)
                        if COMPLEX_X:
                            store(dx_row_im, c, g_im, X)
                        store(carry_im, n * LANES, pulled_im, WIDE)
                    store(carry, n * LANES, pulled, WIDE)
                    store(da_row, c, zeros(WIDE, LANES) if anew else da, A)
                    store(dx_row, c, g, X)
                if anew:
                    clear(carry, first, end, WIDE, LANES)
                    if COMPLEX:
                        clear(carry_im, first, end, WIDE, LANES)

    return run
