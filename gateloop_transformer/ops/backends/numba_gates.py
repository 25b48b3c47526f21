"""Gates inside kernels, and the kernels that make gates from projections, for recurrences that take them as given.

Pairs of projections lie next to each other; P pairs, of which each H in turn have the same biases.
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
    absolute,
    all_above,
    all_between,
    decay,
    fma,
    fms,
    full,
    inverse_sqrt,
    load,
    load_pairs,
    maximum,
    real_number,
    sine_cosine,
    sqrt,
    store,
    store_pairs,
    take_ticket,
    where_less,
)

# Where gates come from: given (real, complex), or computed from projections.
GIVEN_REAL, GIVEN_COMPLEX, POLAR, PAPER, RING, SIGMOID = range(6)
CODES = {"polar": POLAR, "paper": PAPER, "ring": RING, "sigmoid": SIGMOID}

# Pairs that one item takes; the biases' gradients are summed over them apart.
PAIRS = 4096
MAX_ARGUMENTS = 32
# Z: projections; A, A_IM: gates; SCALE: of the inputs; BIAS, BIAS_IM: repeated until any vector may start in the first
# H; SUMS: the biases' gradients, laid out like them, for each item in turn, STEP bytes apart, those of the phases half
# way.
P, H, Z, BIAS, BIAS_IM, A, A_IM, SCALE, DZ, SUMS, STEP, FRACTION = range(HEADER, HEADER + 12)


@njit
def sigmoid(x: Any) -> Any:
    """σ(x) and 1 - σ(x), both with all their digits; NaN where x is."""
    if all_above(x, -80.0):
        e = decay(x)
        m = 1.0 / (e + 1.0)
        return m, e * m
    # σ(x) = e^x where e^-x has no place, 0 where e^x has none.
    e = decay(absolute(x))
    m, rest = 1.0 / (e + 1.0), e / (e + 1.0)
    return where_less(x, 0.0, rest, m), where_less(x, 0.0, m, rest)


@njit
def silu(s: Any) -> Any:
    """SiLU and its derivative."""
    m, rest = sigmoid(s)
    return s * m, fma(s * m, rest, m)


@njit
def _polar(re: Any, im: Any, double: bool) -> Any:
    """Of z = re + i·im: z/|z| (1 at 0), σ(|z|), σ(|z|)/|z| (0 at 0)."""
    square = fma(re, re, im * im)
    if all_between(square, 1e-36, 1e36):
        inverse = inverse_sqrt(square)
        size = square * inverse
        magnitude = 1.0 / (decay(size) + 1.0)
        return re * inverse, im * inverse, magnitude, magnitude * inverse
    # Where |z| cannot be squared it counts as 0; large z are scaled by a power of two.
    smallest = 1.4916681462400413e-154 if double else 1.0842021724855044e-19
    size = maximum(absolute(re), absolute(im))
    down = where_less(size, 1152921504606846976.0, full(size, 1.0), full(size, 2.0**-64))
    up = where_less(size, 1152921504606846976.0, full(size, 1.0), full(size, 2.0**64))
    x, y = re * down, im * down
    root = sqrt(fma(x, x, y * y))
    inverse = 1.0 / root
    magnitude, _ = sigmoid(root * up)
    one, nothing = full(re, 1.0), full(re, 0.0)
    return (
        where_less(size, smallest, one, x * inverse),
        where_less(size, smallest, nothing, y * inverse),
        where_less(size, smallest, full(re, 0.5), magnitude),
        where_less(size, smallest, nothing, magnitude * (inverse * down)),
    )


@njit
def activate(gate: int, double: bool, re: Any, im: Any) -> Any:
    """A gate a = m·u and what its gradient needs: u (re, im), m, and 1 - m (polar: m/|z|)."""
    one, nothing = full(re, 1.0), full(re, 0.0)
    if gate == POLAR:
        return _polar(re, im, double)
    if gate == SIGMOID:
        m, rest = sigmoid(re)
        return one, nothing, m, rest
    if gate in (PAPER, RING):
        m, rest = sigmoid(re)
        sine, cosine = sine_cosine(im)
        return cosine, sine, m, rest
    return re, im, one, nothing


@njit
def projection_gradient(gate: int, u: Any, u_im: Any, m: Any, rest: Any, da: Any, da_im: Any) -> Any:
    """From the gradient of a gate to that of its projections, m and `rest` as `activate` gives them."""
    radial = fma(u, da, u_im * da_im)
    tangential = fms(u_im, da, u * da_im)
    if gate == POLAR:
        steep = where_less(rest, 1e-37, full(u, 0.0), (1.0 - m) * m)
        radial, tangential = radial * steep, tangential * rest
        return fms(u_im, tangential, u * radial), fma(u, tangential, u_im * radial)
    if gate in (PAPER, RING, SIGMOID):
        return radial * (m * rest), tangential * m
    return da, da_im


@njit
def input_scale(m: Any, rest: Any) -> Any:
    """√(1 - m²), from m and 1 - m."""
    return sqrt(rest * (m + 1.0))


@njit
def input_scale_slope(m: Any, rest: Any) -> Any:
    """How fast `input_scale` falls as the logit of m grows."""
    return (m * m) * sqrt(rest / (m + 1.0))


@njit
def _read(p: Any, n: int, gate: Any, real: Any, kind: Any, wide: Any, lanes: Any) -> Any:
    """Gates from the n-th pair on, as `activate` gives them."""
    re, im = load_pairs(p[Z], n, kind, lanes)
    if gate == RING:
        re = re + load(p[BIAS], n % p[H], wide, lanes)
        im = im + load(p[BIAS_IM], n % p[H], wide, lanes)
    if real:
        im = full(im, 0.0)
    return activate(gate, wide == F64, re, im)


@njit
def _write(p: Any, n: int, gate: Any, real: Any, kind: Any, wide: Any, lanes: Any) -> None:
    u, u_im, m, rest = _read(p, n, gate, real, kind, wide, lanes)
    store(p[A], n, u * m, wide)
    if not real:
        store(p[A_IM], n, u_im * m, wide)
    if gate == RING:
        store(p[SCALE], n, input_scale(m, rest), wide)


@kernel
def gates_forward(KIND: int, GATE: int, REAL: bool, LANES: int) -> Callable[[Any], None]:
    """Gates and, for "ring", the scale of the inputs. KIND: how projections lie in memory."""
    WIDE = F64 if KIND == F64 else F32

    def run(pointer: Any) -> None:
        p = carray(pointer, (MAX_ARGUMENTS,))
        while True:
            item = take_ticket(pointer, 0)
            if item >= p[2]:
                break
            n, end = item * PAIRS, min((item + 1) * PAIRS, p[P])
            while n + LANES <= end:
                _write(p, n, GATE, REAL, KIND, WIDE, LANES)
                n += LANES
            while n < end:
                _write(p, n, GATE, REAL, KIND, WIDE, 1)
                n += 1

    return run


@njit
def _pull(p: Any, n: int, sums: int, fraction: float, gate: Any, real: Any, kind: Any, wide: Any, lanes: Any) -> None:
    """Gradients of the projections from the n-th pair on."""
    u, u_im, m, rest = _read(p, n, gate, real, kind, wide, lanes)
    da = load(p[A], n, wide, lanes)
    da_im = full(da, 0.0)
    if not real:
        da_im = load(p[A_IM], n, wide, lanes)
    dz, dz_im = projection_gradient(gate, u, u_im, m, rest, da, da_im)
    if gate == RING:
        dz = fms(load(p[SCALE], n, wide, lanes), input_scale_slope(m, rest), dz)
    if real:
        dz_im = full(dz, 0.0)
    if gate == RING:
        place, half = n % p[H], sums + p[STEP] // 2
        store(sums, place, load(sums, place, wide, lanes) + dz, wide)
        store(half, place, load(half, place, wide, lanes) + dz_im, wide)
    store_pairs(p[DZ], n, dz * fraction, dz_im * fraction, kind)


@kernel
def gates_backward(KIND: int, GATE: int, REAL: bool, LANES: int) -> Callable[[Any], None]:
    """Gradients of projections and biases from those of gates (in A, A_IM) and of the scale (in SCALE)."""
    WIDE = F64 if KIND == F64 else F32

    def run(pointer: Any) -> None:
        p = carray(pointer, (MAX_ARGUMENTS,))
        fraction = real_number(p[FRACTION])
        while True:
            item = take_ticket(pointer, 0)
            if item >= p[2]:
                break
            sums = p[SUMS] + item * p[STEP]
            n, end = item * PAIRS, min((item + 1) * PAIRS, p[P])
            while n + LANES <= end:
                _pull(p, n, sums, fraction, GATE, REAL, KIND, WIDE, LANES)
                n += LANES
            while n < end:
                _pull(p, n, sums, fraction, GATE, REAL, KIND, WIDE, 1)
                n += 1

    return run
