"""The RMS norm in Triton: a program takes ROWS rows of one group, each read once.

D channels of a row, padded to DD; G groups with a gain each, of which rows are members in turn; W the precision.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gateloop_transformer.ops.backends.triton_launch import launch, power, precision
from gateloop_transformer.ops.pairs import compute_dtype

# Entries that a program takes, about.
_ENTRIES = 4096


@triton.jit
def _place(rows, D, G, ROWS: tl.constexpr, DD: tl.constexpr):
    """Offsets of the rows' entries, the mask, the group's channels, and which program of the group this is."""
    block, group = tl.program_id(0) // G, tl.program_id(0) % G
    r = (block * ROWS + tl.arange(0, ROWS)) * G + group
    d = tl.arange(0, DD)
    mask = (r < rows)[:, None] & (d < D)[None, :]
    return r.to(tl.int64)[:, None] * D + d[None, :], mask, group * D + d, d < D, block


@triton.jit
def _scaled(x, D, W: tl.constexpr):
    """√D / max(‖x‖, 1e-12) of every row, and whether it is the norm that counts."""
    norm = tl.sqrt(tl.sum(x * x, 1))
    root = tl.sqrt(tl.full(norm.shape, 1.0, W) * D)
    return (root / tl.maximum(norm, 1e-12))[:, None], (norm > 1e-12)[:, None]


@triton.jit
def _forward(x, gamma, y, rows, D, G, W: tl.constexpr, ROWS: tl.constexpr, DD: tl.constexpr):
    at, mask, channels, inside, _ = _place(rows, D, G, ROWS, DD)
    given = tl.load(x + at, mask=mask, other=0.0).to(W)
    gain = tl.load(gamma + channels, mask=inside, other=0.0).to(W)
    scale, _ = _scaled(given, D, W)
    tl.store(y + at, (given * scale * gain[None, :]).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(grad, x, gamma, dx, sums, rows, D, G, W: tl.constexpr, ROWS: tl.constexpr, DD: tl.constexpr):
    """sums (programs of a group, G, D): what each adds to the gradient of gamma."""
    at, mask, channels, inside, block = _place(rows, D, G, ROWS, DD)
    given = tl.load(x + at, mask=mask, other=0.0).to(W)
    dy = tl.load(grad + at, mask=mask, other=0.0).to(W)
    gain = tl.load(gamma + channels, mask=inside, other=0.0).to(W)
    scale, counts = _scaled(given, D, W)
    unit, pulled = given * scale, dy * gain[None, :]
    along = tl.where(counts, tl.sum(pulled * unit, 1)[:, None] / D, 0.0)
    tl.store(dx + at, ((pulled - unit * along) * scale).to(dx.dtype.element_ty), mask=mask)
    tl.store(sums + block.to(tl.int64) * G * D + channels, tl.sum(dy * unit, 0), mask=inside)


def _options(x: Tensor, gamma: Tensor) -> tuple[int, int, int, int, dict[str, int]]:
    """Rows, D, G, programs of a group, and block sizes."""
    D = x.shape[-1]
    rows, groups, width = x.numel() // D, gamma.numel() // D, power(D)
    size = max(1, min(_ENTRIES // width, power(-(-rows // groups))))
    return rows, D, groups, -(-rows // (groups * size)), {"ROWS": size, "DD": width, "warps": warps(size * width)}


def warps(entries: int) -> int:
    """For a block of so many entries, eight or more to a thread."""
    return max(1, min(16, power(entries) // 256))


def norm_forward(x: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """The RMS norm of x (..., D) times gamma (D,) or (G, D), in a floating-point type."""
    x, gamma = x.contiguous(), gamma.contiguous()
    wide = compute_dtype(x.dtype, gamma.dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    rows, D, groups, blocks, options = _options(x, gamma)
    launch(_forward, (blocks * groups,), x, gamma, y, rows, D, groups, W=precision(wide), like=x, **options)
    return y


def norm_backward(grad: Tensor, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and gamma."""
    x, grad, gain = x.contiguous(), grad.contiguous(), gamma.contiguous()
    wide = compute_dtype(x.dtype, gamma.dtype)
    rows, D, groups, blocks, options = _options(x, gain)
    dx, sums = x.new_empty(x.shape), x.new_empty((blocks, groups, D), dtype=wide)
    launch(
        _backward, (blocks * groups,), grad, x, gain, dx, sums, rows, D, groups, W=precision(wide), like=x, **options
    )
    return dx, sums.sum(0).reshape(gamma.shape).to(gamma.dtype)
