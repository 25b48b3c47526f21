"""Triton kernels of the gate loop with a matrix state, one gate per head: chunks of time as products of matrices.

B batch, T time, H heads, K key size, V value size; C steps per chunk, BK and BV (BM and BN) channels of a block. Steps
are counted in the order of the scan. Derivation: docs/math.md.

Within a chunk D[i, j] = a[j+1] ··· a[i] for i ≥ j, else 0; P[i] is the product from its start to i, E[j] that from
after j to its end. Magnitudes in D are products, made by a scan along i for every j, and phases are unit numbers
U[i] = u[1] ··· u[i], so that D[i, j] = |D[i, j]| U[i] conj(U[j]): no logarithm, exponential or quotient of products,
hence exact at a gate of 0. A real gate is its own "magnitude", sign included.

With S the state before a chunk, G the gradient of the state after it, s = Q Kᵀ and r = dY Vᵀ,

    y  = [s ∘ Re D] V    + Re(P ∘ (Q S))            dk = [r ∘ Re D]ᵀ Q  + Re(conj(E) ∘ (V Gᵀ))
    dq = [r ∘ Re D] K    + Re(P ∘ (dY Sᵀ))          dv = [s ∘ Re D]ᵀ dY + Re(conj(E) ∘ (K G))

which is one kernel, `attend`. The gradient of gates, exact at 0 like D:

    da[t] = Σ_{i ≥ t > j} W[i, j] conj(D[i, t] D[t-1, j])        W = s ∘ r

where W has one column more for the state before the chunk, conj(Σ S q[i] dy[i]), and what G gives joins its last row:
Σ G k[j] v[j], and in the corner Σ G conj(S).

In memory, for each chunk and head: products (ROWS, C), S and G (PARTS, K, V). PARTS is 2 for complex gates, real part
first. A program's chunk is its first index, its head the second. MUL is the type in which matrices are multiplied, WIDE
that in which all else is done and added up: see `triton_matrix.py`. All offsets are 64 bits wide.
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
def _tile(
    rows: tl.tensor, channels: tl.tensor, steps: tl.tensor, SIZE: tl.constexpr, C: tl.constexpr, MUL: tl.constexpr
) -> tl.tensor:
    """(C, block) of a chunk's steps and some of SIZE channels, 0 where there is none."""
    there = (tl.arange(0, C) < steps)[:, None] & (channels < SIZE)[None, :]
    return tl.load(rows[:, None] + channels[None, :], mask=there, other=0.0).to(MUL)


@triton.jit
def _put(
    rows: tl.tensor, channels: tl.tensor, steps: tl.tensor, value: tl.tensor, SIZE: tl.constexpr, C: tl.constexpr
) -> None:
    """The opposite of `_tile`."""
    there = (tl.arange(0, C) < steps)[:, None] & (channels < SIZE)[None, :]
    tl.store(rows[:, None] + channels[None, :], value.to(rows.dtype.element_ty), mask=there)


