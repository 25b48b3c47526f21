"""The recurrences in plain, differentiable torch operators: no loop over time, whatever its length.

What is computed where torch must look inside: for exports, transformations, second derivatives, tangents.

B batch, T time, H heads, K key size, V value size, D channels, N chunks, C steps per chunk, G gates per head (1, or K
when each key channel has its own). Time is cut into chunks. In a chunk of matrix states everything is a matrix product;
within chunks of size 1 states, and from chunk to chunk, a recurrence is doubled: after n rounds each step has seen 2^n
steps. Products of gates come from doubling too: they are exact at a gate of 0. Derivations: docs/math.md. Where states
are reset it is the definition, step by step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gateloop_transformer.ops.backends import eager
from gateloop_transformer.ops.channels import ChannelLoop
from gateloop_transformer.ops.gates import gates_of
from gateloop_transformer.ops.packing import as_rows
from gateloop_transformer.ops.pairs import Pair, compute_dtype
from gateloop_transformer.ops.recurrences import GateLoop, LinearScan, last_states

# Steps of a chunk; fewer where each channel has its own gates, whose products take C·C·K numbers.
_CHUNK, _CHUNK_PER_CHANNEL = 64, 16
# The longest T, where T is not fixed; None: it is. A trace cannot be asked: T and the number of chunks are symbols
# there, and not every release of torch tells them from numbers.
_LONGEST: ContextVar[int | None] = ContextVar("longest", default=None)


@contextlib.contextmanager
def any_length(longest: int | None) -> Iterator[None]:
    """Inside, programs are traced for every length up to the longest; None: for the one that is given."""
    token = _LONGEST.set(longest)
    try:
        yield
    finally:
        _LONGEST.reset(token)


def plain_scan(scan: LinearScan) -> Pair:
    """All states (B, T, D) in float32 or better."""
    return _scan(scan)[0]


def _scan(scan: LinearScan) -> tuple[Pair, Pair]:
    """All states, and the last (B, D), or (N, D) of documents."""
    gates, inputs, initial, reverse, _, layout = scan
    dtype = compute_dtype(gates.re.dtype, inputs.re.dtype)
    a, x, start = gates.to(dtype), inputs.to(dtype), None if initial is None else initial.to(dtype)
    if layout.plain():
        if not reverse:
            return _scanned(a, x, start)
        states, final = _scanned(_flipped(a), _flipped(x), start)
        return _flipped(states), final
    if layout.cu_seqlens is None:
        states = eager.linear_scan_forward(scan._replace(gates=a, inputs=x, initial=start))
    else:
        states = Pair(*as_rows(scan._replace(gates=a, inputs=x, initial=start), lambda rows: _scan(rows)[0].parts()))
    first = None if start is None else start.complex()
    last = last_states(states.complex(), first, reverse, layout)
    return states, Pair(last.real, last.imag) if last.is_complex() else Pair(last)


def _flipped(x: Pair) -> Pair:
    """x (B, T, ...) with the last step first."""
    return x.map(lambda part: part.flip(1))


def _scanned(gates: Pair, inputs: Pair, initial: Pair | None) -> tuple[Pair, Pair]:
    """All states and the last, forwards, without resets."""
    B, T, D = inputs.re.shape
    longest = _LONGEST.get()
    start = Pair(inputs.re.new_zeros(B, D)) if initial is None else initial
    if gates.im is not None or inputs.im is not None:
        start = start.as_complex()
    if longest is None and T == 0:
        return inputs, start
    if longest is None and T == 1:
        state = gates.select(1, 0).times(start).plus(inputs.select(1, 0))
        return state.map(lambda x: x.unsqueeze(1)), state
    cut = _Cut.of(T, _CHUNK, longest)
    products, inside = _doubled(cut.cut_gates(gates), inputs.map(cut.cut), 2, (cut.C - 1).bit_length())
    before, final = _carry(products.select(2, -1), inside.select(2, -1), start, 1, cut)
    states = products.times(before.map(lambda x: x.unsqueeze(2))).plus(inside)
    return states.map(cut.mend), final


def plain_channel_loop(loop: ChannelLoop, initial: Pair | None) -> tuple[Tensor, Pair]:
    """The gate loop at head size 1: y (B, T, D), and the last state (B, D), or (N, D)."""
    wide = loop.wide
    x = loop.values.to(wide)
    if loop.gate == "sigmoid":
        gates = Pair(torch.sigmoid(loop.gates.re.to(wide)))
    else:
        assert loop.keys is not None
        re, im, scale = gates_of(
            loop.gates.re, loop.gate, None if loop.bias is None else loop.bias.both(), loop.fraction
        )
        gates, keys = Pair(re, im), loop.keys.to(wide)
        x = (keys if scale is None else keys * scale) * x
    states, final = _scan(LinearScan(gates, Pair(x), initial, loop.reverse, layout=loop.layout))
    y = loop.queries.to(wide) * states.re
    return (y if loop.swish is None else y * F.silu(loop.swish.to(wide))).to(loop.queries.dtype), final


def plain_gate_loop(loop: GateLoop) -> tuple[Tensor, Pair]:
    """y (B, T, H, V) in float32 or better, and the last state (B, H, K, V), or (N, H, K, V) of documents."""
    layout, longest = loop.layout, _LONGEST.get()
    if layout.cu_seqlens is not None:
        y, *final = as_rows(loop, lambda rows: _listed(*plain_gate_loop(rows)), 1)
        return y, Pair(*final)
    if layout.resets is not None:
        dtype = loop.wide()
        wide = loop._replace(**{name: getattr(loop, name).to(dtype) for name in ("queries", "keys", "values", "gates")})
        return eager.gate_loop_forward(wide)
    if loop.reverse:
        changes = {name: getattr(loop, name).flip(1) for name in ("queries", "keys", "values")}
        y, state = plain_gate_loop(loop._replace(**changes, gates=_flipped(loop.gates), reverse=False))
        return y.flip(1), state
    if longest is None and loop.elementwise():
        return _elementwise(loop)
    return _in_chunks(loop, longest)


def _listed(y: Tensor, final: Pair) -> list[Tensor]:
    return [y, *final.parts()]


def _elementwise(loop: GateLoop) -> tuple[Tensor, Pair]:
    """At head size 1."""
    dtype = loop.wide()
    q, k, v = (x.squeeze(-1).to(dtype) for x in (loop.queries, loop.keys, loop.values))
    gates = loop.gates.map(lambda x: x.squeeze(-1) if x.ndim == 4 else x)
    start = None if loop.initial is None else loop.initial.map(lambda x: x.flatten(1))
    states, final = _scan(LinearScan(gates, Pair(k * v), start, loop.reverse))
    return (q * states.re).unsqueeze(-1), final.map(lambda x: x[..., None, None])


class _Cut(NamedTuple):
    """T steps as N chunks of C: (B, T, ...) and (B, N, C, ...).

    longest: the longest T, where T is not fixed; None: it is.
    """

    T: int
    N: int
    C: int
    longest: int | None

    @staticmethod
    def of(T: int, most: int, longest: int | None) -> _Cut:
        if longest is not None:
            # One more than needed: whether 1 chunk or several, as in the example, would be taken for a constant.
            return _Cut(T, (T + 2 * most - 1) // most, most, longest)
        C = min(most, 1 << (T - 1).bit_length())
        return _Cut(T, -(-T // C), C, None)

    def rounds(self) -> int:
        """Doublings after which each chunk has seen all before it."""
        most = self.N if self.longest is None else (self.longest - 1) // self.C + 2
        return (most - 1).bit_length()

    def cut(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """The end is padded."""
        missing = self.N * self.C - self.T
        padded = F.pad(x, (*[0, 0] * (x.ndim - 2), 0, missing), value=fill)
        chunks: Tensor = padded.unflatten(1, (self.N, self.C))
        return chunks

    def cut_gates(self, gates: Pair) -> Pair:
        """Padded with gates of 1, which keep the state."""
        return Pair(self.cut(gates.re, 1.0), None if gates.im is None else self.cut(gates.im))

    def mend(self, x: Tensor) -> Tensor:
        """Without the padding."""
        if self.longest is None:
            # Not flattened: a trace takes the smaller one of two strides, and cannot see which where V is not fixed.
            return torch.cat(x.unbind(1), 1)[:, : self.T]
        # A slice asks for T ≤ N·C, which no trace can see.
        return x.flatten(1, 2).index_select(1, torch.arange(self.T, device=x.device))


def _in_chunks(loop: GateLoop, longest: int | None) -> tuple[Tensor, Pair]:
    """Forwards, without resets."""
    queries, keys, values, gates, initial, *_ = loop
    (B, T, H, K), V = queries.shape, values.shape[-1]
    dtype = loop.wide()
    q, k, v = (x.to(dtype) for x in (queries, keys, values))
    a = gates.to(dtype).map(lambda x: x.unsqueeze(-1) if x.ndim == 3 else x)
    start = Pair(q.new_zeros(B, H, K, V)) if initial is None else initial.to(dtype)
    start = start if a.im is None else start.as_complex()
    if longest is None and T == 0:
        return v, start
    if longest is None and T == 1:
        outer = k.permute(0, 2, 3, 1) @ v.transpose(1, 2)
        state = a.select(1, 0).map(lambda x: x.unsqueeze(-1)).times(start).plus(Pair(outer))
        return (q.transpose(1, 2) @ state.re).transpose(1, 2), state
    cut = _Cut.of(T, _CHUNK if gates.re.ndim == 3 else _CHUNK_PER_CHANNEL, longest)
    # (B, N, C, H, X) → (B, H, N, C, X)
    q, k, v = (cut.cut(x).permute(0, 3, 1, 2, 4) for x in (q, k, v))
    a = cut.cut_gates(a).map(lambda x: x.permute(0, 3, 1, 4, 2))
    decay = _decay(a)
    to_start = a.narrow(-1, 0, 1).times(decay.select(-1, 0)).map(lambda x: x.transpose(-1, -2))
    to_end = decay.select(-2, -1).map(lambda x: x.transpose(-1, -2))
    added = to_end.map(lambda x: (k * x).transpose(-1, -2) @ v)
    whole = to_start.select(-2, -1).map(lambda x: x.unsqueeze(-1))
    before, final = _carry(whole, added, start, 2, cut)
    y = _seen(_scores(q, k, decay.re), v) + (q * to_start.re) @ before.re
    if to_start.im is not None and before.im is not None:
        y = y - (q * to_start.im) @ before.im
    return cut.mend(y.permute(0, 2, 3, 1, 4)), final


def _decay(gates: Pair) -> Pair:
    """a[j+1] ··· a[i] for i ≥ j, 0 above the diagonal: (..., C) → (..., C, C)."""
    C = gates.re.shape[-1]
    lower = torch.ones(C, C, dtype=torch.bool, device=gates.re.device).tril()
    strictly = lower.tril(-1)
    rows = Pair(torch.where(strictly, gates.re.unsqueeze(-1), 1.0))
    if gates.im is not None:
        rows = Pair(rows.re, torch.where(strictly, gates.im.unsqueeze(-1), 0.0))
    products, _ = _doubled(rows, None, rows.re.ndim - 2, (C - 1).bit_length())
    return products.map(lambda x: torch.where(lower, x, 0.0))


def _scores(q: Tensor, k: Tensor, decay: Tensor) -> Tensor:
    """Σ_c q[i, c] k[j, c] decay[c, i, j]: (B, H, N, C, C), decay shared by the channels when G is 1."""
    if decay.shape[-3] == 1:
        return (q @ k.transpose(-1, -2)) * decay.squeeze(-3)
    outer = q.transpose(-1, -2).unsqueeze(-1) * k.transpose(-1, -2).unsqueeze(-2)
    return (outer * decay).sum(-3)


def _seen(scores: Tensor, values: Tensor) -> Tensor:
    """Σ_j scores[i, j] v[j] over j ≤ i. What is not finite reaches no earlier step: it is not multiplied by their 0."""
    C = scores.shape[-1]
    lower = torch.ones(C, C, dtype=torch.bool, device=scores.device).tril()
    finite = torch.where(values.isfinite(), values, 0.0)
    return torch.where(lower, scores, 0.0) @ finite + (values - finite).cumsum(-2)


def _carry(gates: Pair, added: Pair, start: Pair, dim: int, cut: _Cut) -> tuple[Pair, Pair]:
    """S[n] = gates[n] S[n-1] + added[n] from `start`: the states before each n, and the last."""
    free = cut.longest is not None
    products, states = _doubled(gates, added, dim, cut.rounds(), free)
    first = start.map(lambda x: x.unsqueeze(dim))
    after = products.times(first).plus(states)
    N = after.re.shape[dim]
    if not free and N == 1:
        return first, after.select(dim, 0)
    at_first = (torch.arange(N, device=after.re.device) == 0).reshape(-1, *[1] * (after.re.ndim - dim - 1))
    earlier = _earlier(after, dim, 1, 0.0, free)
    before = (torch.where(at_first, *parts) for parts in zip(first.parts(), earlier.parts(), strict=True))
    return Pair(*before), after.select(dim, -1)


def _doubled(gates: Pair, inputs: Pair | None, dim: int, rounds: int, free: bool = False) -> tuple[Pair, Any]:
    """gates[0] ··· gates[n], and h[n] = gates[n] h[n-1] + inputs[n] from 0, along a dimension.

    After r rounds both stand for stretches of 2^r steps that end with each n.
    """
    for by in (1 << n for n in range(rounds)):
        if inputs is not None:
            inputs = gates.times(_earlier(inputs, dim, by, 0.0, free)).plus(inputs)
        gates = gates.times(_earlier(gates, dim, by, 1.0, free))
    return gates, inputs


def _earlier(x: Pair, dim: int, by: int, fill: float, free: bool) -> Pair:
    """x[n - by] along a dimension, whose size is a symbol where it is `free`; where there is none, `fill`."""
    size, behind = x.re.shape[dim], x.re.ndim - dim - 1
    if not free:
        kept, room = x.narrow(dim, 0, size - by), [0, 0] * behind + [by, 0]
        return Pair(F.pad(kept.re, room, value=fill), None if kept.im is None else F.pad(kept.im, room))
    places = torch.arange(size, device=x.re.device) - by
    there = (places >= 0).reshape(-1, *[1] * behind)
    earlier = x.map(lambda part: part.index_select(dim, places.clamp(min=0)))
    re = torch.where(there, earlier.re, fill)
    return Pair(re, None if earlier.im is None else torch.where(there, earlier.im, 0.0))
