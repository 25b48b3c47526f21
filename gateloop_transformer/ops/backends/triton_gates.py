"""Gates inside Triton kernels, and the kernels that make gates from projections.

TT steps and DD channels of a tile; W the precision of the arithmetic (tl.float32 or tl.float64).
"""

from __future__ import annotations

import triton
import triton.language as tl

# Where gates come from: given (real, complex), or computed from projections.
GIVEN_REAL = tl.constexpr(0)
GIVEN_COMPLEX = tl.constexpr(1)
POLAR = tl.constexpr(2)
PAPER = tl.constexpr(3)
RING = tl.constexpr(4)
SIGMOID = tl.constexpr(5)
CODES = {"polar": 2, "paper": 3, "ring": 4, "sigmoid": 5}

# √tiny of the precision: a |z| below it cannot be squared.
_SMALLEST32 = tl.constexpr(1.0842021724855044e-19)
_SMALLEST64 = tl.constexpr(1.4916681462400413e-154)


@triton.jit
def sigmoid(x):
    """σ(x) and 1 - σ(x), both with all their digits."""
    e = tl.exp(tl.minimum(-x, 80.0, propagate_nan=tl.PropagateNan.ALL))
    m = 1.0 / (e + 1.0)
    return m, e * m


@triton.jit
def silu(s):
    """SiLU and its derivative."""
    m, rest = sigmoid(s)
    return s * m, s * m * rest + m


@triton.jit
def _polar(re, im, W: tl.constexpr):
    """Of z = re + i·im: z/|z| (1 at 0), σ(|z|), σ(|z|)/|z| (0 at 0)."""
    smallest: tl.constexpr = _SMALLEST64 if W == tl.float64 else _SMALLEST32
    size = tl.maximum(tl.abs(re), tl.abs(im), propagate_nan=tl.PropagateNan.ALL)
    # Large z are scaled by a power of two, so that their squares are finite.
    large = size >= 1152921504606846976.0
    down = tl.where(large, 5.421010862427522e-20, 1.0).to(W)
    up = tl.where(large, 18446744073709551616.0, 1.0).to(W)
    nothing = size < smallest
    x, y = tl.where(nothing, 1.0, re * down), tl.where(nothing, 0.0, im * down)
    root = tl.sqrt(x * x + y * y)
    inverse = 1.0 / root
    magnitude, _ = sigmoid(root * up)
    magnitude = tl.where(nothing, 0.5, magnitude)
    return x * inverse, y * inverse, magnitude, tl.where(nothing, 0.0, magnitude * (inverse * down))


@triton.jit
def activate(re, im, GATE: tl.constexpr, W: tl.constexpr):
    """A gate a = m·u and what its gradient needs: u (re, im), m, and 1 - m (polar: m/|z|)."""
    if GATE == POLAR:
        return _polar(re, im, W)
    elif GATE == SIGMOID:
        m, rest = sigmoid(re)
        return tl.full(m.shape, 1.0, W), tl.full(m.shape, 0.0, W), m, rest
    elif GATE == GIVEN_REAL or GATE == GIVEN_COMPLEX:
        return re, im, tl.full(re.shape, 1.0, W), tl.full(re.shape, 0.0, W)
    else:
        m, rest = sigmoid(re)
        return tl.cos(im), tl.sin(im), m, rest


@triton.jit
def projection_gradient(u, u_im, m, rest, da, da_im, GATE: tl.constexpr):
    """From the gradient of a gate to that of its projections, m and `rest` as `activate` gives them."""
    radial = u * da + u_im * da_im
    tangential = u * da_im - u_im * da
    if GATE == POLAR:
        radial = radial * tl.where(rest < 1e-37, 0.0, (1.0 - m) * m)
        tangential = tangential * rest
        return u * radial - u_im * tangential, u * tangential + u_im * radial
    elif GATE == GIVEN_REAL or GATE == GIVEN_COMPLEX:
        return da, da_im
    else:
        return radial * (m * rest), tangential * m


@triton.jit
def input_scale(m, rest):
    """√(1 - m²), from m and 1 - m."""
    return tl.sqrt(rest * (m + 1.0))


@triton.jit
def input_scale_slope(m, rest):
    """How fast `input_scale` falls as the logit of m grows."""
    return m * m * tl.sqrt(rest / (m + 1.0))


