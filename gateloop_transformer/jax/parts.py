"""What layers are made of, as functions of their parameters: linear maps, norms, the short convolution.

Parameters are trees of dictionaries, keyed as torch names them: joined by dots they are the names in model.safetensors.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from gateloop_transformer.jax.checks import Layout, array, floating
from gateloop_transformer.jax.pairs import Array, alike, compute_dtype
from gateloop_transformer.jax.sharding import from_device, inputs_before

Params = dict[str, Any]


def new_linear(key: Array, inputs: int, outputs: int, bias: bool = True) -> Params:
    """Weight (outputs, inputs) and bias (outputs,), uniform in ±1/√inputs as torch starts them."""
    bound = 1 / math.sqrt(inputs)
    first, second = jax.random.split(key)
    weight = jax.random.uniform(first, (outputs, inputs), minval=-bound, maxval=bound)
    if not bias:
        return {"weight": weight}
    return {"weight": weight, "bias": jax.random.uniform(second, (outputs,), minval=-bound, maxval=bound)}


def linear(params: Params, x: Array) -> Array:
    """x Wᵀ + b in x's dtype."""
    y = x @ params["weight"].T.astype(x.dtype)
    return y + params["bias"].astype(x.dtype) if "bias" in params else y


def rms_norm(x: Array, gamma: Array) -> Array:
    """√D · x / max(‖x‖₂, 1e-12) · gamma over the last dimension, computed in float32 or better, in x's dtype.

    Args:
        x: (..., D), or (..., G, D) with gamma (G, D).
        gamma: (D,), or (G, D).

    Raises:
        ValueError: gamma's shape is not that of x's last dimensions, or one is not real floating point.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019), with the original's limit.

    >>> float(jnp.square(rms_norm(jnp.array([3.0, 4.0]), jnp.ones(2))).mean())
    1.0
    """
    x, gamma = array("rms_norm", "x", x), array("rms_norm", "gamma", gamma)
    floating("rms_norm", ("x", "gamma"), x=x, gamma=gamma)
    if gamma.ndim not in (1, 2) or x.shape[x.ndim - gamma.ndim :] != gamma.shape or x.ndim < gamma.ndim:
        raise ValueError(
            f"rms_norm: gamma must be (D,) or (G, D), the last dimensions of x, not {gamma.shape} for x {x.shape}"
        )
    wide = x.astype(compute_dtype(x.dtype, gamma.dtype))
    # Not the square root at 0, whose gradient is infinite.
    squares = jnp.square(wide).sum(-1, keepdims=True)
    inverse = jnp.where(squares > 1e-24, jax.lax.rsqrt(jnp.where(squares > 1e-24, squares, 1.0)), 1e12)
    return (wide * inverse * (x.shape[-1] ** 0.5) * gamma).astype(x.dtype)


def layer_norm(params: Params, x: Array) -> Array:
    """(x - mean) / √(variance + 1e-5) · weight + bias over the last dimension, computed in float32 or better."""
    wide = x.astype(compute_dtype(x.dtype))
    centred = wide - wide.mean(-1, keepdims=True)
    unit = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    return (unit * params["weight"] + params["bias"]).astype(x.dtype)


def new_layer_norm(dim: int) -> Params:
    """Weight 1, bias 0."""
    return {"weight": jnp.ones(dim), "bias": jnp.zeros(dim)}


def new_convolution(key: Array, dim: int, taps: int, silu: bool) -> Params:
    """Weight (dim, 1, taps): uniform in ±1/√taps before a SiLU, otherwise near the identity."""
    if silu:
        bound = taps**-0.5
        return {"weight": jax.random.uniform(key, (dim, 1, taps), minval=-bound, maxval=bound)}
    return {"weight": (jax.random.normal(key, (dim, 1, taps)) * 0.02).at[:, :, -1].add(1.0)}


def convolution(
    params: Params, x: Array, past: Array, layout: Layout, *, silu: bool, reverse: bool, axis_name: str | None
) -> tuple[Array, Array]:
    """y[t] = Σ_i weight[:, 0, i] · x[t - (taps-1) + i], with a SiLU on request, and what the next call needs.

    Args:
        params: weight (D, 1, taps).
        x: (B, T, D).
        past: the taps - 1 inputs before x (B or N, taps - 1, D), in the order of the scan.
        layout: where sequences begin; nothing is seen across.
        silu: y goes through a SiLU.
        reverse: the last step comes first; `past` is then what follows x.
        axis_name: T is sharded along this axis of a mesh.
    """
    weight = params["weight"][:, 0].astype(x.dtype)
    past = past.astype(x.dtype)
    if axis_name is not None:
        visible = x if layout.resets is None else jnp.where(_since_reset(layout.resets, reverse)[..., None], x, 0)
        received = inputs_before(axis_name, visible, past.shape[1], reverse)
        # The first part in the order of the scan has the state's inputs before it.
        size, place = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
        past = jnp.where(place == (size - 1 if reverse else 0), past, received)
    resets, bounds = layout.resets, None if layout.packed is None else layout.packed.bounds
    if reverse:
        x = jnp.flip(x, 1)
        resets = None if resets is None else jnp.flip(resets, 1)
        if bounds is not None:
            bounds, past = bounds[-1] - bounds[::-1], past[::-1]
    y, left = _rows(weight, x, past, resets) if bounds is None else _documents(weight, x, past, resets, bounds)
    if axis_name is not None:
        # After the whole sequence is what the last part leaves.
        left = from_device(axis_name, 0 if reverse else jax.lax.axis_size(axis_name) - 1, left)
    y = jax.nn.silu(y) if silu else y
    if reverse:
        y = jnp.flip(y, 1)
        left = left[::-1] if bounds is not None else left
    return y, left


