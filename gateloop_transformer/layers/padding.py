"""Batches with padding: packing their steps without it, and unpacking the results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gateloop_transformer.ops.context_parallel import refuse
from gateloop_transformer.ops.layout import Layout, check_marks, read_layout


def over_steps(
    layer: str,
    x: Tensor,
    marks: tuple[Tensor | None, Tensor | None, Tensor | None],
    mix: Callable[[Tensor, Layout], Any],
    return_state: bool,
) -> Any:
    """`mix` of a batch and of where its sequences begin, after whatever padding it has is taken out.

    A padded step changes no state and its output is 0: it might as well not exist, wherever it stands.

    Args:
        layer: named in errors.
        x: the batch (B, T, ...).
        marks: resets, cu_seqlens and mask, as the layers take them.
        mix: of a batch and its layout: y (B, T, ...), or one number; or (y, state).
        return_state: whether it gives (y, state).

    Raises:
        ValueError: a mark has another shape or kind, or both cu_seqlens and a mask are given.
    """
    resets, cu_seqlens, mask = marks
    if mask is None:
        return mix(x, read_layout(layer, x, resets, cu_seqlens))
    padding = Padding(layer, x, mask, resets, cu_seqlens)
    result = mix(padding.pack(x), padding.layout)
    return (padding.unpack(result[0]), result[1]) if return_state else padding.unpack(result)


class Padding:
    """Takes the padded steps out of a batch (B, T, ...): each row becomes a document of one packed row.

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
        self.bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        self.layout = Layout(None if resets is None else self.pack(resets), self.bounds)

    def pack(self, x: Tensor) -> Tensor:
        """Take the padded steps out: (B, T, ...) → (1, steps, ...)."""
        return x[self.mask].unsqueeze(0)

    def unpack(self, y: Tensor) -> Tensor:
        """Put the steps back: (1, steps, ...) → (B, T, ...), with 0 at padded steps; a number of all steps stays."""
        if not y.ndim:
            return y
        result = y.new_zeros(*self.mask.shape, *y.shape[2:])
        return result.masked_scatter(self.mask.reshape(*self.mask.shape, *[1] * (y.ndim - 2)), y)
