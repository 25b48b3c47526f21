"""Translates masks, positions and documents of transformers to the terms of the layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gateloop_transformer.layers.padding import Padding


class Marks(NamedTuple):
    """The marks that a model is given: mask (B, L); positions and documents (B or 1, T); bounds (N + 1,)."""

    mask: Tensor | None
    positions: Tensor | None
    documents: Tensor | None
    bounds: Tensor | None


class Steps(NamedTuple):
    """The marks that layers are given.

    layout: resets or cu_seqlens, as they take them. seen: (B,) steps before these, padding left out; None: all that a
    cache holds. padding: where there is some.
    """

    layout: dict[str, Tensor]
    seen: Tensor | None = None
    padding: Padding | None = None


def read_marks(model: str, x: Tensor, marks: Marks, cached: bool) -> Steps:
    """The steps x (B, T, dim); bounds count before a mask, a mask before positions and documents.

    Args:
        model: named in errors.
        x: what layers are to be given, padding included.
        marks: of its steps.
        cached: there is a cache, which may hold earlier steps.

    Raises:
        ValueError: a mark has another shape.
    """
    B, T = x.shape[:2]
    mask = marks.mask
    if marks.bounds is not None:
        return Steps({"cu_seqlens": marks.bounds})
    if mask is None:
        begins = _begins(model, marks, B, T)
        if begins is not None and T > 1:
            packed = begins[:, 1:].any()
            # A compiler cannot look.
            if torch.compiler.is_compiling() or bool(packed):
                return Steps({"resets": (begins & packed).expand(B, T)})
        return Steps({})
    if mask.ndim != 2 or mask.shape[0] != B or mask.shape[1] < T:
        raise ValueError(f"{model}: attention_mask must have shape ({B}, {T} or more), not {tuple(mask.shape)}")
    mask = mask.bool()
    past, own = mask[:, :-T].sum(1) if T else mask.sum(1), mask[:, mask.shape[1] - T :]
    seen = past if cached and mask.shape[1] > T else None
    # A compiler cannot look, and a single step that is decoded is not padding.
    if T == 1 if torch.compiler.is_compiling() else bool(own.all()):
        return Steps({}, seen)
    padding = Padding(model, x, own, None, None)
    return Steps({"cu_seqlens": padding.bounds}, seen, padding)


def _begins(model: str, marks: Marks, B: int, T: int) -> Tensor | None:
    """(B or 1, T) booleans: documents begin at these steps; None: nothing says so.

    A first step begins one only where it is at position 0: else it may go on with what a cache holds.

    Raises:
        ValueError: a shape that does not fit.
    """
    for name, numbers in (("position_ids", marks.positions), ("seq_idx", marks.documents)):
        if numbers is not None and tuple(numbers.shape) not in ((B, T), (1, T)):
            raise ValueError(f"{model}: {name} must have shape ({B}, {T}), not {tuple(numbers.shape)}")
    if marks.documents is not None:
        return F.pad(marks.documents[:, 1:] != marks.documents[:, :-1], (1, 0))
    if marks.positions is None:
        return None
    return torch.cat([marks.positions[:, :1] == 0, marks.positions.diff(dim=1) != 1], 1)
