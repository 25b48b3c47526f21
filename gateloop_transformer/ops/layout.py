"""Where sequences begin inside a batch: resets of the state, and documents packed one after the other.

B batch, T time, N documents.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from gateloop_transformer.ops.context_parallel import refuse


class Layout(NamedTuple):
    """What a batch is made of.

    resets: (B, T) booleans: the state is cleared before such a step, in the order of the scan.
    cu_seqlens: (N + 1,) integers: document n of a batch of one row is steps cu_seqlens[n] to cu_seqlens[n + 1]. Every
    document has an initial and a final state of its own; it may be empty.

    Not every release of torch compiles properties of a named tuple, or its `_asdict`: these are methods instead.
    """

    resets: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def keywords(self) -> dict[str, Tensor | None]:
        """As arguments of an operator."""
        return {"resets": self.resets, "cu_seqlens": self.cu_seqlens}

    def plain(self) -> bool:
        """Nothing but rows of one length."""
        return self.resets is None and self.cu_seqlens is None

    def states(self, rows: int) -> int:
        """How many initial and final states there are: one per row, or one per document."""
        return rows if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def letter(self) -> str:
        """What the first dimension of a state is called."""
        return "B" if self.cu_seqlens is None else "N"

    def bounds(self, T: int) -> list[int]:
        """Where documents begin, and T.

        Raises:
            ValueError: they do not go from 0 to T in ascending order.
        """
        assert self.cu_seqlens is not None
        bounds: list[int] = self.cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != T or any(b < a for a, b in itertools.pairwise(bounds)):
            shown = bounds if len(bounds) <= 8 else [*bounds[:4], "...", *bounds[-3:]]
            raise ValueError(f"cu_seqlens must ascend from 0 to T = {T}, not {shown}")
        return bounds

    def flipped(self) -> Layout:
        """That of the batch with the last step first, and the last document first."""
        resets, bounds = self
        return Layout(
            None if resets is None else resets.flip(1), None if bounds is None else bounds[-1] - bounds.flip(0)
        )

    def table(self, T: int, chunk: int, backwards: bool) -> list[int]:
        """For each document its first step, its steps, and how many chunks those before it have; none without
        documents. Backwards steps are counted from the last.
        """
        if self.cu_seqlens is None:
            return []
        bounds = self.bounds(T)
        numbers, chunks = [], 0
        for start, end in itertools.pairwise(bounds):
            numbers += [T - end if backwards else start, end - start, chunks]
            chunks += -(-(end - start) // chunk)
        return numbers


PLAIN = Layout()


def read_layout(operator: str, x: Tensor, resets: Tensor | None, cu_seqlens: Tensor | None) -> Layout:
    """The two arguments, checked against a batch x (B, T, ...).

    Raises:
        ValueError: their shapes, dtypes or devices do not fit, or cu_seqlens with more than one row.
    """
    B, T = x.shape[:2]
    for name, mark in (("resets", resets), ("cu_seqlens", cu_seqlens)):
        if mark is not None and not isinstance(mark, Tensor):
            raise ValueError(f"{operator}: {name} must be a torch tensor, not {type(mark).__name__}")
    if cu_seqlens is not None:
        refuse(f"{operator}: cu_seqlens", "mark where documents begin by resets")
    if resets is not None:
        check_marks(operator, "resets", resets, x)
    if cu_seqlens is None:
        return PLAIN if resets is None else Layout(resets)
    signed = cu_seqlens.dtype in (torch.int8, torch.int16, torch.int32, torch.int64)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1 or not signed:
        raise ValueError(
            f"{operator}: cu_seqlens must be integers of shape (N + 1,), not {cu_seqlens.dtype} "
            f"{tuple(cu_seqlens.shape)}"
        )
    if B != 1:
        raise ValueError(f"{operator}: documents given by cu_seqlens are packed in one row, not in B = {B}")
    given = Layout(resets, cu_seqlens)
    if not torch.compiler.is_compiling():
        try:
            given.bounds(T)
        except ValueError as error:
            raise ValueError(f"{operator}: {error}") from None
    return given


def check_marks(operator: str, name: str, marks: Tensor, x: Tensor) -> None:
    """Booleans (B, T) beside x (B, T, ...).

    Raises:
        ValueError: they are not, or are on another device.
    """
    B, T = x.shape[:2]
    if not isinstance(marks, Tensor) or marks.dtype != torch.bool or tuple(marks.shape) != (B, T):
        what = f"{marks.dtype} {tuple(marks.shape)}" if isinstance(marks, Tensor) else type(marks).__name__
        raise ValueError(f"{operator}: {name} must be booleans of shape (B, T) = {(B, T)}, not {what}")
    if marks.device != x.device:
        raise ValueError(f"{operator}: {name} must be on the device of the input, {x.device}, not {marks.device}")
