"""A causal convolution over a few steps, each channel on its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ShortConv(nn.Module):
    """y[t] = Σ_i weight[:, 0, i] · x[t - (taps-1) + i], a depthwise causal convolution that starts as the identity.

    Args:
        dim: channels.
        taps: length of the filter, at least 1.
    """

    def __init__(self, dim: int, taps: int) -> None:
        super().__init__()
        self.taps = taps
        weight = torch.randn(dim, 1, taps) * 0.02
        weight[:, :, -1] += 1.0
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve, and keep what the next call needs.

        Args:
            x: (B, T, dim).
            past: the last taps - 1 inputs before x (B, taps - 1, dim); zeros at the start.

        Returns:
            y (B, T, dim) and the last taps - 1 inputs (B, taps - 1, dim).
        """
        T = x.shape[1]
        padded = torch.cat([past.to(x.dtype), x], 1)
        y = padded[:, :T] * self.weight[:, 0, 0]
        for tap in range(1, self.taps):
            y = y + padded[:, tap : tap + T] * self.weight[:, 0, tap]
        return y, padded[:, T:]