@triton.jit
def interleave(re, im, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pairs as neighbours: (ROWS, COLUMNS) twice → (ROWS, 2·COLUMNS)."""
    return tl.reshape(tl.join(re, im), (ROWS, 2 * COLUMNS))


@triton.jit
def deinterleave(pairs, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The opposite of `interleave`."""
    return tl.split(tl.reshape(pairs, (ROWS, COLUMNS, 2)))


@triton.jit
def _place(rows, H, RR: tl.constexpr, HH: tl.constexpr):
    """Rows (RR, 1), heads (1, HH), the mask of their gates, offsets and mask of their pairs, which block of rows."""
    blocks = tl.cdiv(H, HH)
    block = tl.program_id(0) // blocks
    head = tl.program_id(0) % blocks * HH
    r = block * RR + tl.arange(0, RR)[:, None]
    h, e = head + tl.arange(0, HH)[None, :], 2 * head + tl.arange(0, 2 * HH)[None, :]
    wide = r.to(tl.int64)
    return wide * H + h, (r < rows) & (h < H), wide * 2 * H + e, (r < rows) & (e < 2 * H), h, block


@triton.jit
def _read(z, bias, bias_im, at, inside, h, H, GATE: tl.constexpr, REAL: tl.constexpr, W: tl.constexpr,
          RR: tl.constexpr, HH: tl.constexpr):  # fmt: skip
    """Gates as `activate` gives them."""
    re, im = deinterleave(tl.load(z + at, mask=inside, other=0.0).to(W), RR, HH)
    if GATE == RING:
        re += tl.load(bias + h, mask=h < H, other=0.0)
        im += tl.load(bias_im + h, mask=h < H, other=0.0)
    if REAL:
        im = tl.zeros_like(im)
    return activate(re, im, GATE, W)


@triton.jit
def gates_forward(
    z, bias, bias_im, a, a_im, scale, rows, H, GATE: tl.constexpr, REAL: tl.constexpr, W: tl.constexpr,
    RR: tl.constexpr, HH: tl.constexpr,
):  # fmt: skip
    """Gates (rows, H) of projections (rows, 2·H) and, for "ring", the scale of the inputs."""
    at, mask, pairs, inside, h, _ = _place(rows, H, RR, HH)
    u, u_im, m, rest = _read(z, bias, bias_im, pairs, inside, h, H, GATE, REAL, W, RR, HH)
    tl.store(a + at, u * m, mask=mask)
    if not REAL:
        tl.store(a_im + at, u_im * m, mask=mask)
    if GATE == RING:
        tl.store(scale + at, input_scale(m, rest), mask=mask)


@triton.jit
def gates_backward(
    z, bias, bias_im, da, da_im, d_scale, dz, sums, rows, H, FRACTION: tl.constexpr, GATE: tl.constexpr,
    REAL: tl.constexpr, W: tl.constexpr, RR: tl.constexpr, HH: tl.constexpr,
):  # fmt: skip
    """Gradients of projections; for "ring" what each block of rows adds to those of the biases (blocks, 2, H)."""
    at, mask, pairs, inside, h, block = _place(rows, H, RR, HH)
    u, u_im, m, rest = _read(z, bias, bias_im, pairs, inside, h, H, GATE, REAL, W, RR, HH)
    g = tl.load(da + at, mask=mask, other=0.0).to(W)
    g_im = tl.zeros_like(g)
    if not REAL:
        g_im = tl.load(da_im + at, mask=mask, other=0.0).to(W)
    re, im = projection_gradient(u, u_im, m, rest, g, g_im, GATE)
    if REAL:
        im = tl.zeros_like(im)
    if GATE == RING:
        re -= tl.load(d_scale + at, mask=mask, other=0.0).to(W) * input_scale_slope(m, rest)
        place = sums + block.to(tl.int64) * 2 * H + h
        tl.store(place, tl.sum(re, 0)[None, :], mask=h < H)
        tl.store(place + H, tl.sum(im, 0)[None, :], mask=h < H)
    pair = interleave(re * FRACTION, im * FRACTION, RR, HH)
    tl.store(dz + pairs, pair.to(dz.dtype.element_ty), mask=inside)
