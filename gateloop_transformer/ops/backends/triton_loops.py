"""The gate loop at head size 1 in Triton, from projections to outputs: h = a h + k v, y = Re(q h) · SiLU(s).

Tiles, operands and letters as in `triton_scans.py`. Operands of projections are pairs, neighbours in memory, or two
tensors. The forward pass keeps the state before each tile; the backward pass scans every tile again from there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gateloop_transformer.ops.backends.triton_gates import (
    GIVEN_REAL,
    RING,
    SIGMOID,
    activate,
    deinterleave,
    input_scale,
    input_scale_slope,
    interleave,
    projection_gradient,
    silu,
)
from gateloop_transformer.ops.backends.triton_scans import (
    adjoint,
    begun,
    carried,
    cleared,
    documents,
    neighbour,
    place,
    read,
    row,
    state_at,
    store_state,
    tile_scan,
    times,
    write,
)


@triton.jit
def _projections(
    z, z_im, bias, bias_im, b, part, t, s, r, d, T, D,
    GATE: tl.constexpr, W: tl.constexpr, PAIRS: tl.constexpr, TT: tl.constexpr, DD: tl.constexpr,
):  # fmt: skip
    """Both projections of a tile, the second 0 where there is none."""
    mask = (t < T) & (d < D)
    if PAIRS:
        e = part % tl.cdiv(D, DD) * (2 * DD) + tl.arange(0, 2 * DD)[None, :]
        re, im = deinterleave(read(z, b, s, r, e, (t < T) & (e < 2 * D), W), TT, DD)
    else:
        re = read(z, b, s, r, d, mask, W)
        im = tl.zeros_like(re)
        if z_im[0] is not None:
            im = read(z_im, b, s, r, d, mask, W)
    if GATE == RING:
        re += tl.load(bias + d, mask=d < D, other=0.0)
        im += tl.load(bias_im + d, mask=d < D, other=0.0)
    return re, im


@triton.jit
def _added(k, v, m, rest, b, s, r, d, mask, GATE: tl.constexpr, W: tl.constexpr):
    """What each step adds to the state: k, v and the scale of "ring" (1 for others), of which it is the product."""
    value = read(v, b, s, r, d, mask, W)
    key, scale = tl.full(value.shape, 1.0, W), tl.full(value.shape, 1.0, W)
    if k[0] is not None:
        key = read(k, b, s, r, d, mask, W)
    if GATE == RING:
        scale = input_scale(m, rest)
    return key, value, scale


@triton.jit(do_not_specialize=["T", "rows"])
def loop_forward(
    q, k, v, z, z_im, swish, y, bias, bias_im, initial, initial_im, final, final_im, started, started_im, kept, resets,
    begins, ends, chain, flags, T, D, rows, KEPT: tl.constexpr, W: tl.constexpr, PAIRS: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, MANY: tl.constexpr, TT: tl.constexpr, DD: tl.constexpr,
):  # fmt: skip
    """Outputs, final states (N, D), and kept: the state before each of the backward pass's tiles but the first, whose
    initial states are brought in as inputs (parts, rows, tiles, D), and are kept too, started (N, D).
    """
    COMPLEX: tl.constexpr = GATE != GIVEN_REAL and GATE != SIGMOID
    b, _, order, part, t, s, r, d = place(T, D, rows, REVERSE, False, TT, DD)
    mask = (t < T) & (d < D)
    re, im = _projections(z, z_im, bias, bias_im, b, part, t, s, r, d, T, D, GATE, W, PAIRS, TT, DD)
    u, u_im, m, rest = activate(re, im, GATE, W)
    key, value, scale = _added(k, v, m, rest, b, s, r, d, mask, GATE, W)
    a, a_im, _ = cleared(u * m, u_im * m, resets, b, t, s + r, T)
    x, x_im = key * value * scale, tl.zeros_like(a)
    a, a_im, x, x_im = begun(a, a_im, x, x_im, initial, initial_im, begins, b, t, s + r, d, T, D, W, COMPLEX)
    product, product_im, h, h_im = tile_scan(a, a_im, x, x_im, COMPLEX, False)
    last: tl.constexpr = TT - 1
    before, before_im = carried(
        chain, flags, row(product, last, TT), row(product_im, last, TT), row(h, last, TT), row(h_im, last, TT),
        order, part, T, D, d, COMPLEX, MANY, TT,
    )  # fmt: skip
    more, more_im = times(product, product_im, before[None, :], before_im[None, :], COMPLEX)
    h, h_im = h + more, h_im + more_im
    out = read(q, b, s, r, d, mask, W) * h
    if swish[0] is not None:
        gated, _ = silu(read(swish, b, s, r, d, mask, W))
        out *= gated
    write(y, b, s, r, d, out, mask)
    n = documents(ends, b, t, s + r, T, False)
    store_state(final, n, d, D, h)
    if COMPLEX:
        store_state(final_im, n, d, D, h_im)
    n = documents(begins, b, t, s + r, T, True)
    store_state(started, n, d, D, state_at(initial, n, d, D, W) if initial is not None else tl.zeros_like(h))
    if COMPLEX:
        start_im = state_at(initial_im, n, d, D, W) if initial_im is not None else tl.zeros_like(h)
        store_state(started_im, n, d, D, start_im)
    # Steps of the backward pass's tiles: the state after the last of each is the state before the next.
    following = (t + 1) // KEPT
    tiles = tl.cdiv(T, KEPT)
    border = mask & ((t + 1) % KEPT == 0) & (following < tiles)
    at_tile = (b * tiles + following).to(tl.int64) * D + d
    tl.store(kept + at_tile, h, mask=border)
    if COMPLEX:
        tl.store(kept + (rows * tiles).to(tl.int64) * D + at_tile, h_im, mask=border)


@triton.jit(do_not_specialize=["T", "rows"])
def loop_backward(
    q, k, v, z, z_im, swish, grad, dq, dk, dv, dz, dz_im, d_swish, bias, bias_im, d_bias, initial, initial_im,
    d_final, d_final_im, d_initial, d_initial_im, kept, resets, begins, ends, chain, flags, T, D, rows,
    FRACTION: tl.constexpr, GATE: tl.constexpr, W: tl.constexpr, PAIRS: tl.constexpr, REVERSE: tl.constexpr,
    MANY: tl.constexpr, TT: tl.constexpr, DD: tl.constexpr,
):  # fmt: skip
    """Gradients of all inputs; those of the biases of each tile apart, d_bias (rows, tiles, 2, D)."""
    COMPLEX: tl.constexpr = GATE != GIVEN_REAL and GATE != SIGMOID
    b, tile, order, part, t, s, r, d = place(T, D, rows, REVERSE, True, TT, DD)
    mask = (t < T) & (d < D)
    tiles = tl.cdiv(T, TT)
    re, im = _projections(z, z_im, bias, bias_im, b, part, t, s, r, d, T, D, GATE, W, PAIRS, TT, DD)
    u, u_im, m, rest = activate(re, im, GATE, W)
    key, value, scale = _added(k, v, m, rest, b, s, r, d, mask, GATE, W)
    a, a_im, reset = cleared(u * m, u_im * m, resets, b, t, s + r, T)
    # The states once more.
    x, x_im = key * value * scale, tl.zeros_like(a)
    c, c_im, x, x_im = begun(a, a_im, x, x_im, initial, initial_im, begins, b, t, s + r, d, T, D, W, COMPLEX)
    product, product_im, h, h_im = tile_scan(c, c_im, x, x_im, COMPLEX, False)
    at_tile = (b * tiles + tile).to(tl.int64) * D + d
    later = d < tl.where(tile > 0, D, 0)
    before = tl.load(kept + at_tile, mask=later, other=0.0)
    before_im = tl.zeros_like(before)
    if COMPLEX:
        before_im = tl.load(kept + (rows * tiles).to(tl.int64) * D + at_tile, mask=later, other=0.0)
    more, more_im = times(product, product_im, before, before_im, COMPLEX)
    h, h_im = h + more, h_im + more_im
    # What each step adds to the gradient of its state.
    query, dy = read(q, b, s, r, d, mask, W), read(grad, b, s, r, d, mask, W)
    if swish[0] is not None:
        gated, slope = silu(read(swish, b, s, r, d, mask, W))
        write(d_swish, b, s, r, d, dy * query * h * slope, mask)
        dy *= gated
    write(dq, b, s, r, d, dy * h, mask)
    n = documents(ends, b, t, s + r, T, False)
    g, g_im = query * dy + state_at(d_final, n, d, D, W), tl.zeros_like(dy)
    if COMPLEX:
        g_im += state_at(d_final_im, n, d, D, W)
    n = documents(begins, b, t, s + r, T, True)
    G, G_im = adjoint(g, g_im, a, a_im, n >= 0, order, part, t, T, d, D, chain, flags, COMPLEX, MANY, TT, DD)
    write(dv, b, s, r, d, G * key * scale, mask)
    if k[0] is not None:
        write(dk, b, s, r, d, G * value * scale, mask)
    # The gates.
    h = tl.where(n >= 0, 0.0, neighbour(h, tl.reshape(before, (DD,)), -1, TT, DD))
    h_im = tl.where(n >= 0, 0.0, neighbour(h_im, tl.reshape(before_im, (DD,)), -1, TT, DD))
    if initial is not None:
        h += state_at(initial, n, d, D, W)
        if initial_im is not None:
            h_im += state_at(initial_im, n, d, D, W)
    da, da_im = times(G, G_im, h, -h_im, COMPLEX)
    da, da_im = tl.where(reset, 0.0, da), tl.where(reset, 0.0, da_im)
    d_re, d_im = projection_gradient(u, u_im, m, rest, da, da_im, GATE)
    if GATE == RING:
        d_re -= G * key * value * input_scale_slope(m, rest)
        sums = d_bias + ((b.to(tl.int64) * tiles + tile) * 2) * D + tl.reshape(d, (DD,))
        tl.store(sums, tl.sum(d_re, 0), mask=tl.reshape(d, (DD,)) < D)
        tl.store(sums + D, tl.sum(d_im, 0), mask=tl.reshape(d, (DD,)) < D)
    if dz_im[0] is not None:
        write(dz, b, s, r, d, d_re * FRACTION, mask)
        write(dz_im, b, s, r, d, d_im * FRACTION, mask)
    elif PAIRS:
        e = part % tl.cdiv(D, DD) * (2 * DD) + tl.arange(0, 2 * DD)[None, :]
        pairs = interleave(d_re * FRACTION, d_im * FRACTION, TT, DD)
        write(dz, b, s, r, e, pairs, (t < T) & (e < 2 * D))
    else:
        write(dz, b, s, r, d, d_re * FRACTION, mask)
    if d_initial is not None:
        back, back_im = times(a, -a_im, G, G_im, COMPLEX)
        store_state(d_initial, n, d, D, back)
        if COMPLEX:
            store_state(d_initial_im, n, d, D, back_im)
