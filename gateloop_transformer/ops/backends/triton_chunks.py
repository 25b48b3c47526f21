"""Triton kernels of the gate loop with a matrix state, one gate per head: chunks of time as products of matrices.

B batch, T time, H heads, K key size, V value size; C steps per chunk, BK and BV channels of a block. Steps are counted
in the order of the scan. Derivation: docs/math.md.

Within a chunk D[i, j] = a[j+1] ··· a[i] for i ≥ j, else 0; P[i] is the product from its start to i, E[j] that from
after j to its end. Magnitudes in D are products, made by a scan along i for every j, and phases are unit numbers
U[i] = u[1] ··· u[i], so that D[i, j] = |D[i, j]| U[i] conj(U[j]): no logarithm, exponential or quotient of products,
hence exact at a gate of 0. A real gate is its own "magnitude", sign included.

In memory, for each chunk and head: products (ROWS, C), the state before it and the gradient of the state after it
(PARTS, K, V). PARTS is 2 for complex gates, real part first. A program's chunk is its first index, its head the second.

MUL is the type in which matrices are multiplied, WIDE that in which everything else is done and added up: see
`triton_matrix.py`. All offsets are 64 bits wide.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Rows of products: the gate's magnitude, real and imaginary parts of P and E, and U; the first three for real gates.
MAGNITUDE = tl.constexpr(0)
PREFIX = tl.constexpr(1)
SUFFIX = tl.constexpr(2)
PREFIX_IM = tl.constexpr(3)
SUFFIX_IM = tl.constexpr(4)
UNIT = tl.constexpr(5)
UNIT_IM = tl.constexpr(6)


@triton.jit
def _chunk(table: tl.tensor, T: tl.tensor, C: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr) -> tl.tensor:
    """Of this program: its place among all chunks and heads, its row, head, times (C,), and number of steps.

    The table has the first step of each chunk and how many it has, where documents are packed in one row.
    """
    n = tl.program_id(0)
    if PACKED:
        row = n * 0
        first = tl.load(table + 2 * n)
        steps = tl.load(table + 2 * n + 1)
    else:
        chunks = tl.cdiv(T, C)
        row = n // chunks
        first = n % chunks * C
        steps = tl.minimum(T - first, C)
    times = first + tl.arange(0, C)
    if REVERSE:
        times = T - 1 - times
    h = tl.program_id(1).to(tl.int64)
    return n.to(tl.int64) * tl.num_programs(1) + h, row.to(tl.int64), h, times.to(tl.int64), steps


@triton.jit
def _rows(x: tl.tensor, place: tl.tuple, row: tl.tensor, h: tl.tensor, times: tl.tensor) -> tl.tensor:
    """Where the steps of a head begin (C,); place: strides of row, time and head."""
    return x + row * place[0] + h * place[2] + times * place[1]


@triton.jit
def _tile(rows: tl.tensor, channels: tl.tensor, steps: tl.tensor, SIZE: tl.constexpr, C: tl.constexpr, MUL: tl.constexpr) -> tl.tensor:
    """(C, block) of a chunk's steps and some of SIZE channels, 0 where there is none."""
    there = (tl.arange(0, C) < steps)[:, None] & (channels < SIZE)[None, :]
    return tl.load(rows[:, None] + channels[None, :], mask=there, other=0.0).to(MUL)


@triton.jit
def _put(rows: tl.tensor, channels: tl.tensor, steps: tl.tensor, value: tl.tensor, SIZE: tl.constexpr, C: tl.constexpr) -> None:
    """The opposite of `_tile`."""
    there = (tl.arange(0, C) < steps)[:, None] & (channels < SIZE)[None, :]
    tl.store(rows[:, None] + channels[None, :], value.to(rows.dtype.element_ty), mask=there)


@triton.jit
def _state(states: tl.tensor, part: tl.tensor, k: tl.tensor, v: tl.tensor, K: tl.constexpr, V: tl.constexpr) -> tl.tensor:
    """A block (BK, BV) of part `part` of a state."""
    there = (k < K)[:, None] & (v < V)[None, :]
    return tl.load(states + part * K * V + k[:, None] * V + v[None, :], mask=there, other=0.0)


@triton.jit
def _dot(x: tl.tensor, y: tl.tensor, total: tl.tensor, MUL: tl.constexpr, PRECISION: tl.constexpr) -> tl.tensor:
    """total + x y, both rounded to MUL."""
    if PRECISION == "interpreter":
        # The interpreter multiplies the bits of bfloat16 numbers; products of these are exact in float32.
        return tl.dot(x.to(MUL).to(total.dtype), y.to(MUL).to(total.dtype), total)
    return tl.dot(x.to(MUL), y.to(MUL), total, input_precision=PRECISION)


