"""Plain torch in chunks of time: linear memory, matrix products, any device, no complex dtypes.

B batch, T time, H heads, K key size, V value size, D channels, N chunks, C steps per chunk,
G gates per head (1, or K when each key channel has its own). Derivations: docs/math.md.

Products of gates within a chunk come from doubling, never from logarithms or quotients: they are exact
at a gate of 0 and lose no digits over long spans. Where a result is not finite it is computed anew, step by step: see
`stepwise`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gateloop_transformer.ops.backends import eager, stepwise
from gateloop_transformer.ops.layout import PLAIN, Layout
from gateloop_transformer.ops.packing import cleared
from gateloop_transformer.ops.pairs import Pair, compute_dtype
from gateloop_transformer.ops.recurrences import GateLoop, LinearScan

# Elements of the largest temporary: chunks are worked through in groups of at most this size.
_GROUP_ELEMENTS = 1 << 22


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everything torch runs, save integers."""
    return None if dtype.is_floating_point or dtype.is_complex else "needs floating point or complex tensors"


# ---- elementwise recurrence -------------------------------------------------------------------------


def _pad_time(x: Tensor, length: int, value: float) -> Tensor:
    missing = length - x.shape[1]
    if not missing:
        return x
    return torch.cat([x, x.new_full((x.shape[0], missing, *x.shape[2:]), value)], 1)


def _pad_gates(gates: Pair, length: int) -> Pair:
    im = None if gates.im is None else _pad_time(gates.im, length, 0.0)
    return Pair(_pad_time(gates.re, length, 1.0), im)


def _scan(gates: Pair, inputs: Pair, initial: Pair | None, reverse: bool, layout: Layout = PLAIN) -> Pair:
    """All states (B, T, D) in 2·√T vectorised steps: all chunks at once, then from chunk to chunk.

    A gate of 0 in a reset's place clears no state that is not finite: states before and after the chunks tell.
    """
    scanned, borders = _scan_chunks(cleared(gates, layout.resets), inputs, initial, reverse)
    if layout.resets is None or stepwise.all_finite(*borders.parts()):
        return scanned
    return eager.linear_scan_forward(LinearScan(gates, inputs, initial, reverse, layout=layout))


