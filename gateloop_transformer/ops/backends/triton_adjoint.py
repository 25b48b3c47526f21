"""Triton kernels of the gate loop with a matrix state, backwards: gradients within each chunk.

Letters, products and what is in memory: `triton_chunks.py`. S is the state before a chunk, G the gradient of the state
after it. With scores s = Q Kᵀ and their gradient r = dY Vᵀ,

    dq = [r ∘ Re D] K + Re(P ∘ (dY Sᵀ))
    dk = [r ∘ Re D]ᵀ Q + Re(conj(E) ∘ (V Gᵀ))
    dv = [s ∘ Re D]ᵀ dY + Re(conj(E) ∘ (K G))
    da[t] = Σ_{i ≥ t > j} W[i, j] conj(D[i, t] D[t-1, j])        W = s ∘ r

where W has one column more for the state before the chunk, conj(Σ S q[i] dy[i]), and what G gives joins its last row:
Σ G k[j] v[j], and in the corner Σ G conj(S). The sums over key channels in these are left by `key_gradients` in
sums (chunks, heads, blocks of keys, 3·PARTS, C): from the start, to the end, the corner.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gateloop_transformer.ops.backends.triton_chunks import (
    MAGNITUDE,
    PREFIX,
    PREFIX_IM,
    SUFFIX,
    SUFFIX_IM,
    UNIT,
    UNIT_IM,
    _chunk,
    _decays,
    _dot,
    _put,
    _real_decays,
    _rows,
    _state,
    _tile,
)


@triton.jit
def key_gradients(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    dy: tl.tensor,
    dq: tl.tensor,
    dk: tl.tensor,
    products: tl.tensor,
    before: tl.tensor,
    after: tl.tensor,
    sums: tl.tensor,
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
    """dq and dk, and the sums for the gates' gradient. Programs: (chunk, head, block of keys)."""
    slot, row, h, times, steps = _chunk(table, T, C, REVERSE, PACKED)
    products += slot * ROWS * C
    before += slot * PARTS * K * V
    after += slot * PARTS * K * V
    sums += (slot * tl.num_programs(2) + tl.program_id(2)) * 3 * PARTS * C
    v_rows, dy_rows = _rows(v, places[2], row, h, times), _rows(dy, places[3], row, h, times)
    step, key = tl.arange(0, C), tl.program_id(2) * BK + tl.arange(0, BK)
    scores = tl.zeros((C, C), WIDE)
    from_start, from_start_im = tl.zeros((C, BK), WIDE), tl.zeros((C, BK), WIDE)
    to_end, to_end_im = tl.zeros((C, BK), WIDE), tl.zeros((C, BK), WIDE)
    corner, corner_im = tl.zeros((BK,), WIDE), tl.zeros((BK,), WIDE)
    for start in range(0, V, BV):
        value = start + tl.arange(0, BV)
        x, d = _tile(v_rows, value, steps, V, C, MUL), _tile(dy_rows, value, steps, V, C, MUL)
        scores = _dot(d, tl.trans(x), scores, MUL, PRECISION)
        S, G = _state(before, 0, key, value, K, V), _state(after, 0, key, value, K, V)
        from_start = _dot(d, tl.trans(S.to(MUL)), from_start, MUL, PRECISION)
        to_end = _dot(x, tl.trans(G.to(MUL)), to_end, MUL, PRECISION)
        corner += tl.sum(G * S, 1)
        if PARTS == 2:
            S_im, G_im = _state(before, 1, key, value, K, V), _state(after, 1, key, value, K, V)
            from_start_im = _dot(d, tl.trans(S_im.to(MUL)), from_start_im, MUL, PRECISION)
            to_end_im = _dot(x, tl.trans(G_im.to(MUL)), to_end_im, MUL, PRECISION)
            corner += tl.sum(G_im * S_im, 1)
            corner_im += tl.sum(G_im * S - G * S_im, 1)
    weighted = (scores * _real_decays(products, C, PARTS)).to(MUL)
    last = step == C - 1
    x = _tile(_rows(q, places[0], row, h, times), key, steps, K, C, MUL)
    d_key = to_end * tl.load(products + SUFFIX * C + step)[:, None]
    tl.store(sums + step, tl.sum(x * from_start, 1))
    tl.store(sums + 2 * C + step, tl.where(last, tl.sum(corner, 0), 0.0))
    if PARTS == 2:
        d_key += to_end_im * tl.load(products + SUFFIX_IM * C + step)[:, None]
        tl.store(sums + 3 * C + step, -tl.sum(x * from_start_im, 1))
        tl.store(sums + 5 * C + step, tl.where(last, tl.sum(corner_im, 0), 0.0))
    d_key = _dot(tl.trans(weighted), x, d_key, MUL, PRECISION)
    _put(_rows(dk, places[5], row, h, times), key, steps, d_key, K, C)
    x = _tile(_rows(k, places[1], row, h, times), key, steps, K, C, MUL)
    d_query = from_start * tl.load(products + PREFIX * C + step)[:, None]
    tl.store(sums + C + step, tl.sum(x * to_end, 1))
    if PARTS == 2:
        d_query -= from_start_im * tl.load(products + PREFIX_IM * C + step)[:, None]
        tl.store(sums + 4 * C + step, tl.sum(x * to_end_im, 1))
    d_query = _dot(weighted, x, d_query, MUL, PRECISION)
    _put(_rows(dq, places[4], row, h, times), key, steps, d_query, K, C)


