"""S[t] = a[t] S[t-1] + k[t] ⊗ v[t], y[t] = Re(q[t]ᵀ S[t]) in chunks of time: states are kept only between chunks.

B batch, H heads, G gates of a head (1 or K), C steps of a chunk, K key size, V value size, N documents. The formulas
are those of docs/math.md; products of gates are never divided, so gates of 0 and their gradients are exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gateloop_transformer.jax.pairs import Array, Pair, alike


class Packed(NamedTuple):
    """Documents in one row: their bounds (N + 1,), ascending from 0 to T."""

    bounds: Array

    @property
    def number(self) -> int:
        """N."""
        return self.bounds.shape[0] - 1

    def documents(self, T: int) -> Array:
        """The document of each step (T,)."""
        return jnp.searchsorted(self.bounds[1:], jnp.arange(T), side="right")

    def lengths(self) -> Array:
        """Steps of each (N,)."""
        return jnp.diff(self.bounds)


class _Part(NamedTuple):
    """A chunk: q, k (B, H, C, K), v (B, H, C, V), gates (B, H, G, C)."""

    q: Array
    k: Array
    v: Array
    gates: Pair


def _turned(x: Array) -> Array:
    return x.swapaxes(-1, -2)


@jax.custom_vjp
def decay_products(gates: Pair) -> Pair:
    """Products D[i, j] = a[j+1] ··· a[i] for i ≥ j, 0 above the diagonal: (..., C) → (..., C, C), C a power of 2."""
    C = gates.re.shape[-1]
    D, size = gates.map(lambda x: jnp.zeros((*x.shape, 1, 1), x.dtype)), 1
    D = Pair(D.re + 1, D.im)
    while size < C:
        low, high = D.map(lambda x: x[..., 0::2, :, :]), D.map(lambda x: x[..., 1::2, :, :])
        prefix = gates.map(lambda x, size=size: x[..., size :: 2 * size, None]).times(high.map(lambda x: x[..., :, 0]))  # type: ignore[misc]
        corner = prefix.map(lambda x: x[..., None]).times(low.map(lambda x: x[..., -1:, :]))
        D, size = Pair.of_parts(_grown, low, corner, high), 2 * size
    return D.map(lambda x: x[..., 0, :, :])


def _decay_backward(D: Pair, grad: Pair) -> tuple[Pair]:
    """da[t] = Σ_{i ≥ t > j} W[i, j] conj(D[i, t] D[t-1, j]), without a quotient.

    JAX's own way back through the doubling is five times slower.
    """
    adjoint = D.conj().map(_turned)
    X = Pair(adjoint.re @ grad.re)
    if adjoint.im is not None and grad.im is not None:
        X = Pair(X.re - adjoint.im @ grad.im, adjoint.re @ grad.im + adjoint.im @ grad.re)
    before = D.conj().map(lambda x: jnp.pad(x[..., :-1, :], [(0, 0)] * (x.ndim - 2) + [(1, 0), (0, 0)]))
    return (X.times(before).map(lambda x: x.sum(-1)),)


def _decay_forward(gates: Pair) -> tuple[Pair, Pair]:
    D = decay_products(gates)
    return D, D


decay_products.defvjp(_decay_forward, _decay_backward)


def _grown(low: Array, corner: Array, high: Array) -> Array:
    return jnp.block([[low, jnp.zeros_like(low)], [corner, high]])


def _chunk(state: Pair, part: _Part) -> tuple[Pair, Array]:
    """The state (B, H, K, V) after a chunk, and the chunk's outputs (B, H, C, V)."""
    q, k, v, a = part
    decay = decay_products(a)
    start = a.map(lambda x: x[..., :1]).times(decay.map(lambda x: x[..., :, 0])).map(_turned)
    end = decay.map(lambda x: _turned(x[..., -1, :]))
    if a.re.shape[-2] == 1:
        scores = (q @ _turned(k)) * decay.re[..., 0, :, :]
    else:
        scores = jnp.einsum("bhic,bhjc,bhcij->bhij", q, k, decay.re)
    y = scores @ v + (q * start.re) @ state.re
    if start.im is not None and state.im is not None:
        y = y - (q * start.im) @ state.im
    whole = start.map(lambda x: x[..., -1, :, None])
    return whole.times(state).plus(end.map(lambda x: _turned(k * x) @ v)), y