def _scan_chunks(gates: Pair, inputs: Pair, initial: Pair | None, reverse: bool) -> tuple[Pair, Pair]:
    """All states, and those before and after each chunk (B, N + 1, D)."""
    B, T, D = inputs.re.shape
    C = 1 << max(0, round(math.log2(max(T, 1)) / 2))
    N = -(-T // C)
    a = _pad_gates(gates, N * C).map(lambda x: x.reshape(B, N, C, D))
    x = inputs.map(lambda x: _pad_time(x, N * C, 0.0).reshape(B, N, C, D))
    if a.im is not None or (initial is not None and initial.im is not None):
        x = x.as_complex()
    h, p = x.map(torch.empty_like), a.map(torch.empty_like)
    inside = range(C)[::-1] if reverse else range(C)
    product, state = Pair(torch.ones_like(a.re[:, :, 0])), x.select(2, 0).map(torch.zeros_like)
    for c in inside:
        gate = a.select(2, c)
        product, state = gate.times(product), gate.times(state).plus(x.select(2, c))
        _write(p, c, product)
        _write(h, c, state)
    end = inside[-1]
    starts = [initial or x.map(lambda x: x.new_zeros(B, D))]
    for n in range(N)[::-1] if reverse else range(N):
        gate, state = p.select(2, end).select(1, n), h.select(2, end).select(1, n)
        starts.append(gate.times(starts[-1]).plus(state))
    order = starts[:N][::-1] if reverse else starts[:N]
    carried = _stack(order, 1).map(lambda x: x.unsqueeze(2))
    states = p.times(carried).plus(h)
    return states.map(lambda x: x.reshape(B, N * C, D)[:, :T]), _stack(starts, 1)


def _write(target: Pair, step: int, value: Pair) -> None:
    for part, new in zip(target.parts(), value.parts(), strict=True):
        part[:, :, step] = new


def _stack(values: list[Pair], dim: int) -> Pair:
    re = torch.stack([value.re for value in values], dim)
    if all(value.im is None for value in values):
        return Pair(re)
    parts = [im for value in values if (im := value.as_complex().im) is not None]
    return Pair(re, torch.stack(parts, dim))


def _shift(x: Pair, first: Pair | None, reverse: bool) -> Pair:
    """x[t-1] in the order of the scan, with `first` (zero when None) before the first step."""

    def moved(part: Tensor, start: Tensor | None) -> Tensor:
        head = (torch.zeros_like(part[:, 0]) if start is None else start.to(part.dtype)).unsqueeze(1)
        return torch.cat([part[:, 1:], head] if reverse else [head, part[:, :-1]], 1)

    if first is not None and first.im is not None:
        x = x.as_complex()
    im = None if x.im is None else moved(x.im, None if first is None else first.im)
    return Pair(moved(x.re, None if first is None else first.re), im)


def _adjoint(grad: Pair, grad_final: Pair | None, gates: Pair, reverse: bool, layout: Layout) -> Pair:
    """g[t] = grad[t] + conj(a[t+1]) g[t+1]: a scan against the order of the first."""
    one = Pair(torch.ones_like(gates.re[:, 0]))
    if layout.resets is not None:
        layout = Layout(_shift(Pair(layout.resets), None, not reverse).re)
    return _scan(_shift(gates, one, not reverse).conj(), grad, grad_final, not reverse, layout)


def _first_gradient(g: Pair, gates: Pair, reverse: bool, layout: Layout) -> Pair:
    """conj(a[1]) g[1]: the gradient of the initial state, from that of all states."""
    first = _first_step(gates, reverse).conj().times(_first_step(g, reverse))
    return first if layout.resets is None else cleared(first, layout.resets[:, -1 if reverse else 0])


def _first_step(x: Pair, reverse: bool) -> Pair:
    return x.select(1, -1 if reverse else 0)


def linear_scan_forward(scan: LinearScan) -> Pair:
    """h[t] = a[t] h[t-1] + x[t]."""
    gates, inputs, initial, reverse, _, layout = scan
    dtype = compute_dtype(gates.re.dtype, inputs.re.dtype)
    start = None if initial is None else initial.to(dtype)
    return _scan(gates.to(dtype), inputs.to(dtype), start, reverse, layout).map(torch.Tensor.contiguous)


def linear_scan_backward(scan: LinearScan, states: Pair, grad: Pair) -> tuple[Pair, Pair, Pair]:
    """Gradients by one scan in the opposite direction."""
    gates, _, initial, reverse, _, layout = scan
    dtype = compute_dtype(gates.re.dtype, states.re.dtype)
    dh, a, h = grad.to(dtype), gates.to(dtype), states.to(dtype)
    g = _adjoint(dh, None, a, reverse, layout)
    before = _shift(h, None if initial is None else initial.to(dtype), reverse)
    d_gates = cleared(g.times(before.conj()), layout.resets)
    return d_gates, g.map(torch.Tensor.contiguous), _first_gradient(g, a, reverse, layout)


# ---- matrix state -----------------------------------------------------------------------------------


def _decay_products(gates: Pair) -> Pair:
    """Products D[i, j] = a[j+1] ··· a[i] for i ≥ j (1 on the diagonal), 0 above it.

    (..., C) → (..., C, C), C a power of two. Two neighbouring blocks make one of twice the size: the
    corner is (product from the second block's start to i) × (last row of the first block).
    """
    C = gates.re.shape[-1]
    D = Pair(torch.ones_like(gates.re)[..., None, None])
    if gates.im is not None:
        D = Pair(D.re, torch.zeros_like(D.re))
    size = 1
    while size < C:
        low, high = D.map(lambda x: x[..., 0::2, :, :]), D.map(lambda x: x[..., 1::2, :, :])
        head = gates.map(partial(_every, start=size, step=2 * size))
        prefix = head.times(high.select(-1, 0))
        corner = prefix.map(lambda x: x.unsqueeze(-1)).times(low.narrow(-2, size - 1, 1))
        D = _join(low, corner, high)
        size *= 2
    return D.map(lambda x: x.squeeze(-3))


def _every(x: Tensor, start: int, step: int) -> Tensor:
    return x[..., start::step].unsqueeze(-1)


def _join(low: Pair, corner: Pair, high: Pair) -> Pair:
    def joined(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return torch.cat([torch.cat([a, torch.zeros_like(a)], -1), torch.cat([b, c], -1)], -2)

    if low.im is None or corner.im is None or high.im is None:
        return Pair(joined(low.re, corner.re, high.re))
    return Pair(joined(low.re, corner.re, high.re), joined(low.im, corner.im, high.im))


class _Chunks(NamedTuple):
    """A group of chunks: q, k (B, H, N, C, K), v and maybe dy (B, H, N, C, V), gates (B, H, N, G, C)."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Pair
    dy: Tensor


class _Products(NamedTuple):
    """Products of gates within each chunk: all (B, H, N, G, C, C); from its start to i and from j to its
    end (B, H, N, C, G); over the whole of it (B, H, N, G, 1).
    """

    inside: Pair
    start: Pair
    end: Pair
    whole: Pair


def _products(gates: Pair) -> _Products:
    inside = _decay_products(gates)
    start = gates.narrow(-1, 0, 1).times(inside.select(-1, 0))
    return _Products(
        inside=inside,
        start=start.map(lambda x: x.transpose(-1, -2)),
        end=inside.map(lambda x: x[..., -1, :].transpose(-1, -2)),
        whole=start.narrow(-1, gates.re.shape[-1] - 1, 1),
    )


def _chunk_length(T: int, K: int, V: int, G: int) -> int:
    """16 for gates per channel (their products take C·C·K), otherwise near the size of a head."""
    longest = 16 if G > 1 else min(64, max(16, K, V))
    return 1 << min(math.ceil(math.log2(longest)), math.ceil(math.log2(max(T, 1))))


class _Cuts:
    """How (B, T, H, ·) tensors are cut into chunks, and put back."""

    def __init__(self, queries: Tensor, values: Tensor, gates: Pair, reverse: bool) -> None:
        self.B, self.T, self.H, self.K = queries.shape
        self.V, self.reverse = values.shape[-1], reverse
        self.G = self.K if gates.re.ndim == 4 else 1
        self.C = _chunk_length(self.T, self.K, self.V, self.G)
        self.N = -(-self.T // self.C)
        self.dtype = compute_dtype(queries.dtype, gates.re.dtype)
        widest = max(self.G * self.C * self.C, self.C * max(self.K, self.V))
        self.group = max(1, _GROUP_ELEMENTS // max(1, self.B * self.H * widest))

    def cut(self, x: Tensor, value: float = 0.0) -> Tensor:
        """(B, T, H, X) → (B, H, N, C, X), the end padded with `value`, copied once for all products to come."""
        x = x.to(self.dtype)
        x = x.flip(1) if self.reverse else x
        x = _pad_time(x, self.N * self.C, value)
        return x.reshape(self.B, self.N, self.C, self.H, x.shape[-1]).permute(0, 3, 1, 2, 4).contiguous()

    def cut_gates(self, gates: Pair) -> Pair:
        """(B, T, H[, K]) → (B, H, N, G, C), the end padded with 1."""
        full = gates.map(lambda x: x.reshape(self.B, self.T, self.H, self.G))
        re = self.cut(full.re, 1.0)
        return Pair(re, None if full.im is None else self.cut(full.im)).map(lambda x: x.transpose(-1, -2))

    def mend(self, x: Tensor) -> Tensor:
        """(B, H, N, C, X) → (B, T, H, X), without the padding."""
        x = x.permute(0, 2, 3, 1, 4).reshape(self.B, self.N * self.C, self.H, x.shape[-1])[:, : self.T]
        return x.flip(1) if self.reverse else x

    def groups(self, chunks: _Chunks) -> Iterator[tuple[slice, _Chunks]]:
        """Runs of chunks small enough that temporaries stay bounded."""
        for first in range(0, self.N, self.group):
            at = slice(first, min(first + self.group, self.N))
            q, k, v, dy = (x[:, :, at] for x in (chunks.q, chunks.k, chunks.v, chunks.dy))
            yield at, _Chunks(q, k, v, chunks.gates.narrow(2, at.start, at.stop - at.start), dy)


def _carry(gates: Pair, added: Pair, start: Pair) -> tuple[Pair, Pair]:
    """S[n+1] = gates[n] S[n] + added[n]: the state before each chunk (stacked) and after the last."""
    states = [start]
    for n in range(added.re.shape[2]):
        states.append(gates.select(2, n).times(states[-1]).plus(added.select(2, n)))
    return _stack(states[:-1], 2), states[-1]


def _start_state(cuts: _Cuts, q: Tensor, gates: Pair, initial: Pair | None) -> Pair:
    if initial is None:
        initial = Pair(torch.zeros(cuts.B, cuts.H, cuts.K, cuts.V, device=q.device))
    start = initial.to(cuts.dtype)
    return start if gates.im is None else start.as_complex()


def _transposed_product(x: Pair, y: Tensor) -> Pair:
    """xᵀ y over the steps of a chunk: (…, C, K), (…, C, V) → (…, K, V)."""
    return x.map(lambda part: part.transpose(-1, -2) @ y)


def _scores(q: Tensor, k: Tensor, decay: Tensor) -> Tensor:
    """Σ_c q[i, c] k[j, c] decay[c, i, j] (B, H, N, C, C); decay shared by the channels when G is 1."""
    if decay.shape[-3] == 1:
        return (q @ k.transpose(-1, -2)) * decay.squeeze(-3)
    return (_outer(q, k) * decay).sum(-3)


def _outer(q: Tensor, k: Tensor) -> Tensor:
    """q[i, c] k[j, c] as (…, K, C, C)."""
    return q.transpose(-1, -2).unsqueeze(-1) * k.transpose(-1, -2).unsqueeze(-2)


def _read(state: Pair, weights: Pair, q: Tensor) -> Tensor:
    """Re((q ∘ weights) S): what the state before the chunk gives to each step in it."""
    y = (q * weights.re) @ state.re
    if weights.im is not None and state.im is not None:
        y = y - (q * weights.im) @ state.im
    return y


def gate_loop_forward(loop: GateLoop) -> tuple[Tensor, Pair]:
    """S[t] = a[t] S[t-1] + k[t] ⊗ v[t], y[t] = Re(q[t]ᵀ S[t])."""
    if loop.elementwise():
        return _elementwise_forward(loop)
    y, final = _matrix_forward(loop)
    if not stepwise.all_finite(y, *final.parts()):
        return stepwise.gate_loop_forward(loop)
    return y.to(loop.queries.dtype).contiguous(), final


def _matrix_forward(loop: GateLoop) -> tuple[Tensor, Pair]:
    """y in the precision of the arithmetic, and the last state."""
    queries, keys, values, gates, initial, reverse, _, layout = loop
    gates = cleared(gates, layout.resets)
    cuts = _Cuts(queries, values, gates, reverse)
    v = cuts.cut(values)
    chunks = _Chunks(cuts.cut(queries), cuts.cut(keys), v, cuts.cut_gates(gates), v)
    state = _start_state(cuts, queries, gates, initial)
    y = torch.empty(v.shape, dtype=cuts.dtype, device=v.device)
    for at, part in cuts.groups(chunks):
        products = _products(part.gates)
        added = _transposed_product(products.end.over(torch.mul, part.k), part.v)
        before, state = _carry(products.whole, added, state)
        inside = _scores(part.q, part.k, products.inside.re) @ part.v
        y[:, :, at] = inside + _read(before, products.start, part.q)
    return cuts.mend(y), state.map(lambda x: x.clone())


def gate_loop_backward(loop: GateLoop, grad: Tensor, grad_final: Pair) -> tuple[Tensor, Tensor, Tensor, Pair, Pair]:
    """States at chunk borders are computed again, then chunks are worked through from the last to the first."""
    if loop.elementwise():
        return _elementwise_backward(loop, grad, grad_final)
    dq, dk, dv, d_gates, d_initial = _matrix_backward(loop, grad, grad_final)
    if not stepwise.all_finite(dq, dk, dv, *d_gates.parts(), *d_initial.parts()):
        return stepwise.gate_loop_backward(loop, grad, grad_final)
    return dq, dk, dv, cleared(d_gates, loop.layout.resets), d_initial


def _matrix_backward(loop: GateLoop, grad: Tensor, grad_final: Pair) -> tuple[Tensor, Tensor, Tensor, Pair, Pair]:
    queries, keys, values, gates, initial, reverse, _, layout = loop
    gates = cleared(gates, layout.resets)
    cuts = _Cuts(queries, values, gates, reverse)
    chunks = _Chunks(cuts.cut(queries), cuts.cut(keys), cuts.cut(values), cuts.cut_gates(gates), cuts.cut(grad))
    borders = _border_states(cuts, chunks, _start_state(cuts, queries, gates, initial))
    g = (grad_final.as_complex() if gates.im is not None else grad_final).to(cuts.dtype)
    like = chunks.gates.re
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in chunks[:3])
    complex_gates = gates.im is not None or g.im is not None or borders[0].im is not None
    da = Pair(torch.zeros_like(like), torch.zeros_like(like) if complex_gates else None)
    for n, (at, part) in reversed(list(enumerate(cuts.groups(chunks)))):
        products = _products(part.gates)
        pulled = _transposed_product(products.start.conj().over(torch.mul, part.q), part.dy)
        after, g = _carry_back(products.whole.conj(), pulled, g)
        dq[:, :, at], dk[:, :, at], dv[:, :, at] = _input_gradients(part, products, borders[n], after)
        gate_grad = _gate_gradients(part, products, borders[n], after)
        da.re[:, :, at] = gate_grad.re
        if da.im is not None and gate_grad.im is not None:
            da.im[:, :, at] = gate_grad.im
    d_gates = da.map(lambda x: cuts.mend(x.transpose(-1, -2)).reshape(gates.re.shape))
    return cuts.mend(dq), cuts.mend(dk), cuts.mend(dv), d_gates, g.map(lambda x: x.clone())


def _border_states(cuts: _Cuts, chunks: _Chunks, state: Pair) -> list[Pair]:
    """Per group, the state before each of its chunks (B, H, N, K, V)."""
    borders = []
    for _, part in cuts.groups(chunks):
        products = _products(part.gates)
        added = _transposed_product(products.end.over(torch.mul, part.k), part.v)
        before, state = _carry(products.whole, added, state)
        borders.append(before)
    return borders


def _carry_back(gates: Pair, pulled: Pair, end: Pair) -> tuple[Pair, Pair]:
    """The gradient after each chunk (stacked), and before the first."""
    after, first = _carry(gates.map(_flip), pulled.map(_flip), end)
    return after.map(_flip), first


def _flip(x: Tensor) -> Tensor:
    """Chunks in the opposite order."""
    return x.flip(2)


def _input_gradients(part: _Chunks, products: _Products, before: Pair, after: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v: within the chunk, from the state before it, to the state after it."""
    q, k, v, _, dy = part
    decay = products.inside.re
    d_scores = dy @ v.transpose(-1, -2)
    if decay.shape[-3] == 1:
        weighted = d_scores * decay.squeeze(-3)
        dq, dk = weighted @ k, weighted.transpose(-1, -2) @ q
    else:
        weighted = d_scores.unsqueeze(-3) * decay
        dq = (weighted @ k.transpose(-1, -2).unsqueeze(-1)).squeeze(-1).transpose(-1, -2)
        dk = (weighted.transpose(-1, -2) @ q.transpose(-1, -2).unsqueeze(-1)).squeeze(-1).transpose(-1, -2)
    dv = _scores(q, k, decay).transpose(-1, -2) @ dy
    dq = dq + products.start.re * (dy @ before.re.transpose(-1, -2))
    dk = dk + products.end.re * (v @ after.re.transpose(-1, -2))
    dv = dv + (k * products.end.re) @ after.re
    if products.start.im is not None and before.im is not None:
        dq = dq - products.start.im * (dy @ before.im.transpose(-1, -2))
    if products.end.im is not None and after.im is not None:
        dk = dk + products.end.im * (v @ after.im.transpose(-1, -2))
        dv = dv + (k * products.end.im) @ after.im
    return dq, dk, dv


def _over_channels(x: Pair, gate_count: int) -> Pair:
    """(…, K, ·) summed over K when the channels share one gate."""
    return x.map(lambda part: part.sum(-2, keepdim=True)) if gate_count == 1 else x


def _gate_gradients(part: _Chunks, products: _Products, before: Pair, after: Pair) -> Pair:
    """da[t] = Σ_{i ≥ t > j} W[i, j] conj(D[i, t] D[t-1, j]), (B, H, N, G, C): no quotient, exact at a gate of 0.

    W is the gradient of the products D; column 0 stands for the state before the chunk, and the
    gradient of the state after the chunk joins the last row.
    """
    q, k, v, _, dy = part
    inside, G = products.inside, products.inside.re.shape[-3]
    d_scores = (dy @ v.transpose(-1, -2)).unsqueeze(-3)
    within = ((q @ k.transpose(-1, -2)).unsqueeze(-3) if G == 1 else _outer(q, k)) * d_scores

    def per_gate(state: Pair, left: Tensor, right: Tensor) -> Pair:
        """Σ_v left[i, c] state[c, v] right[i, v], summed over c when G is 1: (…, G, C)."""
        return _over_channels(state.map(lambda x: (left * (right @ x.transpose(-1, -2))).transpose(-1, -2)), G)

    from_start = per_gate(before, q, dy).conj()
    to_end = per_gate(after, k, v)
    both = after.times(before.conj()).map(lambda x: x.sum(-1)[..., None])
    corner = _over_channels(both, G)
    adjoint = inside.conj().map(lambda x: x.transpose(-1, -2))
    last = inside.conj().map(lambda x: x[..., -1, :].unsqueeze(-1))
    X = adjoint.over(torch.matmul, within).plus(last.times(to_end.map(lambda x: x.unsqueeze(-2))))
    x_start = _apply(adjoint, from_start).plus(last.map(lambda x: x.squeeze(-1)).times(corner))

    previous = inside.conj().map(lambda x: F.pad(x[..., :-1, :], (0, 0, 1, 0)))
    before_start = products.start.conj().map(lambda x: x.transpose(-1, -2)[..., :-1])
    one = F.pad(before_start.re, (1, 0), value=1.0)
    start = Pair(one, None if before_start.im is None else F.pad(before_start.im, (1, 0)))
    return X.times(previous).map(lambda x: x.sum(-1)).plus(x_start.times(start))


def _apply(matrix: Pair, vector: Pair) -> Pair:
    """The complex product of a matrix (…, C, C) and a vector (…, C)."""
    parts = [matrix.over(torch.matmul, vector.re.unsqueeze(-1)).map(lambda x: x.squeeze(-1))]
    if vector.im is None:
        return parts[0]
    turned = matrix.over(torch.matmul, vector.im.unsqueeze(-1)).map(lambda x: x.squeeze(-1))
    if turned.im is None:
        return Pair(parts[0].re, turned.re)
    return parts[0].plus(Pair(-turned.im, turned.re))


# ---- head size 1: everything elementwise ------------------------------------------------------------


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T, H[, 1]) → (B, T, H)."""
    return x.reshape(x.shape[:3]).to(dtype)


def _flat_state(state: Pair, dtype: torch.dtype) -> Pair:
    return state.map(lambda x: x.reshape(x.shape[:2]).to(dtype))


def _elementwise_forward(loop: GateLoop) -> tuple[Tensor, Pair]:
    queries, keys, values, gates, initial, reverse, _, layout = loop
    dtype = loop.wide()
    q, k, v = (_flat(x, dtype) for x in (queries, keys, values))
    start = None if initial is None else _flat_state(initial, dtype)
    h = _scan(gates.map(lambda x: _flat(x, dtype)), Pair(k * v), start, reverse, layout)
    final = _first_step(h, not reverse).map(lambda x: x[..., None, None].clone())
    return (q * h.re).to(queries.dtype).unsqueeze(-1), final


def _elementwise_backward(loop: GateLoop, grad: Tensor, grad_final: Pair) -> tuple[Tensor, Tensor, Tensor, Pair, Pair]:
    queries, keys, values, gates, initial, reverse, _, layout = loop
    dtype = loop.wide()
    q, k, v, dy = (_flat(x, dtype) for x in (queries, keys, values, grad))
    a = gates.map(lambda x: _flat(x, dtype))
    start = None if initial is None else _flat_state(initial, dtype)
    h = _scan(a, Pair(k * v), start, reverse, layout)
    g = _adjoint(Pair(q * dy), _flat_state(grad_final, dtype), a, reverse, layout)
    dq, dk, dv = ((x * y).unsqueeze(-1) for x, y in ((h.re, dy), (g.re, v), (g.re, k)))
    da = cleared(g.times(_shift(h, start, reverse).conj()), layout.resets).map(lambda x: x.reshape(gates.re.shape))
    first = _first_gradient(g, a, reverse, layout)
    return dq, dk, dv, da, first.map(lambda x: x[..., None, None].clone())
