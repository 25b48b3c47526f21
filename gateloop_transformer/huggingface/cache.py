"""States of the layers in and out of transformers' caches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionCacheLayerMixin, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from gateloop_transformer.layers.gate_looped import GateLoopedAttention
from gateloop_transformer.layers.state import AttentionState, GateLoopState

# What transformers calls a cache where it is given or returned: "past_key_values", and "cache" from 5.24 on.
CACHE_NAME = next(
    field.name for field in dataclasses.fields(BaseModelOutputWithPast) if field.name in ("past_key_values", "cache")
)


def check_cache(cache: Any, mixers: Sequence[nn.Module]) -> None:
    """Check that these models can use a cache.

    Args:
        cache: the cache that a model was given.
        mixers: the model's time mixers.

    Raises:
        ValueError: they cannot.
    """
    if not isinstance(cache, Cache):
        raise ValueError(
            f"GateLoopModel: past_key_values must be a transformers Cache, such as DynamicCache(config=model.config), "
            f"not {type(cache).__name__}"
        )
    if len(cache.layers) != len(mixers):
        raise ValueError(
            f"GateLoopModel: past_key_values has {len(cache.layers)} layers, but the model has {len(mixers)}: "
            "make it with DynamicCache(config=model.config)"
        )
    if any(
        isinstance(layer, StaticLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in cache.layers
    ):
        raise ValueError(
            "GateLoopModel: a static cache holds gate loop layers, whose state has one size, but no attention layers "
            "of these models: use DynamicCache(config=model.config)"
        )
    for n, (layer, mixer) in enumerate(zip(cache.layers, mixers, strict=True)):
        if not isinstance(mixer, GateLoopedAttention):
            continue
        if not isinstance(layer, LinearAttentionCacheLayerMixin):
            raise ValueError(
                f"GateLoopModel: past_key_values has keys and values for layer {n}, a gate loop, which has none: make "
                "it with DynamicCache(config=model.config); prefix tuning needs a model of attention layers alone"
            )
        if layer.record_past:
            raise ValueError(
                "GateLoopModel: past_key_values records its past, to be cropped, but steps of a gate loop cannot be "
                "taken back: leave activate_past_recording out and keep a copy.deepcopy of the cache, or use "
                "gateloop_transformer.History"
            )


def load(cache: Cache, n: int, mixer: nn.Module, seen: Tensor | None) -> GateLoopState | AttentionState | None:
    """The state of layer n, None before its first step.

    Args:
        cache: the cache that holds it.
        n: the layer's number.
        mixer: the layer.
        seen: (B,) number of steps in each row that were not padding; None: all of them.
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
    # An offloaded cache brings the layer's tensors back.
    layer.prefetch()
    keys, values = layer.keys, layer.values
    if seen is None:
        seen = torch.full((keys.shape[0],), layer.get_seq_length(), device=keys.device)
    if mixer.data_dependent_rel_pos == "gate_loop":
        if getattr(layer, "decayed_to", None) != layer.get_seq_length():
            raise ValueError(
                f"GateLoopModel: past_key_values has another length in layer {n} than the model left there, but its "
                "keys are decayed to the last step: such a cache cannot be cropped, or be made elsewhere"
            )
        real, imaginary = keys.chunk(2, -1)
        return AttentionState(real, imaginary, values, seen)
    return AttentionState(keys, keys[:, :, :0], values, seen)


def store(cache: Cache, n: int, state: GateLoopState | AttentionState, steps: int, padded: bool) -> None:
    """Replace the state of layer n.

    Args:
        cache: the cache to write to.
        n: the layer's number.
        state: the state after the latest steps.
        steps: number of latest steps, padding included.
        padded: whether some of them were padding.
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
        # Padding is moved to the start of its row, wherever it was; complex keys are decayed by every step.
        layer: Any = cache.layers[n]
        width = layer.keys.shape[2]
        layer.keys, layer.values = _latest(keys, width), _latest(state.values, width)
        layer.decayed_to = layer.get_seq_length()


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
