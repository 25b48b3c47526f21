"""A recurrence whose time axis is sharded over devices, inside of `jax.shard_map`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gateloop_transformer.jax.pairs import Array, Pair


def over_axis(
    axis_name: str,
    run: Callable[[Pair | None], tuple[Any, Pair]],
    product: Callable[[], Pair],
    initial: Pair | None,
    forgets: Array | None,
    reverse: bool,
) -> tuple[Any, Pair]:
    """A part's outputs, and the state after all parts.

    Every device reports the state that its part ends in from nothing and the product of its gates; what they hand on is
    put together in order, then each runs its part again from there. What is sent does not grow with T.

    Args:
        axis_name: of the mesh, along which time is cut in order.
        run: from the state before the part to its outputs and the state after it.
        product: of the gates of the part, to be multiplied with states; finite where the part `forgets`.
        initial: the state before the whole sequence, the same on all devices; None: zero.
        forgets: booleans beside the state's dimensions: nothing of the state before the part is left after it, whatever
            it was; None: nowhere.
        reverse: the last part comes first.
    """
    _, end = run(None)
    ends, wholes, forgotten = jax.lax.all_gather((end, product(), forgets), axis_name)
    size, place = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    zero = end.map(jnp.zeros_like)
    state = zero if initial is None else initial if zero.im is None else initial.as_complex()
    before = state
    for n in range(size)[:: -1 if reverse else 1]:
        before = state.where(place == n, before)
        left = state.cleared(None if forgotten is None else forgotten[n])
        state = _at(wholes, n).times(left).plus(_at(ends, n))
    y, _ = run(before)
    return y, state.map(lambda x: from_device(axis_name, 0, x))


def from_device(axis_name: str, place: int, x: Array) -> Array:
    """Broadcast the value of the device at that place to all devices, marked as the same on all."""
    shared: Array = jax.lax.psum(jnp.where(jax.lax.axis_index(axis_name) == place, x, 0), axis_name)
    return shared


def _at(pair: Pair, n: int) -> Pair:
    return pair.map(lambda x: x[n])


def inputs_before(axis_name: str, x: Array, count: int, reverse: bool) -> Array:
    """The last `count` steps of the part before this one (B, count, D), in the order of the scan; at the start 0.

    Raises:
        ValueError: a part is shorter than that.
    """
    if x.shape[1] < count:
        raise ValueError(f"a part of {x.shape[1]} steps is too short for a convolution that looks back {count}")
    size = jax.lax.axis_size(axis_name)
    order = [(n + 1, n) if reverse else (n, n + 1) for n in range(size - 1)]
    sent = jnp.flip(x[:, :count], 1) if reverse else x[:, x.shape[1] - count :]
    before: Array = jax.lax.ppermute(sent, axis_name, order)
    return before
