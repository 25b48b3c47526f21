"""The Numba backend for matrix states: sizes, padding and the kernels' arguments.

B sequences (rows of the batch, or documents packed in one), T time, H heads, K key size, V value size, C steps per
chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gateloop_transformer.ops.backends.numba_memory import kind_of, new_memory, start_of
from gateloop_transformer.ops.layout import Layout
from gateloop_transformer.ops.packing import cleared
from gateloop_transformer.ops.pairs import Pair, compute_dtype

if TYPE_CHECKING:
    from gateloop_transformer.ops.backends.numba_launch import Kernel


class _Tiles(NamedTuple):
    """Sizes of a gate loop with a matrix state, and the operands of its kernels."""

    B: int
    T: int
    H: int
    K: int
    V: int
    wide: torch.dtype
    parts: int
    layout: Layout

    @property
    def lanes(self) -> int:
        return 8 if self.wide == torch.float64 else 16

    def padded(self, size: int) -> int:
        """Filled up to whole vectors."""
        return -(-size // self.lanes) * self.lanes

    @property
    def C(self) -> int:
        """Steps per chunk: near the size of a head, for the work per step is proportional to both."""
        return min(64, max(16, self.padded(max(self.K, self.V))), max(16, 1 << (self.T - 1).bit_length()))

    def new_state(self, state: Pair | None) -> Tensor:
        """(B, H, parts, K, V) filled up to whole vectors, zero for None."""
        shape = self.B, self.H, self.parts, self.padded(self.K), self.padded(self.V)
        result = torch.zeros(shape, dtype=self.wide)
        for n, part in enumerate([] if state is None else state.parts()[: self.parts]):
            result[:, :, n, : self.K, : self.V] = part
        return result

    def state(self, padded: Tensor) -> Pair:
        """The opposite of `new_state`."""
        parts = (padded[:, :, n, : self.K, : self.V] for n in range(self.parts))
        return Pair(*(part.clone(memory_format=torch.contiguous_format) for part in parts))

    def run(self, kernel: Kernel, operands: list[Tensor | None], state: Tensor, before: Tensor, reverse: bool) -> None:
        """Launch a kernel over all heads. Operands are (B, T, H, ·) in the kernels' order."""
        from gateloop_transformer.ops.backends.numba_launch import HEADER, launch, threads_for

        KP, VP, C = self.padded(self.K), self.padded(self.V), self.C
        numbers = C * (9 * KP + 6 * VP + 8 * C + 10) + 4 * KP * VP
        room = numbers * self.wide.itemsize
        items = self.B * self.H
        # What a step does to a head is work on its state.
        rows = self.B if self.layout.cu_seqlens is None else 1
        work = rows * self.T * self.H * self.K * self.V
        scratch = torch.empty(room * threads_for(items, work), dtype=torch.uint8)
        sizes = [self.H, self.T, self.K, self.V, KP, VP, C, scratch.data_ptr(), room]
        places = [number for x in operands for number in _place(x, reverse)]
        places += [state.data_ptr(), before.data_ptr()]
        documents = self.layout.table(self.T, C, reverse)
        # The table of documents stands behind all else.
        table = HEADER + len(sizes) + 1 + len(places) if documents else 0
        launch(kernel, items, [*sizes, table, *places, *documents], work)

    @property
    def chunks(self) -> int:
        """Of all sequences, or a little more."""
        if self.layout.cu_seqlens is None:
            return self.B * -(-self.T // self.C)
        return self.T // self.C + self.B


def _place(x: Tensor | None, reverse: bool) -> list[int]:
    """Address, strides of batch, time and head in bytes."""
    if x is None:
        return [0, 0, 0, 0]
    return [*start_of(x, reverse), x.stride(2) * x.element_size()]


def _neighbours(x: Tensor) -> Tensor:
    """x with the numbers of a head next to each other."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _matrix(queries: Tensor, values: Tensor, gates: Pair, initial: Pair | None, layout: Layout) -> tuple[_Tiles, Pair]:
    """Sizes, and gates that are complex where the state is and 0 where it begins anew."""
    gates = cleared(gates, layout.resets)
    if initial is not None and initial.im is not None:
        gates = gates.as_complex()
    wide = compute_dtype(queries.dtype, gates.re.dtype)
    B, T, H, K = queries.shape
    return _Tiles(layout.states(B), T, H, K, values.shape[-1], wide, len(gates.parts()), layout), gates


def forward(
    queries: Tensor, keys: Tensor, values: Tensor, gates: Pair, initial: Pair | None, reverse: bool, layout: Layout
) -> tuple[Tensor, Pair]:
    """y and the last state."""
    from gateloop_transformer.ops.backends.numba_tiles import tiles_forward

    tiles, a = _matrix(queries, values, gates, initial, layout)
    inputs = [_neighbours(x if tiles.wide != torch.float64 else x.double()) for x in (queries, keys, values)]
    a = a if tiles.wide != torch.float64 else a.to(torch.float64)
    y, state = new_memory(inputs[0], *values.shape), tiles.new_state(initial)
    kernel = tiles_forward(kind_of(inputs[0].dtype), kind_of(a.re.dtype), tiles.parts == 2, False, tiles.lanes)
    tiles.run(kernel, [*inputs, a.re, a.im, y, *[None] * 6], state, state, reverse)
    return y.to(queries.dtype), tiles.state(state)


def backward(
    grad: Tensor,
    grad_final: Pair,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Pair,
    initial: Pair | None,
    reverse: bool,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor, Pair, Pair]:
    """All gradients; states before each chunk are computed again."""
    from gateloop_transformer.ops.backends.numba_tiles import tiles_backward, tiles_forward

    tiles, a = _matrix(queries, values, gates, initial, layout)
    double = tiles.wide == torch.float64
    q, k, v, dy = (_neighbours(x.double() if double else x) for x in (queries, keys, values, grad))
    a = a.to(torch.float64) if double else a
    X, A = kind_of(q.dtype), kind_of(a.re.dtype)
    state, after = tiles.new_state(initial), tiles.new_state(grad_final)
    before = new_memory(state, tiles.chunks, tiles.H, *state.shape[2:])
    again = tiles_forward(X, A, tiles.parts == 2, True, tiles.lanes)
    tiles.run(again, [q, k, v, a.re, a.im, *[None] * 7], state, before, reverse)
    dq, dk, dv = (new_memory(x, *x.shape) for x in (q, k, v))
    da = a.map(lambda x: new_memory(x, *x.shape))
    kernel = tiles_backward(X, A, tiles.parts == 2, tiles.lanes)
    tiles.run(kernel, [q, k, v, a.re, a.im, None, dy, dq, dk, dv, da.re, da.im], after, before, reverse)
    return dq, dk, dv, cleared(da, layout.resets), tiles.state(after)
