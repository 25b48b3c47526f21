"""Cosine and sine together. On a CPU XLA calls a library for each number; polynomials are vectorised and faster."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gateloop_transformer.jax.pairs import Array

# Up to here three parts of π/2 leave the remainder exact to the last digit of float32.
_LARGEST = 8192.0
_HALF_PI = (1.5703125, 4.837512969970703125e-4, 7.54978995489188216e-8)


def _library(phase: Array) -> tuple[Array, Array]:
    return jnp.cos(phase), jnp.sin(phase)


def _polynomials(phase: Array) -> tuple[Array, Array]:
    """Float32 and no larger than `_LARGEST`: the nearest multiple of π/2 taken off, then a series on ±π/4."""
    n = jnp.round(phase * (2 / jnp.pi))
    x = phase
    for part in _HALF_PI:
        x = x - n * part
    square, quadrant = x * x, n.astype(jnp.int32)
    sin = x + x * square * (-1.6666654611e-1 + square * (8.3321608736e-3 + square * -1.9515295891e-4))
    cos = 4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5)
    cos = 1 - 0.5 * square + square * square * cos
    swap = (quadrant & 1) == 1
    sin, cos = jnp.where(swap, cos, sin), jnp.where(swap, sin, cos)
    return jnp.where(((quadrant + 1) & 2) == 2, -cos, cos), jnp.where((quadrant & 2) == 2, -sin, sin)


def _on_a_cpu(phase: Array) -> tuple[Array, Array]:
    return jax.lax.cond(jnp.all(jnp.abs(phase) <= _LARGEST), _polynomials, _library, phase)


@jax.custom_jvp
def cos_sin(phase: Array) -> tuple[Array, Array]:
    """cos and sin of radians, any shape, within 2e-7 in float32.

    Source of the coefficients: S. Moshier, Cephes Mathematical Library (1989), sinf.c.
    """
    if phase.dtype != jnp.float32:
        return _library(phase)
    found: tuple[Array, Array] = jax.lax.platform_dependent(phase, cpu=_on_a_cpu, default=_library)
    return found


@cos_sin.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    cos, sin = cos_sin(*primals)
    return (cos, sin), (-sin * tangents[0], cos * tangents[0])
