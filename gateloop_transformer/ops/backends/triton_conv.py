"""The short convolution in Triton, with its SiLU: y[t] = Σ_i w[i] x[t + i].

B rows of L inputs and T = L - taps + 1 outputs, D channels; TT steps and DD channels of a tile; W the precision. Inputs
are read once for each tap, but for the first from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gateloop_transformer.ops.backends.triton_gates import silu
from gateloop_transformer.ops.backends.triton_launch import launch, power, precision
from gateloop_transformer.ops.pairs import compute_dtype

_STEPS = 64
_CHANNELS = 32


@triton.jit
def _place(T, D, TT: tl.constexpr, DD: tl.constexpr):
    """Row, tile of all rows, steps (TT, 1) and channels (1, DD)."""
    tiles, blocks = tl.cdiv(T, TT), tl.cdiv(D, DD)
    tile = tl.program_id(0) // blocks
    t = tile % tiles * TT + tl.arange(0, TT)[:, None]
    d = tl.program_id(0) % blocks * DD + tl.arange(0, DD)[None, :]
    return tile // tiles, tile, t, d


@triton.jit
def _read(x, row, length, t, d, D, W: tl.constexpr):
    """Steps t of a row of so many; 0 outside."""
    at = (row * length).to(tl.int64) * D + t.to(tl.int64) * D + d
    return tl.load(x + at, mask=(t >= 0) & (t < length) & (d < D), other=0.0).to(W)


@triton.jit
def _summed(x, w, row, t, d, T, D, TAPS: tl.constexpr, W: tl.constexpr, TT: tl.constexpr, DD: tl.constexpr):
    """The convolution at steps t."""
    y = tl.zeros((TT, DD), W)
    for i in tl.static_range(TAPS):
        tap = tl.load(w + i * D + d, mask=d < D, other=0.0)
        y += tap * _read(x, row, T + TAPS - 1, t + i, d, D, W)
    return y


@triton.jit
def _forward(x, w, y, T, D, TAPS: tl.constexpr, SILU: tl.constexpr, W: tl.constexpr, TT: tl.constexpr,
             DD: tl.constexpr):  # fmt: skip
    row, _, t, d = _place(T, D, TT, DD)
    out = _summed(x, w, row, t, d, T, D, TAPS, W, TT, DD)
    if SILU:
        out, _ = silu(out)
    at = (row * T).to(tl.int64) * D + t.to(tl.int64) * D + d
    tl.store(y + at, out.to(y.dtype.element_ty), mask=(t < T) & (d < D))


@triton.jit
def _slopes(grad, x, w, slopes, sums, T, D, TAPS: tl.constexpr, SILU: tl.constexpr, W: tl.constexpr,
            TT: tl.constexpr, DD: tl.constexpr):  # fmt: skip
    """Gradients before the SiLU, and what each tile adds to the weights' (tiles, taps, D)."""
    row, tile, t, d = _place(T, D, TT, DD)
    slope = _read(grad, row, T, t, d, D, W)
    if SILU:
        _, rise = silu(_summed(x, w, row, t, d, T, D, TAPS, W, TT, DD))
        slope *= rise
        at = (row * T).to(tl.int64) * D + t.to(tl.int64) * D + d
        tl.store(slopes + at, slope, mask=(t < T) & (d < D))
    for i in tl.static_range(TAPS):
        part = tl.sum(slope * _read(x, row, T + TAPS - 1, t + i, d, D, W), 0)
        tl.store(sums + (tile * TAPS + i).to(tl.int64) * D + d, part[None, :], mask=d < D)


@triton.jit
def _inputs(slopes, w, dx, T, L, D, TAPS: tl.constexpr, W: tl.constexpr, TT: tl.constexpr, DD: tl.constexpr):
    """Gradients of the inputs: dx[l] = Σ_i w[i] slope[l - i]."""
    row, _, t, d = _place(L, D, TT, DD)
    out = tl.zeros((TT, DD), W)
    for i in tl.static_range(TAPS):
        tap = tl.load(w + i * D + d, mask=d < D, other=0.0)
        out += tap * _read(slopes, row, T, t - i, d, D, W)
    at = (row * L).to(tl.int64) * D + t.to(tl.int64) * D + d
    tl.store(dx + at, out.to(dx.dtype.element_ty), mask=(t < L) & (d < D))


def _blocks(rows: int, steps: int, D: int) -> tuple[tuple[int], int, dict[str, int]]:
    """Grid, tiles of all rows, and block sizes."""
    size, width = min(_STEPS, power(steps)), min(_CHANNELS, power(D))
    tiles = rows * -(-steps // size)
    options = {"TT": size, "DD": width, "warps": max(1, min(4, size * width // 256))}
    return (tiles * -(-D // width),), tiles, options


def _arguments(inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Inputs, weights (taps, D) in the width of the arithmetic, the dtype of y."""
    dtype = torch.promote_types(inputs.dtype, weight.dtype)
    return inputs.contiguous(), weight.t().to(compute_dtype(dtype)).contiguous(), dtype


def conv_forward(inputs: Tensor, weight: Tensor, silu: bool) -> Tensor:
    """The convolution of inputs (B, L, D) by weight (D, taps), through a SiLU if asked for."""
    x, w, dtype = _arguments(inputs, weight)
    (B, L, D), taps = x.shape, len(w)
    y = x.new_empty((B, L - taps + 1, D), dtype=dtype)
    grid, _, options = _blocks(B, y.shape[1], D)
    launch(_forward, grid, x, w, y, y.shape[1], D, TAPS=taps, SILU=silu, W=precision(w.dtype), like=x, **options)
    return y


def conv_backward(grad: Tensor, inputs: Tensor, weight: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """Gradients of inputs and weight."""
    x, w, _ = _arguments(inputs, weight)
    (B, L, D), taps, W = x.shape, len(w), precision(w.dtype)
    T, dy, dx = L - taps + 1, grad.contiguous(), torch.empty_like(x)
    slopes = x.new_empty((B, T, D), dtype=w.dtype) if silu else dy
    grid, tiles, options = _blocks(B, T, D)
    sums = x.new_empty((tiles, taps, D), dtype=w.dtype)
    launch(_slopes, grid, dy, x, w, slopes, sums, T, D, TAPS=taps, SILU=silu, W=W, like=x, **options)
    grid, _, options = _blocks(B, L, D)
    launch(_inputs, grid, slopes, w, dx, T, L, D, TAPS=taps, W=W, like=x, **options)
    return dx, sums.sum(0).t().to(weight.dtype).contiguous()
