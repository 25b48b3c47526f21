"""The definition, step by step: ground truth for every other backend, on any device.

B batch, T time, H heads, K key size, V value size, D channels. Gradients are the recurrences of
docs/math.md, written down as they stand there. Keeps one state per step: slow, and memory T·K·V.

A gate multiplies, a reset selects: where a step begins anew the state before it and the gradient that reaches that
state are exactly 0, whatever they were, NaN included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gateloop_transformer.ops.layout import Layout
from gateloop_transformer.ops.pairs import Pair, compute_dtype
from gateloop_transformer.ops.recurrences import GateLoop, LinearScan


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everything torch runs, save integers."""
    return None if dtype.is_floating_point or dtype.is_complex else "needs floating point or complex tensors"


def _steps(length: int, reverse: bool) -> list[int]:
    return list(range(length))[::-1] if reverse else list(range(length))


def _kept(x: Tensor, layout: Layout, t: int) -> Tensor:
    """What is left at step t of a state or gradient x (B, ...): nothing where the step begins anew."""
    if layout.resets is None:
        return x
    return x.masked_fill(layout.resets[:, t].reshape(-1, *[1] * (x.ndim - 1)), 0)


def _wide(value: Pair) -> Tensor:
    return value.map(lambda part: part.to(compute_dtype(part.dtype))).complex()


def _parts(value: Tensor, is_complex: bool) -> Pair:
    if not value.is_complex():
        return Pair(value)
    # A copy, not contiguous(): the parts of a single number count as contiguous and would share memory.
    if not is_complex:
        return Pair(value.real.clone(memory_format=torch.contiguous_format))
    re, im = (part.clone(memory_format=torch.contiguous_format) for part in (value.real, value.imag))
    return Pair(re, im)


def linear_scan_forward(scan: LinearScan) -> Pair:
    """h[t] = a[t] h[t-1] + x[t], one step at a time."""
    gates, inputs, initial, reverse, _, layout = scan
    a, x = _wide(gates), _wide(inputs)
    h = torch.zeros_like(x[:, 0]) if initial is None else _wide(initial)
    states: dict[int, Tensor] = {}
    for t in _steps(x.shape[1], reverse):
        h = _kept(a[:, t] * h, layout, t) + x[:, t]
        states[t] = h
    stacked = torch.stack([states[t] for t in range(x.shape[1])], 1)
    return _parts(stacked, scan.parts() == 2)


def linear_scan_backward(scan: LinearScan, states: Pair, grad: Pair) -> tuple[Pair, Pair, Pair]:
    """g[t] = dh[t] + conj(a[t+1]) g[t+1]; da[t] = g[t] conj(h[t-1]); dx = g; dh0 = conj(a[1]) g[1]."""
    initial, reverse, layout = scan.initial, scan.reverse, scan.layout
    dh, a, h = _wide(grad), _wide(scan.gates), _wide(states)
    g = torch.zeros_like(dh[:, 0])
    first = torch.zeros_like(g) if initial is None else _wide(initial)
    steps = _steps(h.shape[1], reverse)
    da, dx = [torch.empty(0)] * len(steps), [torch.empty(0)] * len(steps)
    for n in range(len(steps) - 1, -1, -1):
        t = steps[n]
        g = dh[:, t] + g
        da[t] = _kept(g * torch.conj_physical(h[:, steps[n - 1]] if n else first), layout, t)
        dx[t] = g
        g = _kept(torch.conj_physical(a[:, t]) * g, layout, t)
    return _parts(torch.stack(da, 1), True), _parts(torch.stack(dx, 1), True), _parts(g, True)


def _per_channel(gates: Pair) -> Tensor:
    """Gates (B, T, H) or (B, T, H, K) as (B, T, H, 1 or K, 1), ready to multiply a state."""
    a = _wide(gates)
    return a[..., None, None] if a.ndim == 3 else a[..., None]


def _states(k: Tensor, v: Tensor, a: Tensor, initial: Pair | None, reverse: bool, layout: Layout) -> list[Tensor]:
    """The state before the first step, then after each step in the order of the scan."""
    B, T, H, K = k.shape
    zero = torch.zeros(B, H, K, v.shape[-1], dtype=torch.promote_types(k.dtype, a.dtype), device=k.device)
    states = [zero if initial is None else _wide(initial.to(k.dtype))]
    for t in _steps(T, reverse):
        states.append(_kept(a[:, t] * states[-1], layout, t) + k[:, t, :, :, None] * v[:, t, :, None, :])
    return states


def gate_loop_forward(loop: GateLoop) -> tuple[Tensor, Pair]:
    """S[t] = a[t] S[t-1] + k[t] ⊗ v[t], y[t] = Re(q[t]ᵀ S[t]), one step at a time."""
    queries, keys, values, gates, initial, reverse, _, layout = loop
    dtype = loop.wide()
    q, k, v = (x.to(dtype) for x in (queries, keys, values))
    states = _states(k, v, _per_channel(gates.map(lambda x: x.to(dtype))), initial, reverse, layout)
    # Not written into memory that is there: transformations of torch pass through here.
    y = [torch.einsum("bhk,bhkv->bhv", q[:, t], states[n + 1].real) for n, t in enumerate(_steps(q.shape[1], reverse))]
    outputs = torch.stack(y[::-1] if reverse else y, 1)
    return outputs.to(queries.dtype), _parts(states[-1].clone(), loop.parts() == 2)


def gate_loop_backward(loop: GateLoop, grad: Tensor, grad_final: Pair) -> tuple[Tensor, Tensor, Tensor, Pair, Pair]:
    """The adjoint recurrence, one step at a time, from the last to the first."""
    queries, keys, values, gates, initial, reverse, _, layout = loop
    dtype = loop.wide()
    q, k, v, dy = (x.to(dtype) for x in (queries, keys, values, grad))
    a = _per_channel(gates.map(lambda x: x.to(dtype)))
    states = _states(k, v, a, initial, reverse, layout)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    da = torch.zeros(gates.re.shape, dtype=torch.promote_types(dtype, torch.complex64), device=q.device)
    g = _wide(grad_final)
    steps = _steps(q.shape[1], reverse)
    for n in range(len(steps) - 1, -1, -1):
        t = steps[n]
        g = q[:, t, :, :, None] * dy[:, t, :, None, :] + g
        dq[:, t] = torch.einsum("bhkv,bhv->bhk", states[n + 1].real, dy[:, t])
        dk[:, t] = torch.einsum("bhkv,bhv->bhk", g.real, v[:, t])
        dv[:, t] = torch.einsum("bhkv,bhk->bhv", g.real, k[:, t])
        product = _kept(g * torch.conj_physical(states[n]), layout, t)
        da[:, t] = product.sum((-2, -1)) if gates.re.ndim == 3 else product.sum(-1)
        g = _kept(torch.conj_physical(a[:, t]) * g, layout, t)
    return dq, dk, dv, _parts(da, True), _parts(g.clone(), True)
