"""Batches with padding: their steps packed without it, and put back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gateloop_transformer.ops.context_parallel import refuse
from gateloop_transformer.ops.layout import check_marks, read_layout


class Padding:
    """What is left of a batch (B, T, ...) when padded steps are taken out: one row, a document for each row.

    A padded step changes no state and its output is 0: it might as well not exist, wherever it stands.

    Args:
        layer: named in errors.
        x: the batch (B, T, ...).
        mask: (B, T) booleans, False for padding.
        resets: (B, T) booleans, as the layer takes them; those at padded steps count for nothing.
        cu_seqlens: must be None.

    Raises:
        ValueError: mask or resets have another shape or kind, or cu_seqlens is given.
    """

    def __init__(self, layer: str, x: Tensor, mask: Tensor, resets: Tensor | None, cu_seqlens: Tensor | None) -> None:
        refuse(f"{layer}: mask", "put the padding last and pass over it in the loss, or mark documents by resets")
        check_marks(layer, "mask", mask, x)
        if cu_seqlens is not None:
            raise ValueError(f"{layer}: give either a mask or cu_seqlens; packed documents have no padding")
        read_layout(layer, x, resets, None)
        self.mask = mask
        lengths = mask.sum(1)
        self.cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        self.resets = None if resets is None else self.pack(resets)

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, ...) → (1, steps, ...)."""
        return x[self.mask].unsqueeze(0)

    def unpack(self, y: Tensor) -> Tensor:
        """(1, steps, ...) → (B, T, ...), 0 at padded steps."""
        result = y.new_zeros(*self.mask.shape, *y.shape[2:])
        return result.masked_scatter(self.mask.reshape(*self.mask.shape, *[1] * (y.ndim - 2)), y)

    def result(self, result: Any, return_state: bool) -> Any:
        """Of a layer that was given what is packed: y or (y, state), y unpacked."""
        return (self.unpack(result[0]), result[1]) if return_state else self.unpack(result)
