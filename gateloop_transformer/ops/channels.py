"""The gate loop at head size 1 as backends are given it.

B batch, T time, H heads of size 1, D channels, which are the same; N documents.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gateloop_transformer.ops.layout import PLAIN, Layout
from gateloop_transformer.ops.pairs import Pair, compute_dtype
from gateloop_transformer.ops.recurrences import GateLoop


class ChannelLoop(NamedTuple):
    """What the gate loop at head size 1 is given: all (B, T, D), but projections that are pairs (B, T, 2·D).

    `gate` names what becomes of the projections in `gates`; "given": they are gates. With "sigmoid" there are no keys.
    `bias` (D,) is added to the projections of "ring"; the projections' gradient is multiplied by `fraction`.
    """

    queries: Tensor
    keys: Tensor | None
    values: Tensor
    gates: Pair
    swish: Tensor | None
    bias: Pair | None
    gate: str
    fraction: float
    reverse: bool
    layout: Layout = PLAIN

    @property
    def wide(self) -> torch.dtype:
        """The precision of the arithmetic."""
        return compute_dtype(self.queries.dtype, self.gates.re.dtype)

    @property
    def parts(self) -> int:
        """1: real states, 2: complex ones."""
        return 1 if self.gate == "sigmoid" or (self.gate == "given" and self.gates.im is None) else 2


class ChannelBackend(Protocol):
    """What runs such loops: kernels alone, around which this file does what they have in common."""

    def fresh(self, like: Tensor) -> Tensor:
        """Memory in the shape and dtype of `like`."""

    def loop_forward(self, loop: ChannelLoop, initial: Pair | None) -> tuple[Tensor, Pair, Tensor]:
        """y (B, T, D), the last state (B, D), or (N, D), and what is kept for the backward pass."""

    def loop_backward(
        self, loop: ChannelLoop, grad: Tensor, grad_final: Pair, kept: Tensor, results: list[Tensor | None]
    ) -> tuple[Pair | None, Pair]:
        """Gradients of bias and initial state.

        `results` is filled with those of queries, keys, values, both parts of the gates, and the SiLU gate.
        """


def packed_gradients(
    backend: ChannelBackend, loop: ChannelLoop, grad: Tensor, grad_final: Pair, kept: Tensor, packed: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Pair | None, Pair]:
    """Gradients of packed inputs (B, T, 3·D), projections, SiLU gate, bias and initial state.

    Queries, keys and values of the loop are parts of `packed`; with "sigmoid" the gates are too.
    """
    d_packed = backend.fresh(packed)
    first, second, third = d_packed.chunk(3, -1)
    d_swish = None if loop.swish is None else backend.fresh(loop.swish)
    results: list[Tensor | None]
    if loop.gate == "sigmoid":
        d_gates, results = third, [first, None, second, third, None, d_swish]
    else:
        d_gates = backend.fresh(loop.gates.re)
        results = [first, second, third, d_gates, None, d_swish]
    d_bias, d_initial = backend.loop_backward(loop, grad, grad_final, kept, results)
    return d_packed, d_gates, d_swish, d_bias, d_initial


def _given(loop: GateLoop) -> tuple[ChannelLoop, Pair | None]:
    """Heads of size 1 as channels, and their initial state.

    There is one precision for all, and gates are complex where the initial state is.
    """
    gates = loop.gates.map(_flat)
    if loop.parts() == 2:
        gates = gates.as_complex()
    q, k, v = (_flat(x) for x in loop[:3])
    if loop.wide() == torch.float64:
        q, k, v, gates = q.double(), k.double(), v.double(), gates.to(torch.float64)
    initial = None if loop.initial is None else _flat_state(loop.initial)
    return ChannelLoop(q, k, v, gates, None, None, "given", 1.0, loop.reverse, loop.layout), initial


def elementwise_forward(backend: ChannelBackend, loop: GateLoop) -> tuple[Tensor, Pair]:
    """A gate loop with heads of size 1: y (B, T, H, 1) and the last state (B, H, 1, 1), or (N, H, 1, 1)."""
    y, final, _ = backend.loop_forward(*_given(loop))
    return y.unsqueeze(-1).to(loop.queries.dtype), final.map(lambda x: x[..., None, None])


def elementwise_backward(
    backend: ChannelBackend, loop: GateLoop, grad: Tensor, grad_final: Pair
) -> tuple[Tensor, Tensor, Tensor, Pair, Pair]:
    """Its gradients; what the forward pass would keep is computed again."""
    inner, initial = _given(loop)
    _, _, kept = backend.loop_forward(inner, initial)
    dq, dk, dv = (backend.fresh(inner.queries) for _ in range(3))
    d_gates = inner.gates.map(backend.fresh)
    results = [dq, dk, dv, *d_gates, None]
    dy = _flat(grad.to(inner.queries.dtype))
    _, first = backend.loop_backward(inner, dy, _flat_state(grad_final), kept, results)
    shaped = d_gates.map(lambda x: x.reshape(loop.gates.re.shape))
    d_initial = first.map(lambda x: x[..., None, None])
    return dq.unsqueeze(-1), dk.unsqueeze(-1), dv.unsqueeze(-1), shaped, d_initial


def _flat(x: Tensor) -> Tensor:
    """(B, T, H[, 1]) → (B, T, H), as a view."""
    return x.squeeze(-1) if x.ndim == 4 else x


def _flat_state(state: Pair) -> Pair:
    """(B, H, 1, 1) → (B, H)."""
    return state.map(lambda x: x.reshape(x.shape[:2]))