@triton.jit
def _state(
    states: tl.tensor, m: tl.tensor, n: tl.tensor, M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr
) -> tl.tensor:
    """A block of a part of a state (M, N), or of the transpose of one (N, M)."""
    at = n[None, :] * M + m[:, None] if TRANSPOSED else m[:, None] * N + n[None, :]
    return tl.load(states + at, mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)


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
def _conjugate_times(a: tl.tensor, b: tl.tensor, x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """conj(a + i·b)(x + i·y)."""
    return a * x + b * y, a * y - b * x


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


@triton.jit(do_not_specialize=["T"])
def gate_products(
    re: tl.tensor,
    im: tl.tensor,
    products: tl.tensor,
    table: tl.tensor,
    place: tl.tuple,
    T: tl.tensor,
    G: tl.constexpr,
    BG: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
) -> None:
    """Products of gates (B, T, H, G) within each chunk, padded with 1. Programs: (chunk, head, block of G)."""
    slot, row, h, times, steps = _chunk(table, T, C, REVERSE, PACKED)
    step = tl.arange(0, C)
    g = tl.program_id(2) * BG + tl.arange(0, BG)
    products += slot * ROWS * C * G + step[:, None] * G + g[None, :]
    known = (g < G)[None, :] & (step >= 0)[:, None]
    there, followed = known & (step < steps)[:, None], known & (step + 1 < steps)[:, None]
    after = times - 1 if REVERSE else times + 1
    at = _rows(0, place, row, h, times)[:, None] + g[None, :]
    next_at = _rows(0, place, row, h, after)[:, None] + g[None, :]
    a = tl.load(re + at, mask=there, other=1.0).to(WIDE)
    next_a = tl.load(re + next_at, mask=followed, other=1.0).to(WIDE)
    if PARTS == 1:
        tl.store(products + MAGNITUDE * C * G, a, mask=known)
        tl.store(products + PREFIX * C * G, tl.cumprod(a, 0), mask=known)
        tl.store(products + SUFFIX * C * G, tl.cumprod(next_a, 0, reverse=True), mask=known)
    else:
        b = tl.load(im + at, mask=there, other=0.0).to(WIDE)
        next_b = tl.load(im + next_at, mask=followed, other=0.0).to(WIDE)
        magnitude, c, s = _polar(a, b)
        c, s = tl.associative_scan((c, s), 0, _times)
        # Rounding of up to C factors moves U off the unit circle.
        length = tl.sqrt(c * c + s * s)
        prefix, prefix_im = tl.associative_scan((a, b), 0, _times)
        suffix, suffix_im = tl.associative_scan((next_a, next_b), 0, _times, reverse=True)
        tl.store(products + MAGNITUDE * C * G, magnitude, mask=known)
        tl.store(products + PREFIX * C * G, prefix, mask=known)
        tl.store(products + SUFFIX * C * G, suffix, mask=known)
        tl.store(products + PREFIX_IM * C * G, prefix_im, mask=known)
        tl.store(products + SUFFIX_IM * C * G, suffix_im, mask=known)
        tl.store(products + UNIT * C * G, c / length, mask=known)
        tl.store(products + UNIT_IM * C * G, s / length, mask=known)


@triton.jit
def _weights(products: tl.tensor, row: tl.constexpr, k: tl.tensor, G: tl.constexpr, C: tl.constexpr) -> tl.tensor:
    """A row of products as (BK or 1, C), for channels k; 0 where there is none."""
    at = products + row * C * G + tl.arange(0, C)[None, :] * G
    return tl.load(at) if G == 1 else tl.load(at + k[:, None], mask=(k < G)[:, None], other=0.0)


@triton.jit(do_not_specialize=["T"])
def chunk_states(
    x: tl.tensor,
    y: tl.tensor,
    products: tl.tensor,
    states: tl.tensor,
    table: tl.tensor,
    places: tl.tuple,
    T: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    G: tl.constexpr,
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
    products += slot * ROWS * C * G
    states += slot * PARTS * K * V
    k = tl.program_id(2) // tl.cdiv(V, BV) * BK + tl.arange(0, BK)
    v = tl.program_id(2) % tl.cdiv(V, BV) * BV + tl.arange(0, BV)
    x = tl.trans(_tile(_rows(x, places[0], row, h, times), k, steps, K, C, WIDE))
    y = _tile(_rows(y, places[1], row, h, times), v, steps, V, C, MUL)
    at = k[:, None] * V + v[None, :]
    there = (k < K)[:, None] & (v < V)[None, :]
    weight = _weights(products, PREFIX if ADJOINT else SUFFIX, k, G, C)
    zero = tl.zeros((BK, BV), WIDE)
    tl.store(states + at, _dot(x * weight, y, zero, MUL, PRECISION), mask=there)
    if PARTS == 2:
        weight = _weights(products, PREFIX_IM if ADJOINT else SUFFIX_IM, k, G, C)
        weight = -weight if ADJOINT else weight
        tl.store(states + K * V + at, _dot(x * weight, y, zero, MUL, PRECISION), mask=there)


@triton.jit(do_not_specialize=["T", "H"])
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
    G: tl.constexpr,
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
    gated = entry // V if G > 1 else entry * 0
    if PARTS == 2:
        turned = tl.load(im + at, mask=there, other=0.0)
    for c in range(last - first):
        slot = (last - 1 - c if ADJOINT else first + c).to(tl.int64) * H + h
        place = states + slot * PARTS * K * V + entry
        whole = products + (slot * ROWS * C + C - 1) * G + gated
        gate = tl.load(whole + PREFIX * C * G, mask=there, other=0.0)
        added = tl.load(place, mask=there, other=0.0)
        tl.store(place, state, mask=there)
        if PARTS == 2:
            added_im = tl.load(place + K * V, mask=there, other=0.0)
            tl.store(place + K * V, turned, mask=there)
            gate_im = tl.load(whole + PREFIX_IM * C * G, mask=there, other=0.0)
            gate_im = -gate_im if ADJOINT else gate_im
            state, turned = _times(gate, gate_im, state, turned)
            state, turned = state + added, turned + added_im
        else:
            state = gate * state + added
    tl.store(re + at, state, mask=there)
    if PARTS == 2:
        tl.store(im + at, turned, mask=there)


@triton.jit(do_not_specialize=["T"])
def attend(
    x: tl.tensor,
    y: tl.tensor,
    z: tl.tensor,
    out: tl.tensor,
    partner: tl.tensor,
    products: tl.tensor,
    states: tl.tensor,
    sums: tl.tensor,
    table: tl.tensor,
    places: tl.tuple,
    T: tl.tensor,
    M: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    MUL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ADJOINT: tl.constexpr,
    SUMS: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
) -> None:
    """out = [(X Yᵀ) ∘ Re D] Z + Re(P ∘ (X S)); adjoint with Dᵀ and conj(E). Programs: (chunk, head, block of N).

    x and y have M channels, z, out and partner N. With SUMS, rows of partner ∘ conj(X S), or adjoint partner ∘ (X S),
    are added up into sums (chunks, heads, blocks of N, PARTS, C).
    """
    slot, row, h, times, steps = _chunk(table, T, C, REVERSE, PACKED)
    products += slot * ROWS * C
    states += slot * PARTS * M * N
    x_rows, y_rows = _rows(x, places[0], row, h, times), _rows(y, places[1], row, h, times)
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    scores = tl.zeros((C, C), WIDE)
    read, turned = tl.zeros((C, BN), WIDE), tl.zeros((C, BN), WIDE)
    for start in range(0, M, BM):
        m = start + tl.arange(0, BM)
        block = _tile(x_rows, m, steps, M, C, MUL)
        scores = _dot(block, tl.trans(_tile(y_rows, m, steps, M, C, MUL)), scores, MUL, PRECISION)
        read = _dot(block, _state(states, m, n, M, N, TRANSPOSED), read, MUL, PRECISION)
        if PARTS == 2:
            turned = _dot(block, _state(states + M * N, m, n, M, N, TRANSPOSED), turned, MUL, PRECISION)
    decays = _real_decays(products, C, PARTS)
    scores *= tl.trans(decays) if ADJOINT else decays
    step = tl.arange(0, C)
    total = read * tl.load(products + (SUFFIX if ADJOINT else PREFIX) * C + step)[:, None]
    if PARTS == 2:
        turned = turned if ADJOINT else -turned
        total += turned * tl.load(products + (SUFFIX_IM if ADJOINT else PREFIX_IM) * C + step)[:, None]
    total = _dot(scores, _tile(_rows(z, places[2], row, h, times), n, steps, N, C, MUL), total, MUL, PRECISION)
    _put(_rows(out, places[3], row, h, times), n, steps, total, N, C)
    if SUMS:
        sums += (slot * tl.num_programs(2) + tl.program_id(2)) * PARTS * C + step
        block = _tile(_rows(partner, places[4], row, h, times), n, steps, N, C, WIDE)
        tl.store(sums, tl.sum(block * read, 1))
        if PARTS == 2:
            tl.store(sums + C, tl.sum(block * turned, 1))


@triton.jit
def _scores(
    x: tl.tensor,
    y: tl.tensor,
    steps: tl.tensor,
    M: tl.constexpr,
    BM: tl.constexpr,
    C: tl.constexpr,
    MUL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """X Yᵀ (C, C)."""
    scores = tl.zeros((C, C), WIDE)
    for start in range(0, M, BM):
        m = start + tl.arange(0, BM)
        block = _tile(x, m, steps, M, C, MUL)
        scores = _dot(block, tl.trans(_tile(y, m, steps, M, C, MUL)), scores, MUL, PRECISION)
    return scores


@triton.jit
def _total(
    sums: tl.tensor, BLOCKS: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr
) -> tl.tensor:
    """Sums (C,) over blocks, always in the same order."""
    total = tl.zeros((C,), WIDE)
    for block in range(BLOCKS):
        total += tl.load(sums + block * PARTS * C + tl.arange(0, C))
    return total


@triton.jit
def _corner(
    before: tl.tensor,
    after: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
) -> tl.tensor:
    """Σ G conj(S), real and imaginary part; SIZE: entries of a state."""
    total, turned = tl.zeros((BLOCK,), WIDE), tl.zeros((BLOCK,), WIDE)
    for start in range(0, SIZE, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        there = entry < SIZE
        S, G = tl.load(before + entry, mask=there, other=0.0), tl.load(after + entry, mask=there, other=0.0)
        total += G * S
        if PARTS == 2:
            S_im = tl.load(before + SIZE + entry, mask=there, other=0.0)
            G_im = tl.load(after + SIZE + entry, mask=there, other=0.0)
            total += G_im * S_im
            turned += G_im * S - G * S_im
    return tl.sum(total, 0), tl.sum(turned, 0)


@triton.jit
def _decays_before(products: tl.tensor, C: tl.constexpr) -> tl.tensor:
    """|D[t-1, j]| in row t for t > j, else 0."""
    step = tl.arange(0, C)
    previous = tl.load(products + MAGNITUDE * C + step - 1, mask=step > 0, other=1.0)
    t, j = step[:, None], step[None, :]
    return tl.where(t > j, tl.cumprod(tl.where(t > j + 1, previous[:, None], 1.0), 0), 0.0)


@triton.jit(do_not_specialize=["T"])
def gate_gradients(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    dy: tl.tensor,
    da: tl.tensor,
    da_im: tl.tensor,
    products: tl.tensor,
    before: tl.tensor,
    after: tl.tensor,
    starts: tl.tensor,
    ends: tl.tensor,
    table: tl.tensor,
    places: tl.tuple,
    T: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    MUL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
) -> None:
    """da (B, T, H). Programs: (chunk, head). `starts` and `ends`: what `attend` added up for dq and dk, in BLOCKS."""
    slot, row, h, times, steps = _chunk(table, T, C, REVERSE, PACKED)
    products += slot * ROWS * C
    starts += slot * BLOCKS * PARTS * C
    ends += slot * BLOCKS * PARTS * C
    place = slot * PARTS * K * V
    corner, corner_im = _corner(before + place, after + place, K * V, BLOCK, PARTS, WIDE)
    x, y = _rows(q, places[0], row, h, times), _rows(k, places[1], row, h, times)
    W = _scores(x, y, steps, K, BK, C, MUL, WIDE, PRECISION)
    x, y = _rows(dy, places[3], row, h, times), _rows(v, places[2], row, h, times)
    W *= _scores(x, y, steps, V, BV, C, MUL, WIDE, PRECISION)
    step = tl.arange(0, C)
    there, later, last = step < steps, step > 0, step == C - 1
    D = tl.trans(_decays(tl.load(products + MAGNITUDE * C + step), C))
    start = _total(starts, BLOCKS, PARTS, C, WIDE) + tl.where(last, corner, 0.0)
    W += tl.where(last[:, None], _total(ends, BLOCKS, PARTS, C, WIDE)[None, :], 0.0)
    zero = tl.zeros((C, C), WIDE)
    if PARTS == 1:
        start = tl.sum(D * start[None, :], 1)
        X = _dot(D, W, zero, WIDE, PRECISION) * _decays_before(products, C)
        P_before = tl.load(products + PREFIX * C + step - 1, mask=later, other=1.0)
        tl.store(_rows(da, places[4], row, h, times), tl.sum(X, 1) + start * P_before, mask=there)
    else:
        start_im = _total(starts + C, BLOCKS, PARTS, C, WIDE) + tl.where(last, corner_im, 0.0)
        W_im = tl.where(last[:, None], _total(ends + C, BLOCKS, PARTS, C, WIDE)[None, :], 0.0)
        # What is times conj(D[i, t]) = |D[i, t]| conj(U[i]) U[t], left without U[t] until the end.
        c, s = tl.load(products + UNIT * C + step), tl.load(products + UNIT_IM * C + step)
        start, start_im = _conjugate_times(c, s, start, start_im)
        start, start_im = tl.sum(D * start[None, :], 1), tl.sum(D * start_im[None, :], 1)
        X = _dot(D, c[:, None] * W + s[:, None] * W_im, zero, WIDE, PRECISION)
        X_im = _dot(D, c[:, None] * W_im - s[:, None] * W, zero, WIDE, PRECISION)
        # Times conj(D[t-1, j]) = |D[t-1, j]| conj(U[t-1]) U[j], and conj(P[t-1]) for the start.
        D = _decays_before(products, C)
        total = tl.sum(D * (X * c[None, :] - X_im * s[None, :]), 1)
        total_im = tl.sum(D * (X * s[None, :] + X_im * c[None, :]), 1)
        c_before = tl.load(products + UNIT * C + step - 1, mask=later, other=1.0)
        s_before = tl.load(products + UNIT_IM * C + step - 1, mask=later, other=0.0)
        total, total_im = _conjugate_times(c_before, s_before, total, total_im)
        P_before = tl.load(products + PREFIX * C + step - 1, mask=later, other=1.0)
        P_im = tl.load(products + PREFIX_IM * C + step - 1, mask=later, other=0.0)
        start, start_im = _conjugate_times(P_before, P_im, start, start_im)
        total, total_im = _times(c, s, total + start, total_im + start_im)
        tl.store(_rows(da, places[4], row, h, times), total, mask=there)
        tl.store(_rows(da_im, places[4], row, h, times), total_im, mask=there)