def chunk_length(K: int, V: int, per_channel: bool) -> int:
    """Steps of a chunk: near the size of a state, so that products inside and with states cost the same."""
    return 16 if per_channel else min(64, max(16, 1 << (max(K, V) - 1).bit_length()))


def _cut(x: Array, C: int, slots: Array | None, length: int, fill: float) -> Array:
    """(B, T, H, n) → (chunks, B, H, C, n), filled up to `length` steps; with `slots` (T,) step t goes to slots[t]."""
    B, T, H, n = x.shape
    if slots is None:
        x = jnp.pad(x, ((0, 0), (0, length - T), (0, 0), (0, 0)), constant_values=fill)
    else:
        x = jnp.full((B, length, H, n), fill, x.dtype).at[:, slots].set(x)
    return x.reshape(B, length // C, C, H, n).transpose(1, 0, 3, 2, 4)


def _mend(y: Array, slots: Array | None, T: int) -> Array:
    """The inverse of `_cut`."""
    chunks, B, H, C, n = y.shape
    y = y.transpose(1, 0, 3, 2, 4).reshape(B, chunks * C, H, n)
    return y[:, :T] if slots is None else y[:, slots]


def chunked_loop(
    queries: Array, keys: Array, values: Array, gates: Pair, initial: Pair, packed: Packed | None
) -> tuple[Array, Pair]:
    """Outputs (B, T, H, V) and the last state (B, H, K, V), or (N, H, K, V).

    Args:
        queries: q (B, T, H, K).
        keys: k (B, T, H, K).
        values: v (B, T, H, V).
        gates: a (B, T, H, G); without imaginary part where all are real.
        initial: S before the first step (B, H, K, V), or of each document (N, H, K, V), complex where gates are.
        packed: documents, in a batch of one row.
    """
    queries, keys, values, gates, initial = alike(queries, keys, values, gates, initial)
    T, K, V = queries.shape[1], queries.shape[-1], values.shape[-1]
    C = chunk_length(K, V, gates.re.shape[-1] > 1)
    slots, length = (None, -(-T // C) * C) if packed is None else _slots(packed, T, C)
    cut = functools.partial(_cut, C=C, slots=slots, length=length)
    a = Pair(cut(gates.re, fill=1.0), None if gates.im is None else cut(gates.im, fill=0.0)).map(_turned)
    q, k, v = (cut(x, fill=0.0) for x in (queries, keys, values))
    parts = _Part(q, k, v, a)
    step = jax.checkpoint(_chunk)
    with jax.default_matmul_precision("highest"):
        if packed is None:
            final, y = jax.lax.scan(step, initial, parts)
        else:
            y, final = _documents(step, initial, parts, packed, C)
    return _mend(y, slots, T), final


def _slots(packed: Packed, T: int, C: int) -> tuple[Array, int]:
    """Where each step goes so that every document begins with a chunk, and how much room that takes at most."""
    document = packed.documents(T)
    chunks = -(-packed.lengths() // C)
    begin = (jnp.cumsum(chunks) - chunks) * C
    slots = begin[document] + jnp.arange(T) - packed.bounds[document]
    return slots, (T // C + packed.number) * C


def _documents(step: Callable[..., Any], initial: Pair, parts: _Part, packed: Packed, C: int) -> tuple[Array, Pair]:
    """Chunks one after the other, each document from its own state; the state after each is looked up at its end."""
    chunks = -(-packed.lengths() // C)
    ends = jnp.cumsum(chunks)
    numbers = jnp.arange(parts.q.shape[0])
    document = jnp.minimum(jnp.searchsorted(ends, numbers, side="right"), packed.number - 1)
    begins = numbers == (ends - chunks)[document]

    def run(state: Pair, part: tuple[_Part, Array, Array]) -> tuple[Pair, tuple[Array, Pair]]:
        chunk, document, begins = part
        own = initial.map(lambda x: jax.lax.dynamic_slice_in_dim(x, document, 1))
        state = own.where(begins, state)
        state, y = step(state, chunk)
        return state, (y, state)

    first = initial.map(lambda x: jnp.zeros_like(x[:1]))
    _, (y, after) = jax.lax.scan(run, first, (parts, document, begins))
    there = (chunks > 0)[:, None, None, None]
    last = jnp.maximum(ends - 1, 0)
    return y, Pair.of_parts(lambda x, start: jnp.where(there, x[last, 0], start), after, initial)
