"""Norms, and the residual wrappers that put a norm before or after a layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gateloop_transformer.ops.pairs import autocast_dtype
from gateloop_transformer.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """RMS norm over the last dimension: x / max(‖x‖₂, 1e-12) · √dim · gamma.

    Args:
        dim: the size of the last dimension.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., dim) → (..., dim); under autocast in autocast's dtype, as matrix products follow."""
        return rms_norm(x, self.gamma, dtype=autocast_dtype(x))


class HeadRMSNorm(nn.Module):
    """`RMSNorm` of each head on its own: (..., heads, dim_head) → the same shape.

    Args:
        heads: number of heads.
        dim_head: size of a head, above 1: normalising a single number leaves only its sign.
    """

    def __init__(self, heads: int, dim_head: int) -> None:
        super().__init__()
        if dim_head < 2:
            raise ValueError("normalising heads of size 1 leaves only signs; use fewer heads")
        self.gamma = nn.Parameter(torch.ones(heads, dim_head))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; gamma has one entry per head and channel."""
        return rms_norm(x, self.gamma)


class _Residual(nn.Module):
    """What both wrappers share: dropout on the output of `fn`."""

    # Also of a wrapper that the original pickled.
    dropout: float = 0.0

    def __init__(self, fn: nn.Module, norm: nn.Module, dropout: float) -> None:
        super().__init__()
        self.fn = fn
        self.norm = norm
        self.dropout = dropout

    def drop(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.dropout, self.training) if self.dropout else y

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}" if self.dropout else ""


class PreNorm(_Residual):
    """Residual with the norm before the layer: x + fn(RMSNorm(x)).

    Args:
        dim: width.
        fn: the layer; called with return_state=True it must return (y, state), and so does this wrapper.
        dropout: probability of zeroing an element of fn's output in training.
    """

    def __init__(self, dim: int, fn: nn.Module, dropout: float = 0.0) -> None:
        super().__init__(fn, RMSNorm(dim), dropout)

    def forward(self, x: Tensor, *, return_state: bool = False, **kwargs: Any) -> Any:
        """Map (B, T, dim) → (B, T, dim); with return_state=True the result is that and the state."""
        if not return_state:
            return self.drop(self.fn(self.norm(x), **kwargs)) + x
        y, state = self.fn(self.norm(x), return_state=True, **kwargs)
        return self.drop(y) + x, state


class PostNorm(_Residual):
    """Residual with the norm after it: LayerNorm(x + fn(x)).

    Args:
        dim: width.
        fn: the layer; called with return_state=True it must return (y, state), and so does this wrapper.
        dropout: probability of zeroing an element of fn's output in training.
    """

    def __init__(self, dim: int, fn: nn.Module, dropout: float = 0.0) -> None:
        super().__init__(fn, nn.LayerNorm(dim), dropout)

    def forward(self, x: Tensor, *, return_state: bool = False, **kwargs: Any) -> Any:
        """Map (B, T, dim) → (B, T, dim); with return_state=True the result is that and the state."""
        if not return_state:
            return self.norm(self.drop(self.fn(x, **kwargs)) + x)
        y, state = self.fn(x, return_state=True, **kwargs)
        return self.norm(self.drop(y) + x), state
