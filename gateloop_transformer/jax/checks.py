"""Checks of arguments on the JAX side, each with one clear error. Values that JAX traces are not checked."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gateloop_transformer.jax.chunks import Packed
from gateloop_transformer.jax.pairs import Array


def array(operator: str, name: str, value: Any) -> Array:
    """Convert `value` to an array of JAX.

    Raises:
        ValueError: it is not an array.
    """
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return jnp.asarray(value)
    raise ValueError(f"{operator}: {name} must be an array, not {type(value).__name__}")


def dims(operator: str, name: str, x: Array, names: str) -> None:
    """Check that `x` has as many dimensions as `names` has words.

    Raises:
        ValueError: it has not.
    """
    expected = names.split()
    if x.ndim != len(expected):
        raise ValueError(f"{operator}: {name} must have shape ({', '.join(expected)}), not {x.shape}")


def same_shape(operator: str, name: str, x: Array, expected: tuple[int, ...], meaning: str) -> None:
    """Check that `x` has the shape that the other arguments demand.

    Raises:
        ValueError: it has not.
    """
    if x.shape != expected:
        raise ValueError(f"{operator}: {name} must have shape {meaning} = {expected}, not {x.shape}")


def floating(operator: str, real_only: tuple[str, ...] = (), **arrays: Array | None) -> None:
    """Check that all arrays are floating point, and that those named in `real_only` are real.

    Raises:
        ValueError: one is not.
    """
    for name, x in arrays.items():
        if x is None or jnp.issubdtype(x.dtype, jnp.floating):
            continue
        if not jnp.iscomplexobj(x):
            raise ValueError(f"{operator}: {name} must be a floating-point array, not {x.dtype}")
        if name in real_only:
            raise ValueError(f"{operator}: {name} must be real, not {x.dtype}; only gates and states are complex")


class Layout:
    """Where sequences begin inside a batch (B, T, ...): resets (B, T), or documents packed in one row.

    Raises:
        ValueError: shapes or dtypes do not fit, or cu_seqlens comes with more than one row.
    """

    def __init__(self, operator: str, x: Array, resets: Any, cu_seqlens: Any) -> None:
        B, T = x.shape[:2]
        self.rows, self.resets, self.packed = B, None, None
        if resets is not None:
            resets = array(operator, "resets", resets)
            if resets.dtype != jnp.bool_ or resets.shape != (B, T):
                raise ValueError(
                    f"{operator}: resets must be booleans of shape (B, T) = {(B, T)}, not {resets.dtype} {resets.shape}"
                )
            self.resets = resets
        if cu_seqlens is None:
            return
        bounds = array(operator, "cu_seqlens", cu_seqlens)
        if bounds.ndim != 1 or not bounds.shape[0] or not jnp.issubdtype(bounds.dtype, jnp.signedinteger):
            raise ValueError(
                f"{operator}: cu_seqlens must be integers of shape (N + 1,), not {bounds.dtype} {bounds.shape}"
            )
        if B != 1:
            raise ValueError(f"{operator}: documents given by cu_seqlens are packed in one row, not in B = {B}")
        if not isinstance(bounds, jax.core.Tracer):
            known = np.asarray(bounds).tolist()
            if known[0] != 0 or known[-1] != T or any(b < a for a, b in itertools.pairwise(known)):
                shown = known if len(known) <= 8 else [*known[:4], "...", *known[-3:]]
                raise ValueError(f"{operator}: cu_seqlens must ascend from 0 to T = {T}, not {shown}")
        self.packed = Packed(bounds)

    @property
    def states(self) -> int:
        """The number of initial and final states."""
        return self.rows if self.packed is None else self.packed.number

    @property
    def letter(self) -> str:
        """The name of a state's first dimension."""
        return "B" if self.packed is None else "N"

    def forgets(self, ndim: int) -> Array | None:
        """Mark the rows that are reset somewhere (B, 1, ..., 1), in `ndim` dimensions; None: none is."""
        if self.resets is None:
            return None
        return self.resets.any(1).reshape(self.rows, *[1] * (ndim - 1))


def real_pair(
    operator: str, name: str, value: Any, expected: tuple[int, ...], meaning: str
) -> tuple[Array, Array] | None:
    """Check that a value is a tuple of two real arrays of one shape, or None.

    Raises:
        ValueError: it is neither.
    """
    if value is None:
        return None
    if not isinstance(value, tuple) or len(value) != 2:
        raise ValueError(f"{operator}: {name} must be a tuple of two arrays, not {type(value).__name__}")
    first, second = (array(operator, f"{name}[{n}]", part) for n, part in enumerate(value))
    for n, part in enumerate((first, second)):
        same_shape(operator, name, part, expected, meaning)
        floating(operator, (f"{name}[{n}]",), **{f"{name}[{n}]": part})
    return first, second


def packed_inputs(operator: str, name: str, x: Any) -> Array:
    """Check that x holds three real arrays side by side (B, T, 3·D).

    Raises:
        ValueError: it does not.
    """
    x = array(operator, name, x)
    dims(operator, name, x, "B T 3·D")
    if x.shape[-1] % 3:
        raise ValueError(f"{operator}: {name} must have shape (B, T, 3·D), not {x.shape}")
    floating(operator, (name,), **{name: x})
    return x
