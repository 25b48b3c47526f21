"""The channel mixer."""

from __future__ import annotations

from torch import nn


class FeedForward(nn.Sequential):
    """Linear, exact GELU, Linear: (..., dim) → (..., dim).

    Args:
        dim: width.
        mult: inner width as a multiple of dim.
    """

    def __init__(self, dim: int, mult: int = 4) -> None:
        super().__init__(nn.Linear(dim, dim * mult), nn.GELU(), nn.Linear(dim * mult, dim))
