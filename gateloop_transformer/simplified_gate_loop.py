"""The original's module of this name: the simple layer and the functions around its scan, those of this package."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gateloop_transformer.associative_scan import associative_scan
from gateloop_transformer.layers.norm import RMSNorm
from gateloop_transformer.layers.simple_gate_loop import SimpleGateLoopLayer, gate_loop_operator, least_gate
from gateloop_transformer.ops.backends.jax_xla import INSTALL_HINT, installed
from gateloop_transformer.ops.heinsen import heinsen_scan

__all__ = [
    "RMSNorm",
    "SimpleGateLoopLayer",
    "abs_clamp_eps",
    "associative_scan",
    "binary_operator",
    "gate_loop_operator",
    "get_jax_gate_loop_operator",
    "heinsen_associative_scan",
]

_Pair = tuple[Tensor, Tensor]


def abs_clamp_eps(t: Tensor, eps: float | None = None) -> Tensor:
    """Move numbers off 0: |t| is at least eps (1e-7 for float16, else 1e-20) and signs stay; 0 itself stays 0."""
    return t.sign() * t.abs().clamp(min=least_gate(t.dtype) if eps is None else eps)


def heinsen_associative_scan(a: Tensor, kv: Tensor, eps: float | None = None) -> _Pair:
    """Scan h[t] = a[t] h[t-1] + kv[t] in log space, as `heinsen_scan` does.

    Args:
        a: real gates (B, T, ...), those below eps counted as eps.
        kv: real inputs of the same shape.
        eps: the least gate; None: 1e-7 for float16, else 1e-20.

    Returns:
        The products of all gates up to each step, and h, both of that shape.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    gates, inputs = torch.broadcast_tensors(a.clamp(min=least_gate(a.dtype) if eps is None else eps), kv)
    states = heinsen_scan(gates.reshape(*gates.shape[:2], -1), inputs.reshape(*inputs.shape[:2], -1))
    return gates.cumprod(1), states.reshape(inputs.shape)


def binary_operator(a: _Pair, b: _Pair) -> _Pair:
    """Combine two stretches of a scan, the earlier one first: each is the product of its gates and its last state."""
    (earlier_gate, earlier_state), (gate, state) = a, b
    return gate * earlier_gate, torch.addcmul(state, gate, earlier_state)


def get_jax_gate_loop_operator() -> Callable[..., Any]:
    """`gate_loop_operator` with its scan in JAX, for tensors on the CPU; differentiable.

    Raises:
        ImportError: JAX is not installed.
    """
    if not installed():
        raise ImportError(f"get_jax_gate_loop_operator: {INSTALL_HINT}")
    return functools.partial(gate_loop_operator, backend="jax")
