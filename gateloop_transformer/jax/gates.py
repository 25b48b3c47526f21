"""Complex gates from projections: polar, paper and ring, as pure functions on pairs (real, imaginary).

All compute in float32 or better and return that precision. `jax.lax.complex(*polar(re, im))` is the gate as one complex
array; `gate_loop` takes the pair as it is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gateloop_transformer.jax.checks import array, floating, real_pair
from gateloop_transformer.jax.pairs import Array, compute_dtype
from gateloop_transformer.jax.phases import cos_sin


def _wide(first: Any, second: Any, gate: str) -> tuple[Array, Array]:
    first, second = array(gate, "projections", first), array(gate, "projections", second)
    for value in (first, second):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"{gate}: projections must be real floating-point arrays, not {value.dtype}")
    if first.shape != second.shape:
        raise ValueError(f"{gate}: both projections must have one shape, not {first.shape} and {second.shape}")
    dtype = compute_dtype(first.dtype, second.dtype)
    return first.astype(dtype), second.astype(dtype)


def polar(real: Array, imaginary: Array) -> tuple[Array, Array]:
    """a = σ(|z|)·e^{i·arg z} for z = real + i·imaginary: the original's gate, |a| in [0.5, 1).

    At z = 0, and where |z| is too small to be squared in its precision, a = ½ with gradient 0; no other input gives NaN
    either, up to the largest finite |z|.

    Args:
        real: Re z, any shape.
        imaginary: Im z, the same shape.

    Returns:
        The real and imaginary parts of a.

    Raises:
        ValueError: shapes differ, or an array is not real floating point.

    >>> [float(part) for part in polar(jnp.array(0.0), jnp.array(0.0))]
    [0.5, 0.0]
    """
    return _polar(*_wide(real, imaginary, "polar"))


@jax.custom_jvp
def _polar(re: Array, im: Array) -> tuple[Array, Array]:
    x, y, size = _direction(re, im)
    magnitude = jax.nn.sigmoid(size)
    return magnitude * x, magnitude * y


def _direction(re: Array, im: Array) -> tuple[Array, Array, Array]:
    """Compute z/|z| and |z|; they are 1 and 0 where |z| is too small to be squared."""
    scale = jnp.maximum(jnp.abs(re), jnp.abs(im))
    zero = scale < jnp.finfo(re.dtype).tiny ** 0.5
    scale = jnp.where(zero, 1.0, scale)
    x, y = jnp.where(zero, 1.0, re / scale), jnp.where(zero, 0.0, im / scale)
    ratio = jnp.sqrt(x * x + y * y)
    return x / ratio, y / ratio, jnp.where(zero, 0.0, scale * ratio)


@_polar.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Differentiate: along z the magnitude changes by σ'(|z|), across it the phase by 1/|z|; at |z| = 0 neither."""
    x, y, size = _direction(*primals)
    (dx, dy), magnitude, zero = tangents, jax.nn.sigmoid(size), size == 0
    along = jnp.where(zero, 0.0, magnitude * (1 - magnitude)) * (x * dx + y * dy)
    across = jnp.where(zero, 0.0, magnitude / jnp.where(zero, 1.0, size)) * (x * dy - y * dx)
    return (magnitude * x, magnitude * y), (along * x - across * y, along * y + across * x)


def paper(logit: Array, phase: Array) -> tuple[Array, Array]:
    """a = σ(logit)·e^{i·phase}: the gate of the paper, |a| in (0, 1), phase in radians and unbounded.

    Args:
        logit: logit of the magnitude, any shape.
        phase: phase in radians, the same shape.

    Returns:
        The real and imaginary parts of a.

    Raises:
        ValueError: shapes differ, or an array is not real floating point.

    Source: T. Katsch, GateLoop (2023), section 3.1.
    """
    logit, phase = _wide(logit, phase, "paper")
    magnitude, (cos, sin) = jax.nn.sigmoid(logit), cos_sin(phase)
    return magnitude * cos, magnitude * sin


def ring(logit: Array, phase: Array) -> tuple[Array, Array]:
    """a = σ(logit)·e^{i·phase}, meant to start near the unit circle: see `ring_input_scale`, `ring_start`.

    The function is that of `paper`; what makes the gate stable is its start (memories spread over the training
    length, phases learned per head) and the scale of the inputs.

    Args:
        logit: logit of the magnitude, any shape.
        phase: phase in radians, the same shape.

    Returns:
        The real and imaginary parts of a.

    Raises:
        ValueError: shapes differ, or an array is not real floating point.

    Source: Orvieto et al., Resurrecting Recurrent Neural Networks for Long Sequences (2023), section 3.
    """
    logit, phase = _wide(logit, phase, "ring")
    return paper(logit, phase)


