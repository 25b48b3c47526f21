"""The operators that a Transformer is made of, in plain torch operators: no loop over time, whatever its length.

B batch, T time, H heads, K key size, V value size, D channels, N chunks, C steps per chunk, G gates per head (1, or K
when each key channel has its own). Time is cut into chunks. In a chunk of matrix states everything is a matrix product;
within chunks of size 1 states, and from chunk to chunk, a recurrence is doubled: after n rounds each step has seen 2^n
steps. Products of gates come from doubling too: they are exact at a gate of 0. Derivations: docs/math.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gateloop_transformer.ops import channel_loop, gate_loop, head_gates, rms_norm  # noqa: F401
from gateloop_transformer.ops.gates import gates_of
from gateloop_transformer.ops.pairs import Pair, compute_dtype
from gateloop_transformer.ops.short_convolution import short_convolution

# Steps of a chunk; fewer where each channel has its own gates, whose products take C·C·K numbers.
_CHUNK, _CHUNK_PER_CHANNEL = 64, 16


class PlainOperators(TorchFunctionMode):
    """Inside, this library's operators are computed by plain torch ones: for what is traced, without a backward pass.

    Args:
        max_length: the longest T, where T is not fixed; None: it is.
    """

    def __init__(self, max_length: int | None = None) -> None:
        super().__init__()
        library = torch.ops.gateloop
        self.table: dict[Any, Callable[..., Any]] = {
            library.gate_loop.default: lambda *arguments: _gate_loop(max_length, *arguments),
            library.channel_loop.default: lambda *arguments: _channel_loop(max_length, *arguments),
            library.head_gates.default: _head_gates,
            library.rms_norm.default: lambda x, gamma, dtype, _backend: plain_rms_norm(x, gamma).to(dtype),
            library.short_convolution.default: lambda x, weight, silu, _backend: short_convolution(
                x, weight, silu, "chunkwise"
            ),
            # Not every compiler of torch looks through the method.
            Tensor.unflatten: torch.unflatten,
            # ONNX has none. Of gate projections, where squares overflow or vanish, the gate is rounded to the same.
            torch.hypot: lambda x, y: torch.sqrt(x * x + y * y),
            # It would become three operators of ONNX.
            torch.addcmul: lambda x, y, z, value=1: x - y * z if value == -1 else x + y * z,
        }

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in the place of each of its functions."""
        if function not in self.table:
            return function(*args, **kwargs or {})
        # Torch leaves the mode for this call.
        with self:
            return self.table[function](*args, **kwargs or {})


def _gate_loop(
    max_length: int | None,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Sequence[Tensor],
    initial: Sequence[Tensor],
    reverse: bool,
    _backend: str,
    *layout: Tensor | None,
) -> list[Tensor]:
    """The custom operator `gateloop::gate_loop`, as a `Transformer` uses it."""
    assert not reverse
    assert layout == (None, None)
    start = Pair(*initial) if initial else None
    y, final = plain_gate_loop(queries, keys, values, Pair(*gates), start, max_length)
    return [y, *final.parts()]


def _channel_loop(
    max_length: int | None,
    packed: Tensor,
    projections: Sequence[Tensor],
    swish: Sequence[Tensor],
    bias: Sequence[Tensor],
    initial: Sequence[Tensor],
    gate: str,
    _fraction: float,
    reverse: bool,
    _backend: str,
    *layout: Tensor | None,
) -> list[Tensor]:
    """The custom operator `gateloop::channel_loop`, as a `Transformer` uses it."""
    assert not reverse
    assert layout == (None, None)
    q, k, v = packed.chunk(3, -1)
    re, im, scale = gates_of(projections[0], gate, (bias[0], bias[1]) if bias else None)
    k = k if scale is None else k * scale.to(k.dtype)
    y, final = plain_channel_loop(q, k, v, Pair(re, im), Pair(*initial) if initial else None, max_length)
    # The last is what a backward pass would need.
    return [y * F.silu(swish[0]) if swish else y, *final.parts(), packed.new_zeros(0)]


def _head_gates(
    projections: Tensor, bias: Sequence[Tensor], gate: str, real: bool, _fraction: float, _backend: str
) -> list[Tensor]:
    """The custom operator `gateloop::head_gates`."""
    results = gates_of(projections, gate, (bias[0], bias[1]) if bias else None, real=real)
    return [part for part in results if part is not None]


