"""The original's module of this name: its scan, and the padding under it."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from gateloop_transformer.ops.associative_scan import associative_scan

__all__ = ["associative_scan", "pad_at_dim"]


def pad_at_dim(t: Tensor, pad: Sequence[int], dim: int = -1, value: float = 0.0) -> Tensor:
    """Put `pad` = (before, after) entries of one value around a dimension of t.

    >>> import torch
    >>> pad_at_dim(torch.ones(1, 2), (0, 1), dim=0).tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """
    later = t.ndim - 1 - range(t.ndim)[dim]
    return F.pad(t, (*(0, 0) * later, *pad), value=value)