@triton.jit
def value_gradients(
    q: tl.tensor,
    k: tl.tensor,
    dy: tl.tensor,
    dv: tl.tensor,
    products: tl.tensor,
    after: tl.tensor,
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
    """dv. Programs: (chunk, head, block of values)."""
    slot, row, h, times, steps = _chunk(table, T, C, REVERSE, PACKED)
    products += slot * ROWS * C
    after += slot * PARTS * K * V
    q_rows, k_rows = _rows(q, places[0], row, h, times), _rows(k, places[1], row, h, times)
    step, value = tl.arange(0, C), tl.program_id(2) * BV + tl.arange(0, BV)
    scores = tl.zeros((C, C), WIDE)
    to_end, to_end_im = tl.zeros((C, BV), WIDE), tl.zeros((C, BV), WIDE)
    for start in range(0, K, BK):
        key = start + tl.arange(0, BK)
        x = _tile(k_rows, key, steps, K, C, MUL)
        scores = _dot(_tile(q_rows, key, steps, K, C, MUL), tl.trans(x), scores, MUL, PRECISION)
        to_end = _dot(x, _state(after, 0, key, value, K, V), to_end, MUL, PRECISION)
        if PARTS == 2:
            to_end_im = _dot(x, _state(after, 1, key, value, K, V), to_end_im, MUL, PRECISION)
    weighted = (scores * _real_decays(products, C, PARTS)).to(MUL)
    total = to_end * tl.load(products + SUFFIX * C + step)[:, None]
    if PARTS == 2:
        total += to_end_im * tl.load(products + SUFFIX_IM * C + step)[:, None]
    d = _tile(_rows(dy, places[2], row, h, times), value, steps, V, C, MUL)
    total = _dot(tl.trans(weighted), d, total, MUL, PRECISION)
    _put(_rows(dv, places[3], row, h, times), value, steps, total, V, C)


@triton.jit
def gate_gradients(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    dy: tl.tensor,
    da: tl.tensor,
    da_im: tl.tensor,
    products: tl.tensor,
    sums: tl.tensor,
    table: tl.tensor,
    places: tl.tuple,
    T: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    MUL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE_PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
) -> None:
    """da, exact at a gate of 0. Programs: (chunk, head). BLOCKS: of keys in sums."""
    slot, row, h, times, steps = _chunk(table, T, C, REVERSE, PACKED)
    products += slot * ROWS * C
    sums += slot * BLOCKS * 3 * PARTS * C
    q_rows, k_rows = _rows(q, places[0], row, h, times), _rows(k, places[1], row, h, times)
    v_rows, dy_rows = _rows(v, places[2], row, h, times), _rows(dy, places[3], row, h, times)
    scores, d_scores = tl.zeros((C, C), WIDE), tl.zeros((C, C), WIDE)
    for start in range(0, K, BK):
        key = start + tl.arange(0, BK)
        x = _tile(q_rows, key, steps, K, C, MUL)
        scores = _dot(x, tl.trans(_tile(k_rows, key, steps, K, C, MUL)), scores, MUL, PRECISION)
    for start in range(0, V, BV):
        value = start + tl.arange(0, BV)
        x = _tile(dy_rows, value, steps, V, C, MUL)
        d_scores = _dot(x, tl.trans(_tile(v_rows, value, steps, V, C, MUL)), d_scores, MUL, PRECISION)
    W = scores * d_scores
    step = tl.arange(0, C)
    last = (step == C - 1)[:, None]
    start_re, end_re, corner_re = _sums(sums, 0, BLOCKS, PARTS, C, WIDE)
    magnitude = tl.load(products + MAGNITUDE * C + step)
    D = tl.trans(_decays(magnitude, C))
    # |D[t-1, j]| in row t, and what stands before the first step.
    previous = tl.load(products + MAGNITUDE * C + step - 1, mask=step > 0, other=1.0)
    D_before = _decays_before(previous, C)
    P_before = tl.load(products + PREFIX * C + step - 1, mask=step > 0, other=1.0)
    zero = tl.zeros((C, C), WIDE)
    d_rows = _rows(da, places[4], row, h, times)
    if PARTS == 1:
        X = _dot(D, W + tl.where(last, end_re[None, :], 0.0), zero, WIDE, WIDE_PRECISION)
        x_start = tl.sum(D * (start_re + corner_re)[None, :], 1)
        tl.store(d_rows, tl.sum(X * D_before, 1) + x_start * P_before, mask=step < steps)
    else:
        start_im, end_im, corner_im = _sums(sums, 3 * C, BLOCKS, PARTS, C, WIDE)
        start_re, start_im = start_re + corner_re, start_im + corner_im
        c, s = tl.load(products + UNIT * C + step), tl.load(products + UNIT_IM * C + step)
        # X[t, j] conj(U[t]) = Σ_i |D[i, t]| conj(U[i]) W[i, j]
        W += tl.where(last, end_re[None, :], 0.0)
        W_im = tl.where(last, end_im[None, :], 0.0)
        X = _dot(D, c[:, None] * W + s[:, None] * W_im, zero, WIDE, WIDE_PRECISION)
        X_im = _dot(D, c[:, None] * W_im - s[:, None] * W, zero, WIDE, WIDE_PRECISION)
        x_start = tl.sum(D * (c * start_re + s * start_im)[None, :], 1)
        x_start_im = tl.sum(D * (c * start_im - s * start_re)[None, :], 1)
        # Times conj(D[t-1, j]) = |D[t-1, j]| conj(U[t-1]) U[j], and conj(P[t-1]) for the start.
        total = tl.sum(D_before * (X * c[None, :] - X_im * s[None, :]), 1)
        total_im = tl.sum(D_before * (X * s[None, :] + X_im * c[None, :]), 1)
        c_before = tl.load(products + UNIT * C + step - 1, mask=step > 0, other=1.0)
        s_before = tl.load(products + UNIT_IM * C + step - 1, mask=step > 0, other=0.0)
        total, total_im = _conjugate_times(c_before, s_before, total, total_im)
        P_im = tl.load(products + PREFIX_IM * C + step - 1, mask=step > 0, other=0.0)
        x_start, x_start_im = _conjugate_times(P_before, P_im, x_start, x_start_im)
        total, total_im = total + x_start, total_im + x_start_im
        tl.store(d_rows, c * total - s * total_im, mask=step < steps)
        tl.store(_rows(da_im, places[4], row, h, times), c * total_im + s * total, mask=step < steps)


@triton.jit
def _sums(
    sums: tl.tensor, part: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr
) -> tl.tensor:
    """From the start, to the end, and the corner, each (C,), summed over the blocks of keys in their order."""
    step = tl.arange(0, C)
    start, end, corner = tl.zeros((C,), WIDE), tl.zeros((C,), WIDE), tl.zeros((C,), WIDE)
    for block in range(BLOCKS):
        at = sums + block * 3 * PARTS * C + part + step
        start += tl.load(at)
        end += tl.load(at + C)
        corner += tl.load(at + 2 * C)
    return start, end, corner


@triton.jit
def _decays_before(previous: tl.tensor, C: tl.constexpr) -> tl.tensor:
    """|D[t-1, j]| for t > j, else 0; previous[t] is the magnitude of gate t-1."""
    t, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return tl.where(t > j, tl.cumprod(tl.where(t > j + 1, previous[:, None], 1.0), 0), 0.0)


@triton.jit
def _conjugate_times(a: tl.tensor, b: tl.tensor, x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """conj(a + i·b)(x + i·y)."""
    return a * x + b * y, a * y - b * x
