"""h[t] = a[t] h[t-1] + x[t] on pairs: the elementwise recurrence under every operator, with a gradient of its own.

B batch, T time, D channels. Kept for the gradient are the gates and the states, nothing for each level of a tree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gateloop_transformer.jax.pairs import Array, Pair, alike

# Of a stretch of time: the product of its gates, what it adds to a state, and whether it began anew (B, n, 1).
_Stretch = tuple[Pair, Pair, Array | None]


def _at(pair: Pair, t: Array) -> Pair:
    return pair.map(lambda x: jax.lax.dynamic_index_in_dim(x, t, 1, keepdims=False))


def _put(pair: Pair, value: Pair, t: Array) -> Pair:
    """`value` as step t of `pair`, of which it may have fewer parts; inside of a loop it is written in place."""
    return Pair.of_parts(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, t, 1), pair, value)


def _room(inputs: Pair, like: Pair) -> Pair:
    """Zeros (B, T, D) with the parts of `like`."""
    return like.map(lambda _: jnp.zeros_like(inputs.re))


def _marks(resets: Array | None, t: Array) -> Array | None:
    """Mark the rows that are reset at step t (B, 1); None: none is."""
    return None if resets is None else jax.lax.dynamic_index_in_dim(resets, t, 1)


def _step_by_step(gates: Pair, inputs: Pair, initial: Pair, resets: Array | None, reverse: bool) -> Pair:
    """One step after the other, in place: a CPU reads and writes everything once."""
    T = inputs.re.shape[1]

    def step(n: Array, carried: tuple[Pair, Pair]) -> tuple[Pair, Pair]:
        t = T - 1 - n if reverse else n
        h = _at(gates, t).times(carried[0]).cleared(_marks(resets, t)).plus(_at(inputs, t))
        return h, _put(carried[1], h, t)

    return jax.lax.fori_loop(0, T, step, (initial, _room(inputs, initial)))[1]


def _as_a_tree(gates: Pair, inputs: Pair, initial: Pair, resets: Array | None, reverse: bool) -> Pair:
    """In a logarithm of T rounds, as devices want it for which a step is too little work."""
    first = -1 if reverse else 0
    marks = None if resets is None else resets[..., None]
    carried = gates.map(lambda x: x[:, first]).times(initial).cleared(None if marks is None else marks[:, first])
    whole = inputs if initial.im is None else inputs.as_complex()
    x = Pair.of_parts(lambda x, c: x.at[:, first].add(c), whole, carried)

    def combine(early: _Stretch, late: _Stretch) -> _Stretch:
        a, x, began = late
        any_began = None if began is None or early[2] is None else began | early[2]
        return early[0].times(a), a.times(early[1]).cleared(began).plus(x), any_began

    states: Pair = jax.lax.associative_scan(combine, (gates, x, marks), reverse=reverse, axis=1)[1]
    return states


def _gradients_step_by_step(
    gates: Pair, states: Pair, initial: Pair, grad: Pair, resets: Array | None, reverse: bool
) -> tuple[Pair, ...]:
    """g[t] = dh[t] + conj(a[t+1]) g[t+1]; da[t] = g[t] conj(h[t-1]); dx = g; dh0 = conj(a[1]) g[1]: in one pass.

    At a reset nothing goes back and a has no part in it.
    """
    T = grad.re.shape[1]

    def step(n: Array, carried: tuple[Pair, Pair, Pair]) -> tuple[Pair, Pair, Pair]:
        after, d_inputs, d_gates = carried
        t, before = (n, jnp.minimum(n + 1, T - 1)) if reverse else (T - 1 - n, jnp.maximum(T - 2 - n, 0))
        h = initial.where(n == T - 1, _at(states, before))
        g, marks = _at(grad, t).plus(after), _marks(resets, t)
        d_gates = _put(d_gates, g.times(h.conj()).cleared(marks), t)
        return _at(gates, t).conj().times(g).cleared(marks), _put(d_inputs, g, t), d_gates

    room = _room(grad, grad), _room(grad, gates)
    d_initial, d_inputs, d_gates = jax.lax.fori_loop(0, T, step, (initial.map(jnp.zeros_like), *room))
    return d_gates, d_inputs, d_initial


def _gradients_as_trees(
    gates: Pair, states: Pair, initial: Pair, grad: Pair, resets: Array | None, reverse: bool
) -> tuple[Pair, ...]:
    """Compute the gradients in log₂(T) rounds."""
    first = -1 if reverse else 0
    marks = None if resets is None else resets[..., None]
    # The scan the other way round; nothing comes after its first step.
    later = gates.map(lambda x: _shifted(x, jnp.zeros_like(x[:, 0]), not reverse)).conj()
    began = None if resets is None else _shifted(resets, jnp.zeros_like(resets[:, 0]), not reverse)
    g = _as_a_tree(later, grad, initial.map(jnp.zeros_like), began, not reverse)
    before = Pair.of_parts(lambda h, h0: _shifted(h, h0, reverse), states, initial)
    d_initial = gates.map(lambda x: x[:, first]).conj().times(g.map(lambda x: x[:, first]))
    d_initial = d_initial.cleared(None if marks is None else marks[:, first])
    return g.times(before.conj()).cleared(marks), g, d_initial


def _shifted(x: Array, first: Array, reverse: bool) -> Array:
    """x (B, T, ...) one step later in the order of the scan, `first` (B, ...) coming in."""
    edge = jnp.expand_dims(first, 1)
    return jnp.concatenate([x[:, 1:], edge] if reverse else [edge, x[:, :-1]], 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _recurrence(gates: Pair, inputs: Pair, initial: Pair, resets: Array | None, reverse: bool) -> Pair:
    """Compute all states; they have the parts that `initial` has."""
    cpu, default = (functools.partial(way, reverse=reverse) for way in (_step_by_step, _as_a_tree))
    states: Pair = jax.lax.platform_dependent(gates, inputs, initial, resets, cpu=cpu, default=default)
    return states


def _forward(
    gates: Pair, inputs: Pair, initial: Pair, resets: Array | None, reverse: bool
) -> tuple[Pair, tuple[Any, ...]]:
    states = _recurrence(gates, inputs, initial, resets, reverse)
    # For the form alone: whether there was an imaginary part.
    return states, (gates, states, initial, resets, inputs.im is None)


def _backward(reverse: bool, kept: tuple[Any, ...], grad: Pair) -> tuple[Pair, Pair, Pair, None]:
    *saved, real_inputs = kept
    ways = (_gradients_step_by_step, _gradients_as_trees)
    cpu, default = (functools.partial(_fitting, way, reverse) for way in ways)
    d_gates, d_inputs, d_initial = jax.lax.platform_dependent(*saved, grad, cpu=cpu, default=default)
    return d_gates, Pair(d_inputs.re) if real_inputs else d_inputs, d_initial, None


def _fitting(
    way: Callable[..., tuple[Pair, ...]],
    reverse: bool,
    gates: Pair,
    states: Pair,
    initial: Pair,
    resets: Array | None,
    grad: Pair,
) -> tuple[Pair, ...]:
    """The gradient of real gates is real."""
    d_gates, d_inputs, d_initial = way(gates, states, initial, grad, resets, reverse)
    return Pair(d_gates.re, None if gates.im is None else d_gates.im), d_inputs, d_initial


_recurrence.defvjp(_forward, _backward)


def recurrence(
    gates: Pair, inputs: Pair, initial: Pair | None, resets: Array | None = None, reverse: bool = False
) -> Pair:
    """Compute all states (B, T, D), complex where an argument is.

    Args:
        gates: a (B, T, D).
        inputs: x (B, T, D).
        initial: h before the first step (B, D); zero when None.
        resets: (B, T) booleans: h[t] = x[t] there, whatever the gate and the state before; None: never.
        reverse: from the last step to the first.
    """
    start = Pair(jnp.zeros((inputs.re.shape[0], inputs.re.shape[2]), inputs.re.dtype)) if initial is None else initial
    if any(pair.im is not None for pair in (gates, inputs, start)):
        start = start.as_complex()
    if not inputs.re.size:
        return _room(inputs, start)
    gates, inputs, start, resets = alike(gates, inputs, start, resets)
    return _recurrence(gates, inputs, start, resets, reverse)
