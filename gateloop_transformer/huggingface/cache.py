"""States of the layers in and out of transformers' caches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionCacheLayerMixin, StaticLayer

from gateloop_transformer.layers.gate_looped import GateLoopedAttention
from gateloop_transformer.layers.state import AttentionState, GateLoopState


def check_cache(cache: Any, layers: int) -> None:
    """The cache is one that these models can use.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(cache, Cache):
        raise ValueError(
            f"GateLoopModel: past_key_values must be a transformers Cache, such as DynamicCache(config=model.config), "
            f"not {type(cache).__name__}"
        )
    if len(cache.layers) != layers:
        raise ValueError(
            f"GateLoopModel: past_key_values has {len(cache.layers)} layers, the model {layers}: make it with "
            "DynamicCache(config=model.config)"
        )
    if any(
        isinstance(layer, StaticLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in cache.layers
    ):
        raise ValueError(
            "GateLoopModel: a static cache holds gate loop layers, whose state has one size, but no attention layers "
            "of these models: use DynamicCache(config=model.config)"
        )


def load(cache: Cache, n: int, mixer: nn.Module, seen: Tensor | None) -> GateLoopState | AttentionState | None:
    """The state of layer n, None before its first step.

    Args:
        cache: that holds it.
        n: the layer's number.
        mixer: the layer.
        seen: (B,) how many steps of each row were no padding; None: all.
    """
    layer = cache.layers[n]
    if isinstance(mixer, GateLoopedAttention):
        if not layer.has_previous_state[0]:
            return None
        inputs, parts = layer.conv_states[0], layer.recurrent_states[0]
        taps = 0 if mixer.conv is None else mixer.conv.taps - 1
        inputs = inputs[..., inputs.shape[-1] - taps :].transpose(1, 2)
        if torch.is_grad_enabled():
            # The cache writes the next state over this one, which the backward pass still needs.
            parts, inputs = parts.clone(), inputs.clone()
        return GateLoopState(parts[:, 0], parts[:, 1], inputs)
    if not layer.get_seq_length():
        return None
    keys, values = layer.keys, layer.values
    if seen is None:
        seen = torch.full((keys.shape[0],), layer.get_seq_length(), device=keys.device)
    if mixer.data_dependent_rel_pos == "gate_loop":
        real, imaginary = keys.chunk(2, -1)
        return AttentionState(real, imaginary, values, seen)
    return AttentionState(keys, keys[:, :, :0], values, seen)


def store(cache: Cache, n: int, state: GateLoopState | AttentionState, steps: int, padded: bool) -> None:
    """Replace the state of layer n.

    Args:
        cache: to hold it.
        n: the layer's number.
        state: after the latest steps.
        steps: how many there were, padding included.
        padded: some of them were padding.
    """
    if isinstance(state, GateLoopState):
        _count(cache.layers[n], state.inputs, steps)
        # Without taps the tensor is empty, but only this call tells the cache that there is a state.
        cache.update_conv_state(state.inputs.transpose(1, 2), n)
        cache.update_recurrent_state(torch.stack([state.real, state.imaginary], 1), n)
        return
    complex_keys = state.keys_imaginary.shape[2] > 0
    keys = torch.cat([state.keys, state.keys_imaginary], -1) if complex_keys else state.keys
    cache.update(_latest(keys, steps), _latest(state.values, steps), n)
    if padded or complex_keys:
        # Padding stands before all else in a row, wherever it was; complex keys are decayed by every step.
        layer: Any = cache.layers[n]
        width = layer.keys.shape[2]
        layer.keys, layer.values = _latest(keys, width), _latest(state.values, width)


def _count(layer: Any, like: Tensor, steps: int) -> None:
    """Add to the length of a first layer, which a cache without attention layers takes for its own."""
    if isinstance(layer, StaticLayer):
        empty = like.new_empty(like.shape[0], 1, steps, 0)
        layer.update(empty, empty)
    elif isinstance(layer, DynamicLayer):
        # One number in memory, whatever the length.
        marks = like.new_zeros(1, 1, 1, 1).expand(like.shape[0], 1, layer.get_seq_length() + steps, 1)
        if not layer.is_initialized:
            layer.lazy_initialization(marks, marks)
        layer.keys = layer.values = marks


def _latest(x: Tensor, count: int) -> Tensor:
    """The last `count` steps of x (B, heads, L, size), zeros before them where there are fewer."""
    return F.pad(x, (0, 0, max(count - x.shape[2], 0), 0))[:, :, max(x.shape[2] - count, 0) :]