def ring_input_scale(logit: Array) -> Array:
    """√(1 - |a|²) for |a| = σ(logit): with it, a state fed by white noise keeps unit variance.

    Computed from the logit, not from |a|: near |a| = 1 it keeps its digits and its gradient stays below ½.

    Args:
        logit: logit of the magnitude, any shape.

    Returns:
        The scale, same shape, in float32 or better.
    """
    return _input_scale(logit.astype(compute_dtype(logit.dtype)))


@jax.custom_jvp
def _input_scale(logit: Array) -> Array:
    return jnp.sqrt(jax.nn.sigmoid(-logit) * (1.0 + jax.nn.sigmoid(logit)))


@_input_scale.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """Differentiate: -|a|² √((1 - |a|) / (1 + |a|)), whose denominator never vanishes."""
    (logit,), (tangent,) = primals, tangents
    magnitude, rest = jax.nn.sigmoid(logit), jax.nn.sigmoid(-logit)
    slope = -magnitude * magnitude * jnp.sqrt(rest / (1.0 + magnitude))
    return _input_scale(logit), slope * tangent


def ring_start(key: Array, heads: int, max_memory: float, min_memory: float = 1.0) -> tuple[Array, Array]:
    """Logits and phases (heads,) to start from: memories 1/(1-|a|) spread log-uniformly over a range.

    Phases are uniform in ±π, scaled by 1-|a|: a state turns about once in its own memory at most.

    Args:
        key: key of JAX's random numbers, for the phases.
        heads: number of gates.
        max_memory: the longest memory in steps, above 1.
        min_memory: the shortest memory in steps, from 1 to below max_memory.

    Returns:
        logits (heads,) and phases (heads,) in radians.

    Raises:
        ValueError: the range is empty or goes below 1.
    """
    if not 1 < max_memory < math.inf:
        raise ValueError(f"max_memory must be finite and above 1 step, not {max_memory}")
    if not 1 <= min_memory < max_memory:
        raise ValueError(f"min_memory must be at least 1 step and below max_memory={max_memory}, not {min_memory}")
    shortest = math.log(min_memory)
    exponents = shortest + (math.log(max_memory) - shortest) * (jnp.arange(heads) + 0.5) / heads
    phases = jax.random.uniform(key, (heads,), minval=-jnp.pi, maxval=jnp.pi) / jnp.exp(exponents)
    return jnp.log(jnp.expm1(exponents)), phases


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def scale_gradient(x: Array, fraction: float) -> Array:
    """Return x itself, with its gradient multiplied by `fraction`."""
    return x


@scale_gradient.defjvp
def _(fraction: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return primals[0], tangents[0] * fraction


# The gates of a layer by name: from both projections to (real, imaginary).
GATES: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {"polar": polar, "paper": paper, "ring": ring}


def head_gates(
    projections: Array,
    *,
    gate: str = "polar",
    bias: tuple[Array, Array] | None = None,
    fraction: float = 1.0,
    real: bool = False,
) -> tuple[Array, Array | None, Array | None]:
    """Compute gates for `gate_loop` from projections, and the scale of their keys, in float32 or better.

    Args:
        projections: adjacent pairs (..., 2·H): (real, imaginary) for `polar`, (logit, phase) for `paper` and `ring`.
        gate: "polar", "paper" or "ring".
        bias: (H,) each, added to the projections; only "ring" takes it, and needs it.
        fraction: the gradient of the projections (not that of the bias) is multiplied by this.
        real: make gates real: the imaginary projection or the phase counts as 0.

    Returns:
        Real part, imaginary part (None if `real`) and, for "ring", `ring_input_scale` (None for others), each (..., H).

    Raises:
        ValueError: shapes or dtypes do not fit, or no gate has that name.
    """
    check_gate("head_gates", gate)
    projections = array("head_gates", "projections", projections)
    if projections.ndim < 1 or projections.shape[-1] % 2:
        raise ValueError(f"head_gates: projections must have shape (..., 2·H), not {projections.shape}")
    if (bias is not None) != (gate == "ring"):
        raise ValueError("head_gates: 'ring' needs a bias (logits, phases), other gates take none")
    floating("head_gates", ("projections",), projections=projections)
    z = scale_gradient(projections, fraction)
    z = z.astype(compute_dtype(z.dtype)).reshape(*z.shape[:-1], z.shape[-1] // 2, 2)
    first, second = z[..., 0], z[..., 1]
    if bias is not None:
        bias = real_pair("head_gates", "bias", bias, (projections.shape[-1] // 2,), "(H,)")
        assert bias is not None
        first, second = first + bias[0].astype(z.dtype), second + bias[1].astype(z.dtype)
    re, im = GATES[gate](first, jnp.zeros_like(second) if real else second)
    return re, None if real else im, ring_input_scale(first) if gate == "ring" else None


def check_gate(caller: str, gate: str) -> None:
    """Check that a kind of gate of that name exists.

    Raises:
        ValueError: there is none.
    """
    if gate not in GATES:
        raise ValueError(f"{caller}: gate must be one of {', '.join(GATES)}, not {gate!r}")
