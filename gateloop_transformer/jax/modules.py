"""Equinox modules: each holds a description and its parameters in one object that JAX sees as a tree.

    model = modules.Transformer(128, num_tokens=256, depth=4, key=jax.random.key(0))
    logits = model(ids)

`model.description` and `model.params` are what the functions take; `eqx.filter_grad` and `eqx.tree_at` work on them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import equinox as eqx

from gateloop_transformer.jax import attention, layers
from gateloop_transformer.jax import generation as _generation
from gateloop_transformer.jax import model as _model
from gateloop_transformer.jax.pairs import Array
from gateloop_transformer.jax.parts import Params

__all__ = ["CausalFullAttention", "GateLoopedAttention", "Module", "SimpleGateLoopLayer", "Transformer"]


class Module(eqx.Module):
    """Any description together with its parameters.

    Args:
        description: an object with `init` and `apply`.
        params: its parameters, for example from a file.
    """

    description: Any = eqx.field(static=True)
    params: Params

    def __call__(self, x: Array, *arguments: Any, **options: Any) -> Any:
        """Call `description.apply` with the parameters."""
        return self.description.apply(self.params, x, *arguments, **options)


class _New(Module):
    """A new description of its `kind` with newly drawn parameters."""

    kind: ClassVar[type]

    def __init__(self, *arguments: Any, key: Array, **options: Any) -> None:
        self.description = self.kind(*arguments, **options)
        self.params = self.description.init(key)


class GateLoopedAttention(_New):
    """`gateloop_transformer.jax.GateLoopedAttention` with new parameters; takes its arguments and a key."""

    kind = layers.GateLoopedAttention


class CausalFullAttention(_New):
    """`gateloop_transformer.jax.CausalFullAttention` with new parameters; takes its arguments and a key."""

    kind = attention.CausalFullAttention


class SimpleGateLoopLayer(_New):
    """`gateloop_transformer.jax.SimpleGateLoopLayer` with new parameters; takes its arguments and a key."""

    kind = layers.SimpleGateLoopLayer


class Transformer(_New):
    """`gateloop_transformer.jax.Transformer` with new parameters; takes its arguments and a key."""

    kind = _model.Transformer

    def loss(self, ids: Array, *arguments: Any, **options: Any) -> Any:
        """Call `Transformer.loss` with the parameters."""
        return self.description.loss(self.params, ids, *arguments, **options)

    def generate(self, ids: Array, max_new_tokens: int, **options: Any) -> Array:
        """Call `generate` with the parameters."""
        return _generation.generate(self.description, self.params, ids, max_new_tokens, **options)
