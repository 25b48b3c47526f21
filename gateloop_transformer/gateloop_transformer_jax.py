"""The original's module of this name: its small model at head size 1, as Equinox modules on this package's operators.

Fields, shapes, what a key gives and what is computed are the original's, so that its files load.
`gateloop_transformer.jax` has the model that the torch side has, with better starts and a state to decode from.
"""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp

from gateloop_transformer.jax.gates import polar
from gateloop_transformer.jax.ops import linear_scan
from gateloop_transformer.jax.pairs import Array

__all__ = ["FeedForward", "GateLoop", "GateLoopTransformer", "Linear", "RMSNorm", "gate_loop_operator"]


class Linear(eqx.Module):
    """x W + b, both drawn from the standard normal distribution: weight (dim_in, dim_out), bias (dim_out,)."""

    weight: Array
    bias: Array

    def __init__(self, dim_in: int, dim_out: int, *, key: Array) -> None:
        of_weight, of_bias = jax.random.split(key)
        self.weight = jax.random.normal(of_weight, (dim_in, dim_out))
        self.bias = jax.random.normal(of_bias, (dim_out,))

    def __call__(self, x: Array, *, key: Array | None = None) -> Array:
        """(..., dim_in) → (..., dim_out); the key has no effect."""
        return x @ self.weight + self.bias


class RMSNorm(eqx.Module):
    """x / √(‖x‖² + eps) · √dim · gamma over the last dimension."""

    scale: float = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    gamma: Array

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        self.scale, self.eps, self.gamma = math.sqrt(dim), eps, jnp.ones(dim)

    def __call__(self, x: Array) -> Array:
        """(..., dim) → (..., dim)."""
        squares = jnp.square(x).sum(-1, keepdims=True)
        return x * jax.lax.rsqrt(squares + self.eps) * self.gamma * self.scale


def gate_loop_operator(k: Array, v: Array, q: Array, a: Array) -> Array:
    """q[t] · Re(h[t]) with h[t] = a[t] h[t-1] + k[t] v[t], each channel on its own; mind the order of arguments.

    Args:
        k: keys (B, T, ...); time is axis 1, whatever the number of axes.
        v: values, of the same shape.
        q: queries, of the same shape.
        a: gates, complex or real, of the same shape.

    Returns:
        That shape.
    """
    gates, inputs = jnp.broadcast_arrays(a, k * v)
    rows = (*inputs.shape[:2], math.prod(inputs.shape[2:]))
    return q * linear_scan(gates.reshape(rows), inputs.reshape(rows)).real.reshape(inputs.shape)


class GateLoop(eqx.Module):
    """The gate loop at head size 1 behind an RMS norm, with polar gates and a SiLU gate on its output.

    Weights are (dim, dim), that of the gates (dim, 2·dim): all real parts, then all imaginary parts.
    """

    norm: RMSNorm
    wq: Array
    wk: Array
    wv: Array
    wa: Array
    wg: Array
    wo: Array

    def __init__(self, dim: int, key: Array) -> None:
        self.norm = RMSNorm(dim)
        widths = {"wq": dim, "wk": dim, "wv": dim, "wa": 2 * dim, "wg": dim, "wo": dim}
        for own, (name, width) in zip(jax.random.split(key, len(widths)), widths.items(), strict=True):
            setattr(self, name, jax.random.normal(own, (dim, width)))

    def __call__(self, x: Array) -> Array:
        """(B, T, dim) → (B, T, dim)."""
        x = self.norm(x)
        real, imaginary = polar(*jnp.split(x @ self.wa, 2, axis=-1))
        y = gate_loop_operator(x @ self.wk, x @ self.wv, x @ self.wq, jax.lax.complex(real, imaginary))
        return (y * jax.nn.silu(x @ self.wg)) @ self.wo


class FeedForward(eqx.Module):
    """RMS norm, Linear, GELU (its approximation by tanh), Linear; both start from the same key."""

    norm: RMSNorm
    proj_in: Linear
    proj_out: Linear

    def __init__(self, *, dim: int, key: Array, mult: int = 4) -> None:
        self.norm = RMSNorm(dim)
        self.proj_in = Linear(dim, mult * dim, key=key)
        self.proj_out = Linear(mult * dim, dim, key=key)

    def __call__(self, x: Array) -> Array:
        """(..., dim) → (..., dim)."""
        return self.proj_out(jax.nn.gelu(self.proj_in(self.norm(x))))


class GateLoopTransformer(eqx.Module):
    """Embedding, depth × (x + GateLoop(x), x + FeedForward(x)), RMS norm, logits by the transposed embedding.

    Every layer starts from the same key, as in the original: all start alike.
    """

    embedding: Array
    norm: RMSNorm
    layers: list[tuple[GateLoop, FeedForward]]

    def __init__(self, *, num_tokens: int, dim: int, depth: int, key: Array, ff_mult: int = 4) -> None:
        self.embedding = 0.02 * jax.random.normal(key, (num_tokens, dim))
        self.norm = RMSNorm(dim)
        self.layers = [(GateLoop(dim, key), FeedForward(dim=dim, key=key, mult=ff_mult)) for _ in range(depth)]

    @eqx.filter_jit
    def __call__(self, x: Array) -> Array:
        """Logits (B, T, num_tokens) of ids (B, T), integers.

        Ids (T,) are taken as in the original, whose scan then runs over the channels: give a sequence a batch of one.
        """
        x = self.embedding[x]
        for mixer, feed_forward in self.layers:
            x = x + mixer(x)
            x = x + feed_forward(x)
        return self.norm(x) @ self.embedding.T
