"""The original's module of this name: its model, its layers and their operator, all of them those of this package."""

from __future__ import annotations

from torch import Tensor, nn

from gateloop_transformer.layers.attention import CausalFullAttention
from gateloop_transformer.layers.feedforward import FeedForward
from gateloop_transformer.layers.gate_looped import GateLoopedAttention
from gateloop_transformer.layers.norm import PostNorm, PreNorm, RMSNorm
from gateloop_transformer.model import Transformer
from gateloop_transformer.ops.gate_loop import gate_loop
from gateloop_transformer.ops.linear_scan import linear_scan

__all__ = [
    "CausalFullAttention",
    "FeedForward",
    "GateLoopedAttention",
    "PostNorm",
    "PreNorm",
    "RMSNorm",
    "Sequential",
    "Transformer",
    "gate_loop_operator",
]


def Sequential(*modules: nn.Module | None) -> nn.Module:
    """Chain the modules that are not None: a single one is returned as it is, none at all give an Identity."""
    present = [module for module in modules if module is not None]
    if not present:
        return nn.Identity()
    return present[0] if len(present) == 1 else nn.Sequential(*present)


def gate_loop_operator(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
    """y[t] = Re(q[t]ᵀ S[t]) with S[t] = a[t] S[t-1] + k[t] ⊗ v[t], batch and heads merged.

    Args:
        q: queries (B, T, K).
        k: keys (B, T, K).
        v: values (B, T, V).
        a: gates, complex or real, of the shape (B, T, K, V) or with ones in it. With a gate for each entry along V all
            states are kept in memory; with a last dimension of 1 memory is linear in T, as in `gate_loop`.

    Returns:
        (B, T, V).

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    full = *k.shape, v.shape[-1]
    if a.ndim != 4 or any(size not in (1, whole) for size, whole in zip(a.shape, full, strict=True)):
        raise ValueError(
            f"gate_loop_operator: a must have shape (B, T, K, V) = {full} or 1s in it, not {tuple(a.shape)}"
        )
    a = a.expand(*full[:2], -1, -1)
    if a.shape[-1] == 1:
        # One head; a gate of it, or of each of its key channels.
        gates = a.squeeze(-1) if a.shape[2] == 1 else a.transpose(2, 3)
        return gate_loop(q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), gates)[0].squeeze(2)
    inputs = k.unsqueeze(-1) * v.unsqueeze(-2)
    states = linear_scan(a.expand(full).flatten(2), inputs.flatten(2))
    states = (states.real if states.is_complex() else states).unflatten(2, full[2:])
    y: Tensor = (q.unsqueeze(-1) * states).sum(2)
    return y
