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
    """Documents packed in one row, by their bounds (N + 1,), ascending from 0 to T."""

    bounds: Array

    @property
    def number(self) -> int:
        """The number of documents, N."""
        return self.bounds.shape[0] - 1

    def documents(self, T: int) -> Array:
        """The document of each step (T,)."""
        return jnp.searchsorted(self.bounds[1:], jnp.arange(T), side="right")

    def lengths(self) -> Array:
        """The number of steps of each document (N,)."""
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
    """Differentiate without a quotient: da[t] = Σ_{i ≥ t > j} W[i, j] conj(D[i, t] D[t-1, j]).

    JAX's own gradient through the doubling is five times slower.
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


def _chunk(state: Pair, part: _Part, marks: Array | None) -> tuple[Pair, Array]:
    """The state (B, H, K, V) after a chunk, and the chunk's outputs (B, H, C, V).

    Values that no step sees are multiplied by 0, and a reset is a gate of 0: this is right where all results are
    finite.
    """
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


def _chunk_by_steps(state: Pair, part: _Part, marks: Array | None) -> tuple[Pair, Array]:
    """Compute `_chunk` by definition, one step after the other; `marks` (B, 1, 1, C) are resets."""

    def step(state: Pair, now: tuple[_Part, Array | None]) -> tuple[Pair, Array]:
        (q, k, v, a), began = now
        before = state.cleared(None if began is None else began[..., None])
        state = a.map(lambda x: x[..., None]).times(before).plus(Pair(k[..., None] * v[..., None, :]))
        return state, (q[..., None] * state.re).sum(-2)

    q, k, v = (jnp.moveaxis(x, 2, 0) for x in part[:3])
    a = part.gates.map(lambda x: jnp.moveaxis(x, 3, 0))
    steps = _Part(q, k, v, a), None if marks is None else jnp.moveaxis(marks, 3, 0)
    state, y = jax.lax.scan(jax.checkpoint(step), state, steps)
    return state, jnp.moveaxis(y, 0, 2)


def chunk_length(K: int, V: int, per_channel: bool) -> int:
    """Choose the steps of a chunk: near the size of a state, so that products inside and with states cost the same."""
    return 16 if per_channel else min(64, max(16, 1 << (max(K, V) - 1).bit_length()))


def _cut(x: Array, C: int, slots: Array | None, length: int, fill: float) -> Array:
    """Cut into chunks, padded: (B, T, H, n) → (chunks, B, H, C, n); step t goes to slots[t], if given."""
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
    queries: Array,
    keys: Array,
    values: Array,
    gates: Pair,
    initial: Pair,
    resets: Array | None,
    packed: Packed | None,
) -> tuple[Array, Pair]:
    """Compute outputs (B, T, H, V) and the last state (B, H, K, V), or (N, H, K, V).

    A number that is not finite, or a product that overflows, reaches only the results that depend on it: where there
    is one, everything is computed again step by step, and so are gradients.

    Args:
        queries: q (B, T, H, K).
        keys: k (B, T, H, K).
        values: v (B, T, H, V).
        gates: a (B, T, H, G); without imaginary part where all are real.
        initial: S before the first step (B, H, K, V), or before each document (N, H, K, V), complex where gates are.
        resets: (B, T) booleans, True at steps whose gate, and the state before, count as 0; None: nowhere.
        packed: the documents in a batch of one row.
    """
    queries, keys, values, gates, initial, resets = alike(queries, keys, values, gates, initial, resets)
    T, K, V = queries.shape[1], queries.shape[-1], values.shape[-1]
    C = chunk_length(K, V, gates.re.shape[-1] > 1)
    slots, length = (None, -(-T // C) * C) if packed is None else _slots(packed, T, C)
    cut = functools.partial(_cut, C=C, slots=slots, length=length)
    gates = gates.cleared(None if resets is None else resets[..., None, None])
    a = Pair(cut(gates.re, fill=1.0), None if gates.im is None else cut(gates.im, fill=0.0)).map(_turned)
    q, k, v = (cut(x, fill=0.0) for x in (queries, keys, values))
    marks = None if resets is None else _turned(cut(resets[..., None, None], fill=False))
    y, final = _loop(initial, _Part(q, k, v, a), marks, packed)
    return _mend(y, slots, T), final


@jax.custom_vjp
def _loop(initial: Pair, parts: _Part, marks: Array | None, packed: Packed | None) -> tuple[Array, Pair]:
    """Compute outputs (chunks, B, H, C, V) and the last state."""
    found = _over_chunks(_chunk, initial, parts, marks, packed)
    return _or_else(found, found, _exactly, initial, parts, marks, packed)


def _loop_forward(
    initial: Pair, parts: _Part, marks: Array | None, packed: Packed | None
) -> tuple[tuple[Array, Pair], tuple[Any, ...]]:
    found, back = jax.vjp(lambda *x: _over_chunks(_chunk, x[0], x[1], marks, packed), initial, parts)
    found = _or_else(found, found, _exactly, initial, parts, marks, packed)
    return found, (back, initial, parts, marks, packed)


def _loop_backward(kept: tuple[Any, ...], grad: tuple[Array, Pair]) -> tuple[Pair, _Part, None, None]:
    back, *arguments = kept
    d_initial, d_parts = back(grad)
    # All products, masked ones too, go into the gradient of the gates, so checking only that is enough, and cheap.
    return *_or_else((d_initial, d_parts), d_parts.gates, _gradients_exactly, grad, *arguments), None, None


_loop.defvjp(_loop_forward, _loop_backward)


def _exactly(initial: Pair, parts: _Part, marks: Array | None, packed: Packed | None) -> tuple[Array, Pair]:
    return _over_chunks(_chunk_by_steps, initial, parts, marks, packed)


def _gradients_exactly(
    grad: tuple[Array, Pair], initial: Pair, parts: _Part, marks: Array | None, packed: Packed | None
) -> tuple[Pair, _Part]:
    gradients: tuple[Pair, _Part] = jax.vjp(lambda *x: _exactly(x[0], x[1], marks, packed), initial, parts)[1](grad)
    return gradients


def _or_else(found: Any, looked_at: Any, exactly: Callable[..., Any], *arguments: Any) -> Any:
    """Return `found` where all numbers in `looked_at` are finite, else the result of `exactly`.

    This is a loop of at most one round, because `lax.cond` would compute both under `vmap`. The loop has no gradient;
    that of `found` is used.
    """
    fine = functools.reduce(jnp.logical_and, (jnp.isfinite(x).all() for x in jax.tree.leaves(looked_at)))
    first, held = jax.lax.stop_gradient((found, arguments))
    mended = jax.lax.while_loop(lambda now: ~now[0], lambda now: (now[0] | True, exactly(*held)), (fine, first))[1]
    return _instead(found, mended)


@jax.custom_jvp
def _instead(found: Any, mended: Any) -> Any:
    return mended


@_instead.defjvp
def _(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    return primals[1], tangents[0]


def _over_chunks(
    step: Callable[..., Any], initial: Pair, parts: _Part, marks: Array | None, packed: Packed | None
) -> tuple[Array, Pair]:
    """Compute chunks one after the other, keeping the states between them for the gradient."""
    step = jax.checkpoint(step)
    with jax.default_matmul_precision("highest"):
        if packed is not None:
            return _documents(step, initial, parts, marks, packed)
        final, y = jax.lax.scan(lambda state, now: step(state, *now), initial, (parts, marks))
    return y, final


def _slots(packed: Packed, T: int, C: int) -> tuple[Array, int]:
    """The slot of each step, such that every document begins with a chunk, and the most slots that this takes."""
    document = packed.documents(T)
    chunks = -(-packed.lengths() // C)
    begin = (jnp.cumsum(chunks) - chunks) * C
    slots = begin[document] + jnp.arange(T) - packed.bounds[document]
    return slots, (T // C + packed.number) * C


def _documents(
    step: Callable[..., Any], initial: Pair, parts: _Part, marks: Array | None, packed: Packed
) -> tuple[Array, Pair]:
    """Compute chunks one after the other, each document from its own state; its last state is looked up at its end."""
    chunks = -(-packed.lengths() // parts.q.shape[-2])
    ends = jnp.cumsum(chunks)
    numbers = jnp.arange(parts.q.shape[0])
    document = jnp.minimum(jnp.searchsorted(ends, numbers, side="right"), packed.number - 1)
    begins = numbers == (ends - chunks)[document]

    def run(state: Pair, now: tuple[_Part, Array | None, Array, Array]) -> tuple[Pair, tuple[Array, Pair]]:
        part, marks, document, begins = now
        own = initial.map(lambda x: jax.lax.dynamic_slice_in_dim(x, document, 1))
        state = own.where(begins, state)
        state, y = step(state, part, marks)
        return state, (y, state)

    first = initial.map(lambda x: jnp.zeros_like(x[:1]))
    _, (y, after) = jax.lax.scan(run, first, (parts, marks, document, begins))
    there = (chunks > 0)[:, None, None, None]
    last = jnp.maximum(ends - 1, 0)
    return y, Pair.of_parts(lambda x, start: jnp.where(there, x[last, 0], start), after, initial)
