"""One step of a gate loop with a matrix state in Triton, for decoding: S = a S + k ⊗ v, y = Re(qᵀ S), in one launch.

B rows, H heads, K key size (padded to KK), V value size in blocks of BV; W the precision. Places are tuples of strides:
of rows and heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gateloop_transformer.ops.backends.triton_launch import launch, power, precision
from gateloop_transformer.ops.pairs import Pair, compute_dtype

# Entries of a state that a program takes.
_ENTRIES = 2048


@triton.jit
def _vector(x, place, b, h, n, SIZE, W: tl.constexpr):
    """Of row b and head h, 0 where n is past the size."""
    return tl.load(x + b * place[0] + h * place[1] + n, mask=n < SIZE, other=0.0).to(W)


@triton.jit
def step(
    q, k, v, a, a_im, places, resets, before, before_im, after, after_im, y, H, K, V,
    COMPLEX: tl.constexpr, PER_CHANNEL: tl.constexpr, W: tl.constexpr, KK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A block of a head's state, and of its output. Imaginary parts, resets and `before` may be None."""
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    n, m = tl.arange(0, KK), tl.program_id(1) * BV + tl.arange(0, BV)
    at = head * K * V + n[:, None] * V + m[None, :]
    mask = (n < K)[:, None] & (m < V)[None, :]
    channel = n if PER_CHANNEL else tl.zeros_like(n)
    re = _vector(a, places[3], b, h, channel, K, W)
    im = tl.zeros_like(re)
    if a_im is not None:
        im = _vector(a_im, places[3], b, h, channel, K, W)
    if resets is not None:
        reset = tl.load(resets + b) != 0
        re, im = tl.where(reset, 0.0, re), tl.where(reset, 0.0, im)
    added = _vector(k, places[1], b, h, n, K, W)[:, None] * _vector(v, places[2], b, h, m, V, W)[None, :]
    state, state_im = added, tl.zeros_like(added)
    if before is not None:
        x = tl.load(before + at, mask=mask, other=0.0).to(W)
        x_im = tl.zeros_like(x)
        if before_im is not None:
            x_im = tl.load(before_im + at, mask=mask, other=0.0).to(W)
        state += re[:, None] * x - im[:, None] * x_im
        state_im += re[:, None] * x_im + im[:, None] * x
    tl.store(after + at, state, mask=mask)
    if COMPLEX:
        tl.store(after_im + at, state_im, mask=mask)
    out = tl.sum(_vector(q, places[0], b, h, n, K, W)[:, None] * state, 0)
    tl.store(y + head * V + m, out.to(y.dtype.element_ty), mask=m < V)


def forward(
    queries: Tensor, keys: Tensor, values: Tensor, gates: Pair, initial: Pair | None, resets: Tensor | None
) -> tuple[Tensor, Pair]:
    """y (B, 1, H, V) and the state (B, H, K, V), of inputs whose heads' numbers are neighbours."""
    B, _, H, K = queries.shape
    V, wide = values.shape[-1], compute_dtype(queries.dtype, gates.re.dtype)
    start: list[Tensor | None] = [None, None]
    if initial is not None:
        start = [None if part is None else part.contiguous() for part in initial]
    if gates.im is not None and gates.im.stride() != gates.re.stride():
        gates = gates.map(torch.Tensor.contiguous)
    complex_state = gates.im is not None or start[1] is not None
    after = [queries.new_empty((B, H, K, V), dtype=wide) for _ in range(2 if complex_state else 1)]
    y = values.new_empty(values.shape)
    padded = power(K)
    width = min(power(V), max(1, _ENTRIES // padded))
    marks = None if resets is None else resets.contiguous().view(torch.uint8)
    launch(
        step,
        (B * H, -(-V // width)),
        *(queries, keys, values, *gates),
        tuple((x.stride(0), x.stride(2)) for x in (queries, keys, values, gates.re)),
        *(marks, *start, *after, *[None] * (2 - len(after)), y, H, K, V),
        like=queries,
        warps=max(1, padded * width // 512),
        COMPLEX=complex_state,
        PER_CHANNEL=gates.re.ndim == 4,
        W=precision(wide),
        KK=padded,
        BV=width,
    )
    return y, Pair(*after)
