"""States: what a layer remembers between calls. They are NamedTuples of arrays, batch first, and trees to JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from gateloop_transformer.jax.pairs import Array


class GateLoopState(NamedTuple):
    """The state of a `GateLoopedAttention`; its size is constant.

    real, imaginary: the parts of S (B, H, K, V), float32 or better; inputs: the last layer inputs that the short
    convolution still needs (B, conv_size - 1, dim), of length 0 without one.
    """

    real: Array
    imaginary: Array
    inputs: Array


class SimpleGateLoopState(NamedTuple):
    """The state of a `SimpleGateLoopLayer`: hidden h (B, dim), float32 or better."""

    hidden: Array


class AttentionState(NamedTuple):
    """The state of a `CausalFullAttention`: keys and values of past steps (B, heads, L, dim_head), the latest last.

    With data_dependent_rel_pos="gate_loop" the keys are complex and already decayed to the last step; otherwise
    keys_imaginary has L = 0. seen (B,): steps since the start of the sequence; where fewer than L, what stands before
    them in a row is not looked at. With a window L is less than it.
    """

    keys: Array
    keys_imaginary: Array
    values: Array
    seen: Array

    def map_steps(self, function: Callable[[Array], Array]) -> AttentionState:
        """`function` applied to what holds a step in each place of its third dimension."""
        return AttentionState(function(self.keys), function(self.keys_imaginary), function(self.values), self.seen)


class TransformerState(NamedTuple):
    """The state of a `Transformer`: one state per layer, in order."""

    layers: tuple[Any, ...]


def check_state(layer: str, state: Any, kind: type, shapes: dict[str, tuple[int | None, ...]]) -> None:
    """Check that a state is of its kind and its arrays have these shapes; None stands for any size.

    Raises:
        ValueError: the state is of another kind, or one of its arrays has another shape.
    """
    if not isinstance(state, kind):
        raise ValueError(f"{layer}: state must be a {kind.__name__}, not {type(state).__name__}")
    for name, expected in shapes.items():
        shape = tuple(getattr(state, name).shape)
        if len(shape) != len(expected) or any(e not in (None, s) for s, e in zip(shape, expected, strict=True)):
            wanted = "(" + ", ".join("any" if e is None else str(e) for e in expected) + ")"
            raise ValueError(f"{layer}: state.{name} must have shape {wanted}, not {shape}")