def plain_rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """√D · x / max(‖x‖₂, 1e-12) · gamma over the last dimension: (..., D) → (..., D)."""
    wide = x.to(compute_dtype(x.dtype, gamma.dtype))
    norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    unit: Tensor = wide / norm.clamp(min=1e-12)
    scaled: Tensor = unit.to(x.dtype) * (gamma * x.shape[-1] ** 0.5)
    return scaled


class _Cut(NamedTuple):
    """T steps as N chunks of C: (B, T, ...) and (B, N, C, ...).

    longest: the longest T, where T is not fixed; None: it is. A trace cannot be asked: T and N are symbols there, and
    not every release of torch tells them from numbers.
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
        """Cut time into chunks and pad the end."""
        missing = self.N * self.C - self.T
        padded = F.pad(x, (*[0, 0] * (x.ndim - 2), 0, missing), value=fill)
        chunks: Tensor = padded.unflatten(1, (self.N, self.C))
        return chunks

    def cut_gates(self, gates: Pair) -> Pair:
        """Cut gates into chunks, padded with gates of 1, which keep the state."""
        return Pair(self.cut(gates.re, 1.0), None if gates.im is None else self.cut(gates.im))

    def mend(self, x: Tensor) -> Tensor:
        """Undo `cut`: join the chunks and drop the padding."""
        if self.longest is None:
            # Not flattened: a trace takes the smaller one of two strides, and cannot see which where V is not fixed.
            return torch.cat(x.unbind(1), 1)[:, : self.T]
        # A slice asks for T ≤ N·C, which no trace can see.
        return x.flatten(1, 2).index_select(1, torch.arange(self.T, device=x.device))


def plain_channel_loop(
    queries: Tensor, keys: Tensor, values: Tensor, gates: Pair, initial: Pair | None, max_length: int | None
) -> tuple[Tensor, Pair]:
    """h[t] = a[t] h[t-1] + k[t] v[t], y[t] = Re(q[t] h[t]): all (B, T, D), states (B, D)."""
    B, T, D = queries.shape
    dtype = gates.re.dtype
    start = (Pair(queries.new_zeros(B, D, dtype=dtype)) if initial is None else initial).as_complex()
    inputs = Pair(keys.to(dtype) * values.to(dtype)).as_complex()
    if max_length is None and T == 1:
        state = gates.select(1, 0).times(start).plus(inputs.select(1, 0))
        return queries * state.re.unsqueeze(1).to(queries.dtype), state
    cut = _Cut.of(T, _CHUNK, max_length)
    products, inside = _doubled(cut.cut_gates(gates), inputs.map(cut.cut), 2, (cut.C - 1).bit_length())
    before, final = _carry(products.select(2, -1), inside.select(2, -1), start, 1, cut)
    states = products.times(before.map(lambda x: x.unsqueeze(2))).plus(inside)
    return queries * cut.mend(states.re).to(queries.dtype), final


def plain_gate_loop(
    queries: Tensor, keys: Tensor, values: Tensor, gates: Pair, initial: Pair | None, max_length: int | None
) -> tuple[Tensor, Pair]:
    """S[t] = a[t] S[t-1] + k[t] ⊗ v[t], y[t] = Re(q[t]ᵀ S[t]): shapes as in `ops.gate_loop`."""
    (B, T, H, K), V = queries.shape, values.shape[-1]
    dtype = compute_dtype(queries.dtype, gates.re.dtype)
    q, k, v = (x.to(dtype) for x in (queries, keys, values))
    a = gates.to(dtype).map(lambda x: x.unsqueeze(-1) if x.ndim == 3 else x)
    start = Pair(q.new_zeros(B, H, K, V)) if initial is None else initial.to(dtype)
    start = start if a.im is None else start.as_complex()
    if max_length is None and T == 1:
        outer = k.permute(0, 2, 3, 1) @ v.transpose(1, 2)
        state = a.select(1, 0).map(lambda x: x.unsqueeze(-1)).times(start).plus(Pair(outer))
        return (q.transpose(1, 2) @ state.re).transpose(1, 2).to(queries.dtype), state
    cut = _Cut.of(T, _CHUNK if gates.re.ndim == 3 else _CHUNK_PER_CHANNEL, max_length)
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
    return cut.mend(y.permute(0, 2, 3, 1, 4)).to(queries.dtype), final


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
