"""Triton kernels of the gate loop with a matrix state, a gate per key channel: what differs from `triton_chunks.py`.

Letters, products and what is in memory: there; products have a last dimension K here. D has a matrix for each channel,
so that within a chunk scores are sums over channels, not products of matrices:

    s[i, j] = Σ_c q[i, c] k[j, c] Re D_c[i, j]                      r = dY Vᵀ
    y  = s V + Re((P ∘ Q) S)                                        dv = sᵀ dY + Re((conj(E) ∘ K) G)
    dq[i, c] = Σ_j r[i, j] k[j, c] Re D_c[i, j] + Re(P ∘ (dY Sᵀ))
    dk[j, c] = Σ_i r[i, j] q[i, c] Re D_c[i, j] + Re(conj(E) ∘ (V Gᵀ))

and W_c[i, j] = q[i, c] k[j, c] r[i, j] in the gradient of gates. That work is proportional to the length of a chunk,
which is short for it; what lies further apart goes through the state, by products of matrices. Tiles here have channels
first: (BK, C) and (BK, C, C).
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
    _conjugate_times,
    _dot,
    _put,
    _rows,
    _state,
    _tile,
    _times,
    _weights,
)


@triton.jit
def _channel_decays(magnitude: tl.tensor, C: tl.constexpr) -> tl.tensor:
    """|D| (BK, C, C)."""
    i, j = tl.arange(0, C)[None, :, None], tl.arange(0, C)[None, None, :]
    return tl.where(i >= j, tl.cumprod(tl.where(i > j, magnitude[:, :, None], 1.0), 1), 0.0)


@triton.jit
def _real_channel_decays(
    products: tl.tensor, k: tl.tensor, K: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr
) -> tl.tensor:
    """Re D (BK, C, C)."""
    decays = _channel_decays(_weights(products, MAGNITUDE, k, K, C), C)
    if PARTS == 2:
        c, s = _weights(products, UNIT, k, K, C), _weights(products, UNIT_IM, k, K, C)
        decays *= c[:, :, None] * c[:, None, :] + s[:, :, None] * s[:, None, :]
    return decays


@triton.jit
def _channel_scores(
    q: tl.tensor,
    k: tl.tensor,
    products: tl.tensor,
    key: tl.tensor,
    K: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
) -> tl.tensor:
    """s (C, C) of some channels (BK, C), the rotation folded into q and k."""
    pairs = q[:, :, None] * k[:, None, :]
    if PARTS == 2:
        c, s = _weights(products, UNIT, key, K, C), _weights(products, UNIT_IM, key, K, C)
        pairs = (q * c)[:, :, None] * (k * c)[:, None, :] + (q * s)[:, :, None] * (k * s)[:, None, :]
    return tl.sum(pairs * _channel_decays(_weights(products, MAGNITUDE, key, K, C), C), 0)


@triton.jit(do_not_specialize=["T"])
def channel_attend(
    q: tl.tensor,
    k: tl.tensor,
    z: tl.tensor,
    out: tl.tensor,
    products: tl.tensor,
    states: tl.tensor,
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
    ADJOINT: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
) -> None:
    """y from values and the state before the chunk, or adjoint dv from dy and the gradient of the state after it.

    Programs: (chunk, head, block of values).
    """
    slot, row, h, times, steps = _chunk(table, T, C, REVERSE, PACKED)
    products += slot * ROWS * C * K
    states += slot * PARTS * K * V
    q_rows, k_rows = _rows(q, places[0], row, h, times), _rows(k, places[1], row, h, times)
    value = tl.program_id(2) * BV + tl.arange(0, BV)
    scores, total = tl.zeros((C, C), WIDE), tl.zeros((C, BV), WIDE)
    for start in range(0, K, BK):
        key = start + tl.arange(0, BK)
        x, y = tl.trans(_tile(q_rows, key, steps, K, C, WIDE)), tl.trans(_tile(k_rows, key, steps, K, C, WIDE))
        scores += _channel_scores(x, y, products, key, K, C, PARTS)
        x = y if ADJOINT else x
        weighted = tl.trans(x * _weights(products, SUFFIX if ADJOINT else PREFIX, key, K, C))
        total = _dot(weighted, _state(states, key, value, K, V, False), total, MUL, PRECISION)
        if PARTS == 2:
            weighted = tl.trans(x * _weights(products, SUFFIX_IM if ADJOINT else PREFIX_IM, key, K, C))
            weighted = weighted if ADJOINT else -weighted
            total = _dot(weighted, _state(states + K * V, key, value, K, V, False), total, MUL, PRECISION)
    scores = tl.trans(scores) if ADJOINT else scores
    total = _dot(scores, _tile(_rows(z, places[2], row, h, times), value, steps, V, C, MUL), total, MUL, PRECISION)
    _put(_rows(out, places[3], row, h, times), value, steps, total, V, C)


@triton.jit
def _before(
    products: tl.tensor, row: tl.constexpr, k: tl.tensor, first: tl.constexpr, K: tl.constexpr, C: tl.constexpr
) -> tl.tensor:
    """A row of products, moved by one step: (BK, C), `first` before the first step."""
    step = tl.arange(0, C)[None, :]
    there = (k < K)[:, None] & (step > 0)
    return tl.load(products + (row * C + step - 1) * K + k[:, None], mask=there, other=first)


@triton.jit
def _gate_gradient(
    W: tl.tensor,
    W_im: tl.tensor,
    start: tl.tensor,
    start_im: tl.tensor,
    products: tl.tensor,
    key: tl.tensor,
    K: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """da (BK, C) from W (BK, C, C) and its column for the start (BK, C), both with their last row and corner."""
    D = tl.permute(_channel_decays(_weights(products, MAGNITUDE, key, K, C), C), (0, 2, 1))
    t, j = tl.arange(0, C)[None, :, None], tl.arange(0, C)[None, None, :]
    previous = _before(products, MAGNITUDE, key, 1.0, K, C)
    D_before = tl.where(t > j, tl.cumprod(tl.where(t > j + 1, previous[:, :, None], 1.0), 1), 0.0)
    P = _before(products, PREFIX, key, 1.0, K, C)
    zero = tl.zeros_like(W)
    if PARTS == 1:
        X = _dot(D, W, zero, WIDE, PRECISION) * D_before
        total = tl.sum(X, 2) + tl.sum(D * start[:, None, :], 2) * P
        total_im = total
    else:
        # What is times conj(D[i, t]) = |D[i, t]| conj(U[i]) U[t], left without U[t] until the end.
        c, s = _weights(products, UNIT, key, K, C), _weights(products, UNIT_IM, key, K, C)
        start, start_im = _conjugate_times(c, s, start, start_im)
        start, start_im = tl.sum(D * start[:, None, :], 2), tl.sum(D * start_im[:, None, :], 2)
        W, W_im = _conjugate_times(c[:, :, None], s[:, :, None], W, W_im)
        X, X_im = _dot(D, W, zero, WIDE, PRECISION), _dot(D, W_im, zero, WIDE, PRECISION)
        # Times conj(D[t-1, j]) = |D[t-1, j]| conj(U[t-1]) U[j], and conj(P[t-1]) for the start.
        X, X_im = _times(X, X_im, c[:, None, :], s[:, None, :])
        total, total_im = tl.sum(D_before * X, 2), tl.sum(D_before * X_im, 2)
        c_before, s_before = _before(products, UNIT, key, 1.0, K, C), _before(products, UNIT_IM, key, 0.0, K, C)
        total, total_im = _conjugate_times(c_before, s_before, total, total_im)
        start, start_im = _conjugate_times(P, _before(products, PREFIX_IM, key, 0.0, K, C), start, start_im)
        total, total_im = _times(c, s, total + start, total_im + start_im)
    return total, total_im


@triton.jit(do_not_specialize=["T"])
def channel_gradients(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    dy: tl.tensor,
    dq: tl.tensor,
    dk: tl.tensor,
    da: tl.tensor,
    da_im: tl.tensor,
    products: tl.tensor,
    before: tl.tensor,
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
    """dq, dk and da (B, T, H, K). Programs: (chunk, head, block of keys)."""
    slot, row, h, times, steps = _chunk(table, T, C, REVERSE, PACKED)
    products += slot * ROWS * C * K
    before += slot * PARTS * K * V
    after += slot * PARTS * K * V
    v_rows, dy_rows = _rows(v, places[2], row, h, times), _rows(dy, places[3], row, h, times)
    key = tl.program_id(2) * BK + tl.arange(0, BK)
    r, read, read_im = tl.zeros((C, C), WIDE), tl.zeros((BK, C), WIDE), tl.zeros((BK, C), WIDE)
    end, end_im = tl.zeros((BK, C), WIDE), tl.zeros((BK, C), WIDE)
    corner, corner_im = tl.zeros((BK,), WIDE), tl.zeros((BK,), WIDE)
    for start in range(0, V, BV):
        value = start + tl.arange(0, BV)
        d, x = _tile(dy_rows, value, steps, V, C, MUL), tl.trans(_tile(v_rows, value, steps, V, C, MUL))
        r = _dot(d, x, r, MUL, PRECISION)
        S, G = _state(before, key, value, K, V, False), _state(after, key, value, K, V, False)
        read = _dot(S, tl.trans(d), read, MUL, PRECISION)
        end = _dot(G, x, end, MUL, PRECISION)
        corner += tl.sum(G * S, 1)
        if PARTS == 2:
            S_im, G_im = _state(before + K * V, key, value, K, V, False), _state(after + K * V, key, value, K, V, False)
            read_im = _dot(S_im, tl.trans(d), read_im, MUL, PRECISION)
            end_im = _dot(G_im, x, end_im, MUL, PRECISION)
            corner += tl.sum(G_im * S_im, 1)
            corner_im += tl.sum(G_im * S - G * S_im, 1)
    x = tl.trans(_tile(_rows(q, places[0], row, h, times), key, steps, K, C, WIDE))
    y = tl.trans(_tile(_rows(k, places[1], row, h, times), key, steps, K, C, WIDE))
    weighted = r[None, :, :] * _real_channel_decays(products, key, K, C, PARTS)
    d_query = tl.sum(weighted * y[:, None, :], 2) + read * _weights(products, PREFIX, key, K, C)
    d_key = tl.sum(weighted * x[:, :, None], 1) + end * _weights(products, SUFFIX, key, K, C)
    if PARTS == 2:
        d_query -= read_im * _weights(products, PREFIX_IM, key, K, C)
        d_key += end_im * _weights(products, SUFFIX_IM, key, K, C)
    _put(_rows(dq, places[4], row, h, times), key, steps, tl.trans(d_query), K, C)
    _put(_rows(dk, places[5], row, h, times), key, steps, tl.trans(d_key), K, C)
    last = (tl.arange(0, C) == C - 1)[None, :]
    W = x[:, :, None] * y[:, None, :] * r[None, :, :] + tl.where(last[:, :, None], (y * end)[:, None, :], 0.0)
    W_im = tl.where(last[:, :, None], (y * end_im)[:, None, :], 0.0)
    read = x * read + tl.where(last, corner[:, None], 0.0)
    read_im = tl.where(last, corner_im[:, None], 0.0) - x * read_im
    total, total_im = _gate_gradient(W, W_im, read, read_im, products, key, K, C, PARTS, WIDE, PRECISION)
    _put(_rows(da, places[6], row, h, times), key, steps, tl.trans(total), K, C)
    if PARTS == 2:
        _put(_rows(da_im, places[6], row, h, times), key, steps, tl.trans(total_im), K, C)
