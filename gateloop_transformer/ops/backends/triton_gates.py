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
    e = tl.exp(tl.minimum(-x, 80.0))
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
    size = tl.maximum(tl.abs(re), tl.abs(im))
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
