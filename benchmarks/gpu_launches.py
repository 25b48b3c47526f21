"""Every launch of the Triton backend, written down of tensors without memory: what is listed is what would run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from gateloop_transformer.ops.backends import triton_gpu, triton_matrix
from gateloop_transformer.ops.backends.triton_launch import Launch, written_down
from gateloop_transformer.ops.backends.triton_tuning import forced
from gateloop_transformer.ops.channels import ChannelLoop, elementwise_backward, packed_gradients
from gateloop_transformer.ops.layout import PLAIN, Layout
from gateloop_transformer.ops.pairs import Pair
from gateloop_transformer.ops.recurrences import GateLoop, LinearScan

DTYPES = (torch.bfloat16, torch.float32)
# Of keys and values.
SIZES = (16, 64, 128, 256)


def launches(target: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[tuple[str, Launch]]:
    """All kernels in all configurations, by name.

    Args:
        target: "cuda" or "hip".
        dtypes: of inputs.

    Yields:
        Those for long sequences, for packed documents, and for one step or a few.
    """
    for dtype in dtypes:
        kind = str(dtype).removeprefix("torch.")
        for choice in range(2):
            with forced(choice):
                # Where there are fewer choices the last comes again.
                listed = list(itertools.chain(_scans(dtype), _loops(dtype), _others(dtype) if not choice else ()))
            for what, launch in listed:
                width = f", {launch.arguments['DD']} channels" if choice else ""
                yield f"{launch.kernel.__name__.strip('_')}, {kind}, {what}{width}", launch
        for what, launch in _matrices(dtype, target):
            yield f"{launch.kernel.__name__}, {kind}, {what}", launch


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _scans(dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    for parts, packed in itertools.product((1, 2), (False, True)):
        shape = (1 if packed else 2), 4096, 512
        wide = torch.float32 if parts == 2 else dtype
        x, h = (Pair(*(_empty(*shape, dtype=kind) for _ in range(parts))) for kind in (dtype, wide))
        layout = _layout(packed)
        start = Pair(*(_empty(layout.states(shape[0]), 512) for _ in range(parts)))
        with written_down() as listed:
            scan = LinearScan(x, x, start, layout=layout)
            triton_gpu.linear_scan_forward(scan)
            triton_gpu.linear_scan_backward(scan, h, h)
        what = ("real", "complex")[parts - 1] + (", packed" if packed else "")
        yield from ((what, launch) for launch in listed)


def _layout(packed: bool) -> Layout:
    if not packed:
        return Layout()
    return Layout(_empty(1, 4096, dtype=torch.bool), torch.empty(9, dtype=torch.int64, device="meta"))


def _as_heads(state: Tensor) -> Tensor:
    """(B, H) → (B, H, 1, 1)."""
    return state[..., None, None]


def _loops(dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    for gate, T in itertools.product(("polar", "paper", "ring", "sigmoid", "given"), (4096, 1)):
        for packed in (False, True) if (gate, T) == ("polar", 4096) else (False,):
            B, D, layout = 1 if packed else 2, 512, _layout(packed)
            qkv = _empty(B, T, 3 * D, dtype=dtype)
            q, k, v = qkv.chunk(3, -1)
            z = _empty(B, T, 2 * D, dtype=dtype)
            bias = Pair(_empty(D), _empty(D)) if gate == "ring" else None
            swish = _empty(B, T, D, dtype=dtype) if gate not in ("sigmoid", "given") else None
            gates = Pair(v) if gate == "sigmoid" else Pair(z)
            if gate == "given":
                gates = Pair(_empty(B, T, D), _empty(B, T, D))
            loop = ChannelLoop(q, None if gate == "sigmoid" else k, v, gates, swish, bias, gate, 1.0, False, layout)
            state = Pair(*(_empty(layout.states(B), D) for _ in range(loop.parts)))
            with written_down() as listed:
                y, _, kept = triton_gpu.loop_forward(loop, state)
                if gate == "given":
                    final, apart = state.map(_as_heads), gates.map(lambda x: x.unsqueeze(-1))
                    dy, q, k, v = (x.unsqueeze(-1) for x in (y, q, k, v))
                    heads = GateLoop(q, k, v, apart, final, layout=layout)
                    elementwise_backward(triton_gpu, heads, dy, final)
                else:
                    packed_gradients(triton_gpu, loop, y, state, kept, qkv)
            what = gate + (", packed" if packed else "") + (", one step" if T == 1 else "")
            yield from ((what, launch) for launch in listed)


def _others(dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    for gate in ("polar", "paper", "ring"):
        z = _empty(2, 4096, 32, dtype=dtype)
        bias = Pair(_empty(16), _empty(16)) if gate == "ring" else None
        with written_down() as listed:
            results = triton_gpu.gates_forward(z, gate, bias, False)
            triton_gpu.gates_backward(results, z, gate, bias, False, 1.0)
        yield from ((gate, launch) for launch in listed)
    for D in (64, 512, 4096):
        x = _empty(2, 4096, D, dtype=dtype)
        with written_down() as listed:
            triton_gpu.norm_forward(x, _empty(D), x.dtype)
            triton_gpu.norm_backward(x, x, _empty(D))
        yield from ((f"width {D}", launch) for launch in listed)
    x, w = _empty(2, 4099, 512, dtype=dtype), _empty(512, 4)
    with written_down() as listed:
        triton_gpu.conv_backward(triton_gpu.conv_forward(x, w, True), x, w, True)
    yield from (("4 taps, SiLU", launch) for launch in listed)


def _matrices(dtype: torch.dtype, target: str) -> Iterator[tuple[str, Launch]]:
    """Chunks of 16 steps, too, and packed documents read backwards, for the smallest heads."""
    for size, parts, per_channel in itertools.product(SIZES, (1, 2), (False, True)):
        cases = {"": (4096, PLAIN), ", one step": (1, PLAIN)}
        if size == SIZES[0]:
            cases |= {", short": (64, PLAIN), ", packed": (4096, Layout(cu_seqlens=torch.tensor([0, 4096])))}
        for case, (T, layout) in cases.items():
            x = _empty(1, T, 8, size, dtype=dtype)
            gates = Pair(*(_empty(1, T, 8, *[size] * per_channel) for _ in range(parts)))
            state = Pair(*(_empty(1, 8, size, size) for _ in range(parts)))
            reverse = not layout.plain()
            with written_down(target) as listed:
                loop = GateLoop(x, x, x, gates, state, reverse, layout=layout)
                triton_matrix.forward(loop)
                if T > 1:
                    triton_matrix.backward(loop, x, state)
            kinds = ("real", "complex")[parts - 1], "per channel" if per_channel else "per head"
            what = f"{size} x {size}, {kinds[0]} gates {kinds[1]}{case}"
            for launch in listed:
                flags = [word.lower() for word in ("ADJOINT", "TRANSPOSED") if launch.arguments.get(word)]
                yield ", ".join([what, *flags]), launch
