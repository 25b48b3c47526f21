"""Bytes that Triton kernels load and store, counted in the interpreter, beside those that cannot be avoided."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gateloop_transformer.ops.backends import triton_gpu
from gateloop_transformer.ops.channels import ChannelLoop
from gateloop_transformer.ops.pairs import Pair
from gateloop_transformer.ops.recurrences import LinearScan

# Long enough for all kinds of tiles: first and last of a group, first and last of all.
STEPS = 2048
CHANNELS = 16


class Traffic(NamedTuple):
    """Of one operator: bytes that its kernels move, and the bytes of its arguments and results (docs/math.md)."""

    name: str
    dtype: str
    moved: int
    needed: int

    @property
    def ratio(self) -> float:
        return self.moved / self.needed


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes of all loads and stores inside, masked ones left out, as they come.

    Raises:
        ValueError: kernels are not interpreted in this process.
    """
    from gateloop_transformer.ops.backends.triton_launch import interpreted

    if not interpreted():
        raise ValueError("bytes are counted in Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported")
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    counts: list[int] = []

    def counting(method: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
        def wrapped(self: Any, pointers: Any, *rest: Any, **options: Any) -> Any:
            size = pointers.get_element_ty().primitive_bitwidth // 8
            counts.append(int(rest[mask_at].data.sum()) * size)
            return method(self, pointers, *rest, **options)

        return wrapped

    # Unmasked ones call these two.
    load, store, atomic = Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw
    Builder.create_masked_load = counting(load, 0)
    Builder.create_masked_store = counting(store, 1)

    def counted_atomic(self: Any, operation: Any, pointer: Any, *rest: Any) -> Any:
        counts.append(pointer.get_element_ty().primitive_bitwidth // 8)
        return atomic(self, operation, pointer, *rest)

    Builder.create_atomic_rmw = counted_atomic
    try:
        yield counts
    finally:
        Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw = load, store, atomic


def _bytes(*values: Any) -> int:
    """Of tensors, pairs of them and None."""
    return sum(
        x.numel() * x.element_size() if isinstance(x, Tensor) else _bytes(*x)
        for x in values
        if isinstance(x, (Tensor, tuple))
    )


def measure(dtype: torch.dtype, steps: int = STEPS, only: tuple[str, ...] = ()) -> Iterator[Traffic]:
    """All elementwise kernels, or only those of these gates, forwards and backwards: one row of 16 channels."""
    for parts in (1, 2) if not only else ():
        yield from _scan(dtype, steps, parts)
    for gate in only or ("sigmoid", "given", "polar", "ring"):
        yield from _loop(dtype, steps, gate)


def _random(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _scan(dtype: torch.dtype, steps: int, parts: int) -> Iterator[Traffic]:
    name, kind = f"linear_scan, {('real', 'complex')[parts - 1]}", str(dtype).removeprefix("torch.")
    a = Pair(*(0.5 * _random(dtype, 1, steps, CHANNELS) for _ in range(parts)))
    x = Pair(*(_random(dtype, 1, steps, CHANNELS) for _ in range(parts)))
    with counted() as counts:
        h = triton_gpu.linear_scan_forward(LinearScan(a, x))
    yield Traffic(f"{name}, forward", kind, sum(counts), _bytes(a, x, h))
    with counted() as counts:
        results = triton_gpu.linear_scan_backward(LinearScan(a, x), h, h)
    yield Traffic(f"{name}, backward", kind, sum(counts), _bytes(h, a, h, *results))


def _loop(dtype: torch.dtype, steps: int, gate: str) -> Iterator[Traffic]:
    kind, D = str(dtype).removeprefix("torch."), CHANNELS
    qkv, z = _random(dtype, 1, steps, 3 * D), _random(dtype, 1, steps, 2 * D)
    q, k, v = qkv.chunk(3, -1)
    bias = Pair(_random(torch.float32, D), _random(torch.float32, D)) if gate == "ring" else None
    gates = Pair(z)
    keys: Tensor | None = k
    if gate == "sigmoid":
        gates, keys = Pair(v), None
    if gate == "given":
        gates = Pair(0.5 * z[..., :D].contiguous(), 0.5 * z[..., D:].contiguous())
    swish = q.contiguous() if gate in ("polar", "ring") else None
    loop = ChannelLoop(q, keys, v, gates, swish, bias, gate, 1.0, False)
    inputs = loop[:6]
    with counted() as counts:
        y, final, kept = triton_gpu.loop_forward(loop, None)
    yield Traffic(f"gate loop, {gate}, forward", kind, sum(counts), _bytes(*inputs, y, final))
    d_gates = gates.map(torch.empty_like)
    results = [x.new_empty(x.shape) if x is not None else None for x in (q, keys, v)]
    given = [*results, d_gates.re, d_gates.im, None if swish is None else torch.empty_like(swish)]
    with counted() as counts:
        states = triton_gpu.loop_backward(loop, y, final, kept, given)
    yield Traffic(f"gate loop, {gate}, backward", kind, sum(counts), _bytes(*inputs, y, *given, *states))