def _since_reset(resets: Array, reverse: bool) -> Array:
    """(B, T), True where no reset comes later in the order of the scan: what the next part sees."""
    later = resets if reverse else jnp.flip(resets, 1)
    count = later.cumsum(1) - later
    return (count if reverse else jnp.flip(count, 1)) == 0


def _filter(weight: Array, inputs: Array, segment: Array | None) -> Array:
    """Outputs from the taps-th input on; with `segment` (B, L), of inputs of one segment each."""
    return _taps(*alike(weight, inputs), segment)


@jax.custom_vjp
def _taps(weight: Array, inputs: Array, segment: Array | None) -> Array:
    parts = (_seen(inputs, segment, tap, weight.shape[1]) * weight[:, tap] for tap in range(weight.shape[1]))
    return functools.reduce(jnp.add, parts)


def _seen(x: Array, segment: Array | None, tap: int, taps: int) -> Array:
    """What each output sees of x (B, L, D) at a tap."""
    T = x.shape[1] - taps + 1
    part = x[:, tap : tap + T]
    return part if segment is None else _within(part, segment, tap, taps)


def _within(part: Array, segment: Array, tap: int, taps: int) -> Array:
    same = segment[:, tap : tap + part.shape[1]] == segment[:, taps - 1 :]
    return jnp.where(same[..., None], part, 0)


def _taps_backward(kept: tuple[Array, Array, Array | None], dy: Array) -> tuple[Array, Array, None]:
    """Written out: what JAX derives sums over time with a stride, six times slower on a CPU."""
    weight, inputs, segment = kept
    taps = weight.shape[1]
    wide = compute_dtype(dy.dtype)
    sums = [(_seen(inputs, segment, tap, taps) * dy).astype(wide).sum((0, 1)) for tap in range(taps)]
    parts = []
    for tap in range(taps):
        part = dy if segment is None else _within(dy, segment, tap, taps)
        parts.append(jnp.pad(part * weight[:, tap], ((0, 0), (tap, taps - 1 - tap), (0, 0))))
    return jnp.stack(sums, -1).astype(weight.dtype), functools.reduce(jnp.add, parts), None


_taps.defvjp(
    lambda weight, inputs, segment: (_taps(weight, inputs, segment), (weight, inputs, segment)), _taps_backward
)


def _rows(weight: Array, x: Array, past: Array, resets: Array | None) -> tuple[Array, Array]:
    T, kept = x.shape[1], past.shape[1]
    inputs = jnp.concatenate([past, x], 1)
    if resets is None:
        return _filter(weight, inputs, None), inputs[:, T:]
    segment = jnp.pad(resets, ((0, 0), (kept, 0))).cumsum(1)
    left = jnp.where((segment[:, T:] == segment[:, -1:])[..., None], inputs[:, T:], 0)
    return _filter(weight, inputs, segment), left


def _documents(weight: Array, x: Array, past: Array, resets: Array | None, bounds: Array) -> tuple[Array, Array]:
    """Every document with its past put before it, all in one row."""
    (N, kept, D), T = past.shape, x.shape[1]
    numbers, steps = jnp.arange(N), jnp.arange(T)
    before = (bounds[:-1] + numbers * kept)[:, None] + jnp.arange(kept)
    document = jnp.searchsorted(bounds[1:], steps, side="right")
    steps = steps + (document + 1) * kept
    inputs = jnp.zeros((1, N * kept + T, D), x.dtype)
    inputs = inputs.at[:, before.reshape(-1)].set(past.reshape(1, N * kept, D)).at[:, steps].set(x)
    ends = (bounds[1:] + (numbers + 1) * kept)[:, None] - kept + jnp.arange(kept)
    left = inputs[0, ends]
    segment = None
    if resets is not None:
        segment = jnp.zeros((1, N * kept + T), bool).at[:, steps].set(resets).cumsum(1)
        last = segment[0, ends]
        left = jnp.where((last == last[:, -1:])[..., None], left, 0)
    return _filter(weight, inputs, segment)[:, steps - kept], left
