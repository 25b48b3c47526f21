"""Complex arrays as pairs of real ones: what the recurrences compute with, on every device in real arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Pair(NamedTuple):
    """A real array, or the real and imaginary parts of a complex one. A tree of one or two leaves."""

    re: Array
    im: Array | None = None

    def map(self, function: Callable[[Array], Array]) -> Pair:
        """`function` applied to each part."""
        return Pair(function(self.re), None if self.im is None else function(self.im))

    def times(self, other: Pair) -> Pair:
        """The product; no arithmetic is spent on parts that are not there."""
        if self.im is None:
            return other.map(lambda part: self.re * part)
        if other.im is None:
            return self.map(lambda part: part * other.re)
        return Pair(self.re * other.re - self.im * other.im, self.re * other.im + self.im * other.re)

    def plus(self, other: Pair) -> Pair:
        """The sum."""
        if self.im is None or other.im is None:
            return Pair(self.re + other.re, other.im if self.im is None else self.im)
        return Pair(self.re + other.re, self.im + other.im)

    def conj(self) -> Pair:
        """The complex conjugate."""
        return Pair(self.re, None if self.im is None else -self.im)

    @staticmethod
    def of_parts(function: Callable[..., Array], *pairs: Pair) -> Pair:
        """`function` of the real parts, and of the imaginary parts where all have one."""
        imaginary = [pair.im for pair in pairs]
        im = None if any(part is None for part in imaginary) else function(*imaginary)
        return Pair(function(*(pair.re for pair in pairs)), im)

    def where(self, condition: Array, other: Pair) -> Pair:
        """Its numbers where `condition` holds, elsewhere those of `other`."""
        return Pair.of_parts(lambda x, y: jnp.where(condition, x, y), self, other)

    def cleared(self, marks: Array | None) -> Pair:
        """0 where marked, whatever stood there: a product with 0 would leave NaN of what is not finite."""
        return self if marks is None else self.map(lambda x: jnp.where(marks, 0, x))

    def as_complex(self) -> Pair:
        """Give the pair an imaginary part, 0 where there was none."""
        return self if self.im is not None else Pair(self.re, jnp.zeros_like(self.re))

    def join(self) -> Array:
        """One array, real or complex."""
        return self.re if self.im is None else jax.lax.complex(self.re, self.im)


def split(value: Array | tuple[Array, Array]) -> Pair:
    """A real or complex array, or a tuple (real, imaginary), as a pair."""
    if isinstance(value, tuple):
        return Pair(*value)
    return Pair(value.real, value.imag) if jnp.iscomplexobj(value) else Pair(value)


def compute_dtype(*dtypes: Any) -> Any:
    """float64 if one is, else float32: narrower types are computed in float32."""
    return jnp.float64 if any(dtype in (jnp.float64, jnp.complex128) for dtype in dtypes) else jnp.float32


def _varying(x: Array) -> frozenset[str]:
    """Axes of a mesh along which devices hold different values of x, inside of `jax.shard_map`."""
    kind = jax.typeof(x)
    # Before JAX 0.10 it had another name.
    axes: frozenset[str] = kind.mat.varying if hasattr(kind, "mat") else getattr(kind, "vma", frozenset())
    return axes


def alike(*trees: Any) -> tuple[Any, ...]:
    """Mark all arrays as differing between devices where one of them does, as the values of a loop must agree."""
    axes = frozenset[str]().union(*(_varying(x) for x in jax.tree.leaves(trees)))

    def mark(x: Array) -> Array:
        missing = tuple(sorted(axes - _varying(x)))
        if not missing:
            return x
        # Before JAX 0.8 it had another name.
        convert: Any = getattr(jax.lax, "pcast", None)
        return convert(x, missing, to="varying") if convert else getattr(jax.lax, "pvary")(x, missing)  # noqa: B009

    return tuple(jax.tree.map(mark, tree) for tree in trees)
