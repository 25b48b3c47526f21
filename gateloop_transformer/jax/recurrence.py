"""h[t] = a[t] h[t-1] + x[t] on pairs: the elementwise recurrence under every operator, with a gradient of its own.

B batch, T time, D channels. Kept for the gradient are the gates and the states, nothing for each level of a tree.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from gateloop_transformer.jax.pairs import Array, Pair, alike


def _at(pair: Pair, t: Array) -> Pair:
    return pair.map(lambda x: jax.lax.dynamic_index_in_dim(x, t, 1, keepdims=False))


def _put(pair: Pair, value: Pair, t: Array) -> Pair:
    """`value` as step t of `pair`; inside of a loop it is written in place."""
    parts = [
        None if x is None or y is None else jax.lax.dynamic_update_index_in_dim(x, y, t, 1)
        for x, y in zip(pair, value, strict=True)
    ]
    return Pair(*parts)  # type: ignore[arg-type]


def _step_by_step(gates: Pair, inputs: Pair, initial: Pair, reverse: bool) -> Pair:
    """One step after the other, in place: a CPU reads and writes everything once."""
    T = inputs.re.shape[1]

    def step(n: Array, carried: tuple[Pair, Pair]) -> tuple[Pair, Pair]:
        t = T - 1 - n if reverse else n
        h = _at(gates, t).times(carried[0]).plus(_at(inputs, t))
        return h, _put(carried[1], h, t)

    return jax.lax.fori_loop(0, T, step, (initial, inputs.map(jnp.zeros_like)))[1]


def _as_a_tree(gates: Pair, inputs: Pair, initial: Pair, reverse: bool) -> Pair:
    """In a logarithm of T rounds, as devices want it for which a step is too little work."""
    first = -1 if reverse else 0
    carried = gates.map(lambda x: x[:, first]).times(initial)
    x = Pair(*(None if x is None else x.at[:, first].add(c) for x, c in zip(inputs, carried, strict=True)))  # type: ignore[arg-type, union-attr]

    def combine(early: tuple[Pair, Pair], late: tuple[Pair, Pair]) -> tuple[Pair, Pair]:
        return early[0].times(late[0]), late[0].times(early[1]).plus(late[1])

    states: Pair = jax.lax.associative_scan(combine, (gates, x), reverse=reverse, axis=1)[1]
    return states


def _all_states(gates: Pair, inputs: Pair, initial: Pair, reverse: bool) -> Pair:
    ways = (functools.partial(way, reverse=reverse) for way in (_step_by_step, _as_a_tree))
    cpu, default = ways
    states: Pair = jax.lax.platform_dependent(gates, inputs, initial, cpu=cpu, default=default)
    return states


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _recurrence(gates: Pair, inputs: Pair, initial: Pair, reverse: bool) -> Pair:
    return _all_states(gates, inputs, initial, reverse)


def _forward(gates: Pair, inputs: Pair, initial: Pair, reverse: bool) -> tuple[Pair, tuple[Pair, Pair, Pair]]:
    states = _all_states(gates, inputs, initial, reverse)
    return states, (gates, states, initial)


def _backward(reverse: bool, kept: tuple[Pair, Pair, Pair], grad: Pair) -> tuple[Pair, Pair, Pair]:
    """g[t] = dh[t] + conj(a[t+1]) g[t+1]; da[t] = g[t] conj(h[t-1]); dx = g; dh0 = conj(a[1]) g[1]."""
    gates, states, initial = kept
    first, last = (-1, 0) if reverse else (0, -1)
    # The scan the other way round; nothing comes after its first step, whatever the gate there.
    later = gates.map(lambda x: shifted(x, x[:, last], not reverse)).conj()
    g = _all_states(later, grad, grad.map(lambda x: jnp.zeros_like(x[:, 0])), not reverse)
    before = Pair(*(None if h is None else shifted(h, h0, reverse) for h, h0 in zip(states, initial, strict=True)))  # type: ignore[arg-type]
    d_gates = g.times(before.conj())
    d_initial = gates.map(lambda x: x[:, first]).conj().times(g.map(lambda x: x[:, first]))
    return Pair(d_gates.re, None if gates.im is None else d_gates.im), g, d_initial


_recurrence.defvjp(_forward, _backward)


def shifted(x: Array, first: Array, reverse: bool) -> Array:
    """x (B, T, ...) one step later in the order of the scan, `first` (B, ...) coming in."""
    edge = jnp.expand_dims(first, 1)
    return jnp.concatenate([x[:, 1:], edge] if reverse else [edge, x[:, :-1]], 1)


def recurrence(gates: Pair, inputs: Pair, initial: Pair | None, reverse: bool = False) -> Pair:
    """All states (B, T, D), complex where an argument is.

    Args:
        gates: a (B, T, D).
        inputs: x (B, T, D).
        initial: h before the first step (B, D); zero when None.
        reverse: from the last step to the first.
    """
    start = inputs.map(lambda x: jnp.zeros(x.shape[:1] + x.shape[2:], x.dtype)) if initial is None else initial
    if any(pair.im is not None for pair in (gates, inputs, start)):
        inputs, start = inputs.as_complex(), start.as_complex()
    if not inputs.re.size:
        return inputs
    gates, inputs, start = alike(gates, inputs, start)
    return _recurrence(gates, inputs, start, reverse)
