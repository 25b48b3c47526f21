"""The Numba backend for matrix states: sizes, padding and the kernels' arguments.

Chunks of time as matrix products (`numba_tiles.py`), or, where many heads are small, step by step with a lane for each
head (`numba_heads.py`). Step by step too where a product would meet numbers that are not finite: masks multiply by 0.

B sequences (rows of the batch, or documents packed in one), T time, H heads, K key size, V value size, C steps per
chunk.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gateloop_transformer.ops.backends.numba_memory import kind_of, new_memory, start_of
from gateloop_transformer.ops.layout import Layout
from gateloop_transformer.ops.packing import cleared
from gateloop_transformer.ops.pairs import Pair
from gateloop_transformer.ops.recurrences import GateLoop

if TYPE_CHECKING:
    from gateloop_transformer.ops.backends.numba_cache import Kernel


# Entries of a head's state up to which a lane for each head is faster than a product of matrices for each, as far as
# there are heads for all lanes.
_SMALL = 144


class _Sizes(NamedTuple):
    """Of a gate loop with a matrix state."""

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

    @property
    def small(self) -> bool:
        """Whether heads are many and small."""
        return self.K * self.V * self.padded(self.H) <= _SMALL * self.H and self.lanes // 2 <= self.H

    def padded(self, size: int) -> int:
        """Filled up to whole vectors."""
        return -(-size // self.lanes) * self.lanes

    def chunks(self, steps: int) -> int:
        """Of all sequences, of so many steps each, or a little more."""
        if self.layout.cu_seqlens is None:
            return self.B * -(-self.T // steps)
        return self.T // steps + self.B

    def launch(
        self,
        kernel: Kernel,
        items: int,
        sizes: list[int],
        room: int,
        steps: int,
        places: list[int],
        reverse: bool,
    ) -> list[int]:
        """Run a kernel over all items, with `room` numbers of memory for each thread and chunks of so many steps.

        Returns:
            `places` as the kernel left them.
        """
        from gateloop_transformer.ops.backends.numba_launch import HEADER, launch, threads_for

        # What a step does to a head is work on its state.
        rows = self.B if self.layout.cu_seqlens is None else 1
        work = rows * self.T * self.H * self.K * self.V
        size = room * self.wide.itemsize
        scratch = torch.empty(size * threads_for(items, work), dtype=torch.uint8)
        sizes = [*sizes, steps, scratch.data_ptr(), size]
        documents = self.layout.table(self.T, steps, reverse)
        # The table of documents stands behind all else.
        table = HEADER + len(sizes) + 1 + len(places) if documents else 0
        block = launch(kernel, items, [*sizes, table, *places, *documents], work)
        first = HEADER + len(sizes) + 1
        return block[first : first + len(places)]


class _Tiles(_Sizes):
    """The operands of the kernels that multiply matrices."""

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

    def run(self, kernel: Kernel, operands: list[Tensor | None], state: Tensor, before: Tensor, reverse: bool) -> bool:
        """Launch a kernel over all heads. Operands are (B, T, H, ·) in the kernels' order.

        Returns:
            Whether all results are finite; if not, none of them counts.
        """
        KP, VP, C = self.padded(self.K), self.padded(self.V), self.C
        room = C * (9 * KP + 6 * VP + 8 * C + 10) + 4 * KP * VP
        sizes = [self.H, self.T, self.K, self.V, KP, VP]
        places = [number for x in operands for number in _place(x, reverse)]
        places += [state.data_ptr(), before.data_ptr(), 0]
        *_, amiss = self.launch(kernel, self.B * self.H, sizes, room, C, places, reverse)
        return not amiss


def _place(x: Tensor | None, reverse: bool) -> list[int]:
    """Address, strides of batch, time and head in bytes."""
    if x is None:
        return [0, 0, 0, 0]
    return [*start_of(x, reverse), x.stride(2) * x.element_size()]


def _neighbours(x: Tensor) -> Tensor:
    """x with the numbers of a head next to each other."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class _Heads(_Sizes):
    """The operands of the kernels that have a lane for each head."""

    @property
    def HP(self) -> int:
        """Heads filled up to whole vectors."""
        return self.padded(self.H)

    @property
    def C(self) -> int:
        """Steps whose states are in memory at a time: about as many bytes as a core's own cache holds.

        Where this is the way around for heads that are not small, about √T: it keeps few states, fast or not.
        """
        most = max(8, min(64, (1 << 11) // (self.K * self.V)))
        return most if self.small else max(most, math.isqrt(self.T))

    def operand(self, x: Tensor) -> Tensor:
        """(B, T, H, ·) or (B, T, H) with the heads last."""
        x = x if x.ndim == 3 else x.transpose(2, 3)
        if x.dtype == self.wide and self.HP == self.H:
            return x.contiguous()
        result = torch.zeros(*x.shape[:-1], self.HP, dtype=self.wide)
        result[..., : self.H] = x
        return result

    def result(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The opposite of `operand`."""
        x = x[..., : self.H]
        # `to` with a memory format alone leaves a transposed tensor of that dtype as it is.
        return (x if x.ndim == 3 else x.transpose(2, 3)).to(dtype).contiguous()

    def new_state(self, state: Pair | None) -> Tensor:
        """(B, parts, K, V, HP), zero for None."""
        result = torch.zeros(self.B, self.parts, self.K, self.V, self.HP, dtype=self.wide)
        for n, part in enumerate([] if state is None else state.parts()[: self.parts]):
            result[:, n, ..., : self.H] = part.permute(0, 2, 3, 1)
        return result

    def state(self, padded: Tensor) -> Pair:
        """The opposite of `new_state`."""
        parts = (padded[:, n, ..., : self.H].permute(0, 3, 1, 2) for n in range(self.parts))
        return Pair(*(part.contiguous() for part in parts))

    def run(self, kernel: Kernel, operands: list[Tensor | None], state: Tensor, before: Tensor, reverse: bool) -> None:
        """Launch a kernel over all groups of heads. Operands are what `operand` gives, in the kernels' order."""
        room = (self.C + 3) * self.parts * self.K * self.V * self.lanes
        anew = self.layout.resets
        places = [number for x in operands for number in ([0, 0, 0] if x is None else start_of(x, reverse))]
        places += [state.data_ptr(), before.data_ptr(), *([0, 0, 0] if anew is None else start_of(anew, reverse))]
        sizes = [self.HP, self.T, self.K, self.V]
        self.launch(kernel, self.B * (self.HP // self.lanes), sizes, room, self.C, places, reverse)


def _heads_forward(loop: GateLoop, heads: _Heads, a: Pair) -> tuple[Tensor, Pair]:
    from gateloop_transformer.ops.backends.numba_heads import heads_forward

    inputs = [heads.operand(x) for x in loop[:3]]
    gates = a.map(heads.operand)
    y, state = torch.empty_like(inputs[2]), heads.new_state(loop.initial)
    kernel = heads_forward(kind_of(heads.wide), heads.parts == 2, False, heads.lanes)
    heads.run(kernel, [*inputs, gates.re, gates.im, y, *[None] * 6], state, state, loop.reverse)
    return heads.result(y, loop.queries.dtype), heads.state(state)


def _heads_backward(
    loop: GateLoop, heads: _Heads, a: Pair, grad: Tensor, grad_final: Pair
) -> tuple[Tensor, Tensor, Tensor, Pair, Pair]:
    from gateloop_transformer.ops.backends.numba_heads import heads_backward, heads_forward

    reverse = loop.reverse
    q, k, v, dy = (heads.operand(x) for x in (*loop[:3], grad))
    gates, kind = a.map(heads.operand), kind_of(heads.wide)
    state, after = heads.new_state(loop.initial), heads.new_state(grad_final)
    before = state.new_empty(heads.chunks(heads.C), *state.shape[1:])
    again = heads_forward(kind, heads.parts == 2, True, heads.lanes)
    heads.run(again, [q, k, v, gates.re, gates.im, *[None] * 7], state, before, reverse)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    da = gates.map(torch.empty_like)
    kernel = heads_backward(kind, heads.parts == 2, heads.lanes)
    heads.run(kernel, [q, k, v, gates.re, gates.im, None, dy, dq, dk, dv, da.re, da.im], after, before, reverse)
    dq, dk, dv = (heads.result(d, x.dtype) for d, x in zip((dq, dk, dv), loop[:3], strict=True))
    return dq, dk, dv, da.map(lambda x: heads.result(x, a.re.dtype)), heads.state(after)


def _matrix(loop: GateLoop) -> tuple[_Tiles, Pair]:
    """Sizes, and gates that are complex where the state is and 0 where it begins anew."""
    gates = cleared(loop.gates, loop.layout.resets)
    if loop.parts() == 2:
        gates = gates.as_complex()
    B, T, H, K = loop.queries.shape
    V, wide, layout = loop.values.shape[-1], loop.wide(), loop.layout
    return _Tiles(layout.states(B), T, H, K, V, wide, loop.parts(), layout), gates


def forward(loop: GateLoop) -> tuple[Tensor, Pair]:
    """y and the last state."""
    from gateloop_transformer.ops.backends.numba_tiles import tiles_forward

    tiles, a = _matrix(loop)
    if tiles.small:
        return _heads_forward(loop, _Heads(*tiles), a)
    double = tiles.wide == torch.float64
    inputs = [_neighbours(x.double() if double else x) for x in loop[:3]]
    gates = a.to(torch.float64) if double else a
    y, state = new_memory(inputs[0], *loop.values.shape), tiles.new_state(loop.initial)
    kernel = tiles_forward(kind_of(inputs[0].dtype), kind_of(gates.re.dtype), tiles.parts == 2, False, tiles.lanes)
    if not tiles.run(kernel, [*inputs, gates.re, gates.im, y, *[None] * 6], state, state, loop.reverse):
        return _heads_forward(loop, _Heads(*tiles), a)
    return y.to(loop.queries.dtype), tiles.state(state)


def backward(loop: GateLoop, grad: Tensor, grad_final: Pair) -> tuple[Tensor, Tensor, Tensor, Pair, Pair]:
    """All gradients; states before each chunk are computed again."""
    tiles, a = _matrix(loop)
    found = None if tiles.small else _tiles_backward(loop, tiles, a, grad, grad_final)
    dq, dk, dv, da, after = found or _heads_backward(loop, _Heads(*tiles), a, grad, grad_final)
    return dq, dk, dv, cleared(da, loop.layout.resets), after


def _tiles_backward(
    loop: GateLoop, tiles: _Tiles, a: Pair, grad: Tensor, grad_final: Pair
) -> tuple[Tensor, Tensor, Tensor, Pair, Pair] | None:
    """All gradients; None where one is not finite."""
    from gateloop_transformer.ops.backends.numba_tiles import tiles_backward, tiles_forward

    double, reverse = tiles.wide == torch.float64, loop.reverse
    q, k, v, dy = (_neighbours(x.double() if double else x) for x in (*loop[:3], grad))
    a = a.to(torch.float64) if double else a
    X, A = kind_of(q.dtype), kind_of(a.re.dtype)
    state, last = tiles.new_state(loop.initial), tiles.new_state(grad_final)
    before = new_memory(state, tiles.chunks(tiles.C), tiles.H, *state.shape[2:])
    again = tiles_forward(X, A, tiles.parts == 2, True, tiles.lanes)
    tiles.run(again, [q, k, v, a.re, a.im, *[None] * 7], state, before, reverse)
    dq, dk, dv = (new_memory(x, *x.shape) for x in (q, k, v))
    da = a.map(lambda x: new_memory(x, *x.shape))
    kernel = tiles_backward(X, A, tiles.parts == 2, tiles.lanes)
    if not tiles.run(kernel, [q, k, v, a.re, a.im, None, dy, dq, dk, dv, da.re, da.im], last, before, reverse):
        return None
    return dq, dk, dv, da, tiles.state(last)
