"""Decoding with carried state: the prompt in one call, then one step per token in `lax.scan`, in constant memory."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gateloop_transformer.jax.checks import array
from gateloop_transformer.jax.model import Transformer
from gateloop_transformer.jax.pairs import Array
from gateloop_transformer.jax.parts import Params
from gateloop_transformer.jax.states import AttentionState, TransformerState

# Below this temperature the likeliest token is taken; dividing by less could only overflow.
_GREEDY = 1e-6


def generate(
    model: Transformer,
    params: Params,
    ids: Array,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    key: Array | None = None,
    dtype: Any = None,
) -> Array:
    """Continue prompts.

    This is compiled once for a model, a shape of the prompt and the options. Attention layers without a window keep
    all steps and reserve room for them at the start; with gate loops alone the state's size does not depend on length.

    Args:
        model: the description.
        params: its parameters.
        ids: (B, T) integers, at least one row and one token.
        max_new_tokens: number of tokens to add, 0 or more.
        temperature: divisor of the logits; 0 (or below 1e-6) takes the likeliest token.
        top_k: keep the k likeliest tokens.
        top_p: keep the likeliest tokens whose probabilities sum to at least p, in (0, 1].
        min_p: keep tokens at least min_p times as likely as the likeliest, in [0, 1].
        key: key of JAX's random numbers; None where the likeliest token is taken.
        dtype: dtype that layers compute in; None: that of the embedding.

    Returns:
        Prompts and new tokens (B, T + max_new_tokens).

    Raises:
        ValueError: a number is out of range, or ids are not a prompt.
    """
    ids = array("generate", "ids", ids)
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be an integer of 0 or more, not {max_new_tokens!r}")
    if ids.ndim == 2 and 0 in ids.shape:
        raise ValueError(f"a prompt needs at least one row and one token, not shape {ids.shape}")
    model._check(ids, None)
    rules = (
        (0 <= temperature < float("inf"), "temperature must be 0 or more", temperature),
        (top_k is None or (isinstance(top_k, int) and top_k >= 1), "top_k must be an integer of at least 1", top_k),
        (top_p is None or 0 < top_p <= 1, "top_p must be in (0, 1]", top_p),
        (min_p is None or 0 <= min_p <= 1, "min_p must be in [0, 1]", min_p),
    )
    for fine, rule, value in rules:
        if not fine:
            raise ValueError(f"{rule}, not {value}")
    if temperature >= _GREEDY and key is None:
        raise ValueError("drawing tokens needs a key: give key=jax.random.key(seed), or temperature=0")
    key = jax.random.key(0) if key is None else key
    return _generate(model, params, ids, max_new_tokens, float(temperature), top_k, top_p, min_p, key, dtype)


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5, 6, 7, 9))
def _generate(
    model: Transformer,
    params: Params,
    ids: Array,
    count: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    key: Array,
    dtype: Any,
) -> Array:
    if not count:
        return ids
    logits, state = model.apply(params, ids, return_state=True, dtype=dtype)
    state = _with_room(model, state, count)

    def step(carried: tuple[Array, TransformerState], key: Array) -> tuple[tuple[Array, TransformerState], Array]:
        logits, state = carried
        token = pick(logits, key, temperature, top_k, top_p, min_p).astype(ids.dtype)
        new, after = model.apply(params, token[:, None], state, return_state=True, dtype=dtype)
        return (new[:, -1], _of_one_size(state, after)), token

    # The last token is drawn without being read.
    keys = jax.random.split(key, count)
    (last, _), tokens = jax.lax.scan(step, (logits[:, -1], state), keys[:-1])
    final = pick(last, keys[-1], temperature, top_k, top_p, min_p).astype(ids.dtype)
    return jnp.concatenate([ids, tokens.T, final[:, None]], 1)


def _with_room(model: Transformer, state: TransformerState, count: int) -> TransformerState:
    """Pad attention's keys and values in front, for `count` more steps; `seen` tells that the padding holds none."""

    def room(layer: Any) -> Any:
        if not isinstance(layer, AttentionState):
            return layer
        past = layer.keys.shape[2]
        more = count if model.attn_window is None else min(count, model.attn_window - 1 - past)
        return layer.map_steps(lambda x: jnp.pad(x, ((0, 0), (0, 0), (more if x.shape[2] else 0, 0), (0, 0))))

    return TransformerState(tuple(room(layer) for layer in state.layers))


def _of_one_size(before: TransformerState, after: TransformerState) -> TransformerState:
    """Give the state after a step the shapes and dtypes of that before it; only padding drops out in front."""

    def crop(old: Any, new: Any) -> Any:
        if isinstance(new, AttentionState):
            more = new.keys.shape[2] - old.keys.shape[2]
            new = new.map_steps(lambda x: x[:, :, more if x.shape[2] else 0 :])
        return jax.tree.map(lambda x, y: y.astype(x.dtype), old, new)

    return TransformerState(tuple(crop(*pair) for pair in zip(before.layers, after.layers, strict=True)))


def pick(
    logits: Array,
    key: Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Array:
    """Pick the next token of each row (B,) from logits (B, vocabulary); arguments are those of `generate`."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if temperature < _GREEDY:
        return logits.argmax(-1)
    logits = (logits - logits.max(-1, keepdims=True)) / temperature
    if top_k is not None:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        order = jnp.argsort(-logits, -1, stable=True)
        ordered = jnp.take_along_axis(jax.nn.softmax(logits, -1), order, -1)
        excluded = ordered.cumsum(-1) - ordered >= top_p
        excluded = jnp.take_along_axis(excluded, jnp.argsort(order, -1), -1)
        logits = jnp.where(excluded, -jnp.inf, logits)
    if min_p is not None:
        chances = jax.nn.softmax(logits, -1)
        logits = jnp.where(chances < min_p * chances.max(-1, keepdims=True), -jnp.inf, logits)
    return jax.random.categorical(key, logits)