@triton.jit
def _times(a: tl.tensor, b: tl.tensor, x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """(a + i·b)(x + i·y)."""
    return a * x - b * y, a * y + b * x


@triton.jit
def _polar(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """|a + i·b| and the number divided by it; 0 and 1 at 0. Squares neither overflow nor vanish."""
    large = tl.maximum(tl.abs(a), tl.abs(b))
    zero = large == 0
    x, y = a / tl.where(zero, 1.0, large), b / tl.where(zero, 1.0, large)
    length = tl.sqrt(tl.where(zero, 1.0, x * x + y * y))
    return large * length, tl.where(zero, 1.0, x / length), y / length


@triton.jit
def _decays(magnitude: tl.tensor, C: tl.constexpr) -> tl.tensor:
    """|D| (C, C)."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return tl.where(i >= j, tl.cumprod(tl.where(i > j, magnitude[:, None], 1.0), 0), 0.0)


@triton.jit
def _real_decays(products: tl.tensor, C: tl.constexpr, PARTS: tl.constexpr) -> tl.tensor:
    """Re D (C, C)."""
    step = tl.arange(0, C)
    decays = _decays(tl.load(products + MAGNITUDE * C + step), C)
    if PARTS == 2:
        c, s = tl.load(products + UNIT * C + step), tl.load(products + UNIT_IM * C + step)
        decays *= c[:, None] * c[None, :] + s[:, None] * s[None, :]
    return decays


@triton.jit
def gate_products(
    re: tl.tensor,
    im: tl.tensor,
    products: tl.tensor,
    table: tl.tensor,
    place: tl.tuple,
    T: tl.tensor,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
) -> None:
    """Products of gates (B, T, H) within each chunk, padded with 1."""
    slot, row, h, times, steps = _chunk(table, T, C, REVERSE, PACKED)
    products += slot * ROWS * C
    step = tl.arange(0, C)
    there, followed = step < steps, step + 1 < steps
    after = times - 1 if REVERSE else times + 1
    at, next_at = _rows(0, place, row, h, times), _rows(0, place, row, h, after)
    a = tl.load(re + at, mask=there, other=1.0).to(WIDE)
    next_a = tl.load(re + next_at, mask=followed, other=1.0).to(WIDE)
    if PARTS == 1:
        tl.store(products + MAGNITUDE * C + step, a)
        tl.store(products + PREFIX * C + step, tl.cumprod(a, 0))
        tl.store(products + SUFFIX * C + step, tl.cumprod(next_a, 0, reverse=True))
    else:
        b = tl.load(im + at, mask=there, other=0.0).to(WIDE)
        next_b = tl.load(im + next_at, mask=followed, other=0.0).to(WIDE)
        magnitude, c, s = _polar(a, b)
        c, s = tl.associative_scan((c, s), 0, _times)
        # Rounding of up to C factors moves U off the unit circle.
        length = tl.sqrt(c * c + s * s)
        prefix, prefix_im = tl.associative_scan((a, b), 0, _times)
        suffix, suffix_im = tl.associative_scan((next_a, next_b), 0, _times, reverse=True)
        tl.store(products + MAGNITUDE * C + step, magnitude)
        tl.store(products + PREFIX * C + step, prefix)
        tl.store(products + SUFFIX * C + step, suffix)
        tl.store(products + PREFIX_IM * C + step, prefix_im)
        tl.store(products + SUFFIX_IM * C + step, suffix_im)
        tl.store(products + UNIT * C + step, c / length)
        tl.store(products + UNIT_IM * C + step, s / length)


@triton.jit
def chunk_states(
    x: tl.tensor,
    y: tl.tensor,
    products: tl.tensor,
    states: tl.tensor,
    table: tl.tensor,
    x_place: tl.tuple,
    y_place: tl.tuple,
    T: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    MUL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ADJOINT: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
) -> None:
    """What a chunk adds to the state, Σ E[j] k[j] ⊗ v[j], or to its gradient, Σ conj(P[i]) q[i] ⊗ dy[i]."""
    slot, row, h, times, steps = _chunk(table, T, C, REVERSE, PACKED)
    products += slot * ROWS * C + tl.arange(0, C)
    states += slot * PARTS * K * V
    k = tl.program_id(2) // tl.cdiv(V, BV) * BK + tl.arange(0, BK)
    v = tl.program_id(2) % tl.cdiv(V, BV) * BV + tl.arange(0, BV)
    x = tl.trans(_tile(_rows(x, x_place, row, h, times), k, steps, K, C, WIDE))
    y = _tile(_rows(y, y_place, row, h, times), v, steps, V, C, MUL)
    at = k[:, None] * V + v[None, :]
    there = (k < K)[:, None] & (v < V)[None, :]
    weight = tl.load(products + (PREFIX if ADJOINT else SUFFIX) * C)
    zero = tl.zeros((BK, BV), WIDE)
    tl.store(states + at, _dot(x * weight[None, :], y, zero, MUL, PRECISION), mask=there)
    if PARTS == 2:
        weight = tl.load(products + (PREFIX_IM if ADJOINT else SUFFIX_IM) * C)
        weight = -weight if ADJOINT else weight
        tl.store(states + K * V + at, _dot(x * weight[None, :], y, zero, MUL, PRECISION), mask=there)


@triton.jit
def carry(
    states: tl.tensor,
    products: tl.tensor,
    re: tl.tensor,
    im: tl.tensor,
    borders: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    ADJOINT: tl.constexpr,
    PACKED: tl.constexpr,
) -> None:
    """From chunk to chunk: what each adds becomes the state before it, or the gradient of the state after it.

    `re` and `im` (sequences, H, K, V) are the first state, and become the last; programs are (sequence and head, block
    of the state's entries). `borders`: how many chunks lie before each document, and in all.
    """
    n, h = tl.program_id(0) // H, tl.program_id(0) % H
    first, last = n * tl.cdiv(T, C), (n + 1) * tl.cdiv(T, C)
    if PACKED:
        first, last = tl.load(borders + n), tl.load(borders + n + 1)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = entry < K * V
    at = tl.program_id(0).to(tl.int64) * K * V + entry
    state = tl.load(re + at, mask=there, other=0.0)
    turned = state
    if PARTS == 2:
        turned = tl.load(im + at, mask=there, other=0.0)
    for c in range(last - first):
        slot = (last - 1 - c if ADJOINT else first + c).to(tl.int64) * H + h
        place = states + slot * PARTS * K * V + entry
        whole = products + slot * ROWS * C + C - 1
        gate = tl.load(whole + PREFIX * C)
        added = tl.load(place, mask=there, other=0.0)
        tl.store(place, state, mask=there)
        if PARTS == 2:
            added_im = tl.load(place + K * V, mask=there, other=0.0)
            tl.store(place + K * V, turned, mask=there)
            gate_im = tl.load(whole + PREFIX_IM * C)
            gate_im = -gate_im if ADJOINT else gate_im
            state, turned = _times(gate, gate_im, state, turned)
            state, turned = state + added, turned + added_im
        else:
            state = gate * state + added
    tl.store(re + at, state, mask=there)
    if PARTS == 2:
        tl.store(im + at, turned, mask=there)


@triton.jit
def outputs(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    y: tl.tensor,
    products: tl.tensor,
    before: tl.tensor,
    table: tl.tensor,
    places: tl.tuple,
    T: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    MUL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
) -> None:
    """y = [(Q Kᵀ) ∘ Re D] V + Re(P ∘ (Q S)), S the state before the chunk. Programs: (chunk, head, block of values)."""
    slot, row, h, times, steps = _chunk(table, T, C, REVERSE, PACKED)
    products += slot * ROWS * C
    before += slot * PARTS * K * V
    q_rows, k_rows = _rows(q, places[0], row, h, times), _rows(k, places[1], row, h, times)
    value = tl.program_id(2) * BV + tl.arange(0, BV)
    scores = tl.zeros((C, C), WIDE)
    read = tl.zeros((C, BV), WIDE)
    read_im = tl.zeros((C, BV), WIDE)
    for start in range(0, K, BK):
        key = start + tl.arange(0, BK)
        x = _tile(q_rows, key, steps, K, C, MUL)
        scores = _dot(x, tl.trans(_tile(k_rows, key, steps, K, C, MUL)), scores, MUL, PRECISION)
        read = _dot(x, _state(before, 0, key, value, K, V), read, MUL, PRECISION)
        if PARTS == 2:
            read_im = _dot(x, _state(before, 1, key, value, K, V), read_im, MUL, PRECISION)
    scores *= _real_decays(products, C, PARTS)
    step = tl.arange(0, C)
    total = read * tl.load(products + PREFIX * C + step)[:, None]
    if PARTS == 2:
        total -= read_im * tl.load(products + PREFIX_IM * C + step)[:, None]
    x = _tile(_rows(v, places[2], row, h, times), value, steps, V, C, MUL)
    total = _dot(scores, x, total, MUL, PRECISION)
    _put(_rows(y, places[3], row, h, times), value, steps, total, V, C)
