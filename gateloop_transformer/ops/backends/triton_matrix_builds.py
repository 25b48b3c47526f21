"""Every configuration in which the Triton kernels for matrix states are compiled, to be checked without a GPU.

The launches themselves are written down, of tensors without memory: what is listed is what would run.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gateloop_transformer.ops.backends import triton_matrix
from gateloop_transformer.ops.layout import PLAIN, Layout
from gateloop_transformer.ops.pairs import Pair

SIZES = (16, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float32)
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
}


class Compilation(NamedTuple):
    """Arguments of `triton.compile(ASTSource(kernel, signature, constants, aligned), options=...)`.

    aligned: what the launcher says of pointers and of numbers that are multiples of 16.
    """

    name: str
    kernel: Any
    signature: dict[str, Any]
    constants: dict[str | tuple[int, ...], Any]
    aligned: dict[tuple[int, ...], Any]
    warps: int
    stages: int


def compilations(
    target: str,
    sizes: tuple[int, ...] = SIZES,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    kinds: tuple[bool, ...] = (False, True),
    per_channel: tuple[bool, ...] = (False, True),
) -> Iterator[Compilation]:
    """All kernels, forwards and backwards.

    Args:
        target: "cuda" or "hip".
        sizes: of keys and values, both the same.
        dtypes: of inputs.
        kinds: whether gates are complex.
        per_channel: whether there is one for each key channel.

    Yields:
        Those for long sequences; for the first size also those for short ones, which are cut into shorter chunks, and
        those for packed documents read backwards.
    """
    seen = set()
    for dtype, size, is_complex, channels in itertools.product(dtypes, sizes, kinds, per_channel):
        cases = [(4096, False), (64, False), (4096, True)] if size == sizes[0] else [(4096, False)]
        for T, documents in cases:
            for one in _launches(target, T, size, dtype, is_complex, channels, documents):
                key = f"{one.kernel.__name__} {one.signature} {one.constants} {one.aligned}"
                if key not in seen:
                    seen.add(key)
                    yield one


def _launches(
    target: str, T: int, size: int, dtype: torch.dtype, is_complex: bool, channels: bool, documents: bool
) -> list[Compilation]:
    listed: list[Compilation] = []
    functions = triton_matrix.kernels()
    words = ["complex" if is_complex else "real", *["channels"] * channels, *["documents backwards"] * documents]

    def write_down(name: str, grid: tuple[int, ...], arguments: dict[str, Any], warps: int) -> None:
        kernel = functions[name]
        signature: dict[str, Any] = {}
        constants: dict[str | tuple[int, ...], Any] = {}
        aligned: dict[tuple[int, ...], Any] = {}
        for n, (argument, parameter) in enumerate(inspect.signature(kernel.fn).parameters.items()):
            value = arguments[argument]
            constant = parameter.annotation == "tl.constexpr"
            signature[argument] = "constexpr" if constant else _signature(value)
            if constant:
                constants[argument] = value
            else:
                constants.update(dict.fromkeys(_ones(value, (n,)), 1))
                aligned.update({place: [["tt.divisibility", 16]] for place in _aligned(value, (n,))})
        flags = [flag.lower() for flag in ("ADJOINT", "TRANSPOSED") if arguments.get(flag)]
        full = " ".join([name, str(dtype).removeprefix("torch."), f"T={T}", str(size), *words, *flags])
        listed.append(Compilation(full, kernel, signature, constants, aligned, warps, triton_matrix.STAGES))

    x = torch.empty(1, T, 8, size, dtype=dtype, device="meta")
    parts = 2 if is_complex else 1
    gates = Pair(*(torch.empty(1, T, 8, *[size] * channels, device="meta") for _ in range(parts)))
    state = Pair(*(torch.empty(1, 8, size, size, device="meta") for _ in range(parts)))
    layout = Layout(cu_seqlens=torch.tensor([0, T])) if documents else PLAIN
    triton_matrix.run_forward(write_down, target, x, x, x, gates, state, documents, layout)
    triton_matrix.run_backward(write_down, target, x, state, x, x, x, gates, state, documents, layout)
    return listed


def _signature(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_signature(item) for item in value)
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    # The launcher makes a stride of 1 a constant; of the length and of how many heads there are it knows nothing.
    return "constexpr" if value == 1 else "i32"


def _ones(value: Any, place: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if isinstance(value, tuple):
        for n, item in enumerate(value):
            yield from _ones(item, (*place, n))
    elif not isinstance(value, Tensor) and value == 1:
        yield place


def _aligned(value: Any, place: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if isinstance(value, tuple):
        for n, item in enumerate(value):
            yield from _aligned(item, (*place, n))
    # Of plain numbers (the length, the heads) the launcher says nothing: see `do_not_specialize`.
    elif isinstance(value, Tensor) or (len(place) > 1 and value % 16 == 0):
        yield place
