"""Batches with padding: packing their steps without it, and unpacking the results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gateloop_transformer.ops.context_parallel import refuse
from gateloop_transformer.ops.layout import check_marks, read_layout


class Padding:
    """Takes the padded steps out of a batch (B, T, ...): each row becomes a document of one packed row.

    A padded step changes no state and its output is 0: it might as well not exist, wherever it stands.

    Args:
        layer: name of the layer, for errors.
        x: the batch (B, T, ...).
        mask: (B, T) booleans, False for padding.
        resets: (B, T) booleans, as the layer takes them; those at padded steps have no effect.
        cu_seqlens: must be None.

    Raises:
        ValueError: mask or resets has the wrong shape or dtype, or cu_seqlens is given.
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
        """Take the padded steps out: (B, T, ...) → (1, steps, ...)."""
        return x[self.mask].unsqueeze(0)

    def unpack(self, y: Tensor) -> Tensor:
        """Put the steps back: (1, steps, ...) → (B, T, ...), with 0 at padded steps."""
        result = y.new_zeros(*self.mask.shape, *y.shape[2:])
        return result.masked_scatter(self.mask.reshape(*self.mask.shape, *[1] * (y.ndim - 2)), y)

    def result(self, result: Any, return_state: bool) -> Any:
        """Unpack y in the result of a layer that was given a packed batch: y or (y, state)."""
        return (self.unpack(result[0]), result[1]) if return_state else self.unpack(result)
