"""The recurrences in JAX: pure functions of arrays, differentiable by JAX, linear memory in time.

B batch, T time, H heads, K key size, V value size, D channels, C steps per chunk.
Arithmetic is float32 or better, whatever the inputs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def _compute_dtype(*arrays: Array | None) -> Any:
    wide = (jnp.float64, jnp.complex128)
    return jnp.float64 if any(x is not None and x.dtype in wide for x in arrays) else jnp.float32


def _wide(x: Array, dtype: Any) -> Array:
    return x.astype(jnp.promote_types(dtype, jnp.complex64) if jnp.iscomplexobj(x) else dtype)


def _combine(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
    """Two stretches of a linear recurrence as one."""
    return left[0] * right[0], right[0] * left[1] + right[1]


def linear_scan(gates: Array, inputs: Array, initial: Array | None = None, *, reverse: bool = False) -> Array:
    """h[t] = a[t] h[t-1] + x[t].

    Args:
        gates: a (B, T, D), real or complex.
        inputs: x (B, T, D), real or complex.
        initial: h before the first step (B, D); zero when None.
        reverse: run from the last step to the first.

    Returns:
        All states (B, T, D), in float32 or better.
    """
    dtype = _compute_dtype(gates, inputs, initial)
    a, x = _wide(gates, dtype), _wide(inputs, dtype)
    if initial is not None:
        first = -1 if reverse else 0
        carried = a[:, first] * _wide(initial, dtype)
        x = x.astype(jnp.promote_types(x.dtype, carried.dtype)).at[:, first].add(carried)
    x = x.astype(jnp.promote_types(x.dtype, a.dtype))
    states: Array = jax.lax.associative_scan(_combine, (a, x), reverse=reverse, axis=1)[1]
    return states


def _decay_products(gates: Array) -> Array:
    """Products D[i, j] = a[j+1] ··· a[i] for i ≥ j, 0 above the diagonal: (..., C) → (..., C, C)."""
    C = gates.shape[-1]
    D, size = jnp.ones((*gates.shape, 1, 1), gates.dtype), 1
    while size < C:
        low, high = D[..., 0::2, :, :], D[..., 1::2, :, :]
        prefix = gates[..., size :: 2 * size, None] * high[..., :, 0]
        corner = prefix[..., None] * low[..., -1:, :]
        D = jnp.block([[low, jnp.zeros_like(low)], [corner, high]])
        size *= 2
    return D[..., 0, :, :]


def _chunk(state: Array, part: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
    """One chunk: q, k (B, H, C, K), v (B, H, C, V), gates (B, H, G, C), state (B, H, K, V)."""
    q, k, v, a = part
    decay = _decay_products(a)
    start = (a[..., :1] * decay[..., :, 0]).swapaxes(-1, -2)
    end = decay[..., -1, :].swapaxes(-1, -2)
    if a.shape[-2] == 1:
        scores = (q @ k.swapaxes(-1, -2)) * decay[..., 0, :, :].real
    else:
        scores = jnp.einsum("bhic,bhjc,bhcij->bhij", q, k, decay.real)
    y = scores @ v + ((q * start) @ state).real
    whole = start[..., -1, :, None]
    return whole * state + (k * end).swapaxes(-1, -2).astype(state.dtype) @ v.astype(state.dtype), y


def gate_loop(
    queries: Array,
    keys: Array,
    values: Array,
    gates: Array,
    initial: Array | None = None,
    *,
    reverse: bool = False,
) -> tuple[Array, Array]:
    """S[t] = a[t] S[t-1] + k[t] ⊗ v[t], y[t] = Re(q[t]ᵀ S[t]).

    Args:
        queries: q (B, T, H, K).
        keys: k (B, T, H, K).
        values: v (B, T, H, V).
        gates: a, real or complex, per head (B, T, H) or per key channel (B, T, H, K).
        initial: S before the first step (B, H, K, V); zero when None.
        reverse: run from the last step to the first.

    Returns:
        Outputs (B, T, H, V) in the queries' dtype, and the state after the last step (B, H, K, V).
    """
    B, T, H, K = queries.shape
    V = values.shape[-1]
    dtype = _compute_dtype(queries, gates, initial)
    q, k, v, a = (_wide(x, dtype) for x in (queries, keys, values, gates))
    a = a[..., None] if a.ndim == 3 else a
    state_dtype = a.dtype if initial is None else jnp.promote_types(a.dtype, _wide(initial, dtype).dtype)
    state = jnp.zeros((B, H, K, V), state_dtype) if initial is None else initial.astype(state_dtype)
    if reverse:
        q, k, v, a = (jnp.flip(x, 1) for x in (q, k, v, a))
    if K == V == 1:
        states = linear_scan(a[..., 0], k[..., 0] * v[..., 0], state[..., 0, 0])
        y, final = q * states.real[..., None], states[:, -1, :, None, None]
    else:
        C = 16 if a.shape[-1] > 1 else min(64, max(16, 1 << (max(K, V) - 1).bit_length()))
        N = -(-T // C)

        def cut(x: Array, value: float = 0.0) -> Array:
            x = jnp.pad(x, ((0, 0), (0, N * C - T), (0, 0), (0, 0)), constant_values=value)
            return x.reshape(B, N, C, H, -1).transpose(1, 0, 3, 2, 4)

        parts = cut(q), cut(k), cut(v), cut(a, 1.0).swapaxes(-1, -2)
        final, y = jax.lax.scan(jax.checkpoint(_chunk), state, parts)
        y = y.transpose(1, 0, 3, 2, 4).reshape(B, N * C, H, V)[:, :T]
    y = jnp.flip(y, 1) if reverse else y
    return y.astype(queries.dtype), final
