"""The definition in blocks of time: the way around for backends that multiply whole tiles of time.

In a tile what a step must not see is multiplied by 0, and 0 times a number that is not finite is NaN: it would reach
earlier steps, and steps behind a reset. Such a backend computes as if all were finite, looks whether the result is,
and where it is not computes anew here, step by step. Steps of a block keep their states for its backward pass; of the
others only those before each block are kept.

Shapes as in `eager`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gateloop_transformer.ops.backends import eager
from gateloop_transformer.ops.layout import PLAIN, Layout
from gateloop_transformer.ops.pairs import Pair
from gateloop_transformer.ops.recurrences import GateLoop


def all_finite(*tensors: Tensor) -> bool:
    """Whether all numbers are finite: found by a sum, which is not finite where one is not.

    A sum that overflows is taken for one that is not finite. Nothing is known of tensors without values, nor while a
    CUDA graph is recorded: then this is true.
    """
    if any(x.is_meta for x in tensors) or (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        return True
    return all(math.isfinite(x.sum()) for x in tensors)


def _blocks(T: int, reverse: bool) -> list[slice]:
    """Stretches of about √T steps, in the order of the scan."""
    length = max(16, math.isqrt(T))
    blocks = [slice(start, min(start + length, T)) for start in range(0, T, length)]
    return blocks[::-1] if reverse else blocks


def gate_loop_forward(loop: GateLoop) -> tuple[Tensor, Pair]:
    """Outputs and the final state."""
    y, state, _ = _forward(loop)
    return y, state


def _block(loop: GateLoop, at: slice, state: Pair | None) -> GateLoop:
    """The loop over a stretch of time, from a state."""
    q, k, v, gates, *_, layout = loop
    part = PLAIN if layout.resets is None else Layout(layout.resets[:, at])
    inputs = q[:, at], k[:, at], v[:, at], gates.narrow(1, at.start, at.stop - at.start)
    return GateLoop(*inputs, state, loop.reverse, layout=part)


def _forward(loop: GateLoop) -> tuple[Tensor, Pair, list[Pair | None]]:
    """Outputs, the final state, and the state before each block."""
    y, state, before = torch.empty_like(loop.values, memory_format=torch.contiguous_format), loop.initial, []
    for at in _blocks(loop.queries.shape[1], loop.reverse):
        before.append(state)
        y[:, at], state = eager.gate_loop_forward(_block(loop, at, state))
    assert state is not None
    return y, state, before


def gate_loop_backward(loop: GateLoop, grad: Tensor, grad_final: Pair) -> tuple[Tensor, Tensor, Tensor, Pair, Pair]:
    """Gradients of queries, keys, values, gates and the initial state."""
    *_, before = _forward(loop)
    parts, after = [], grad_final
    blocks = _blocks(loop.queries.shape[1], loop.reverse)
    for at, state in reversed(list(zip(blocks, before, strict=True))):
        *gradients, after = eager.gate_loop_backward(_block(loop, at, state), grad[:, at], after)
        parts.append(gradients)
    dq, dk, dv, d_gates = zip(*(parts if loop.reverse else parts[::-1]), strict=True)
    return torch.cat(dq, 1), torch.cat(dk, 1), torch.cat(dv, 1), _joined(d_gates), after


def _joined(parts: tuple[Pair, ...]) -> Pair:
    re, im = zip(*parts, strict=True)
    return Pair(torch.cat(re, 1), None if im[0] is None else torch.cat(im, 1))
