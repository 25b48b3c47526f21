"""The channel mixer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gateloop_transformer.ops.dispatch import direct

# For at most this many numbers, waking a thread costs more than it saves.
_FEW = 1 << 12


class GELU(nn.GELU):
    """Exact GELU. For the few numbers of a decoded token it is x·Φ(x), as torch's own GELU would wake all threads."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply GELU to each element of x, of any shape."""
        if x.device.type == "cpu" and x.dtype == torch.float32 and direct(x) and x.numel() <= _FEW:
            y: Tensor = x * torch.special.ndtr(x)
            return y
        return super().forward(x)


class FeedForward(nn.Sequential):
    """Linear, exact GELU, Linear: (..., dim) → (..., dim).

    Args:
        dim: width.
        mult: inner width as a multiple of dim.
    """

    def __init__(self, dim: int, mult: int = 4) -> None:
        super().__init__(nn.Linear(dim, dim * mult), GELU(), nn.Linear(dim * mult, dim))
