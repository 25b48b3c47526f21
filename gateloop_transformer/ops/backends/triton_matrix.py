"""The Triton backend for matrix states: sizes, block sizes, and the kernels' arguments.

Kernels and letters: `triton_chunks.py` (forwards), `triton_adjoint.py` (backwards).

Types. Inputs are multiplied as they are given: bfloat16 by bfloat16, and what meets them (weighted inputs, scores,
states) is rounded to the same 8 bits on its way into a product, nowhere else. float16 has too small a range for states:
it goes through the tensor cores as TF32, which holds all its digits. float32 is multiplied as three TF32 products
("tf32x3", about 2⁻²¹ relative; "ieee" would not run on tensor cores), on AMD as float32. Sums, gates, products of gates
and states are float32; all is float64 where an input is.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gateloop_transformer.ops.layout import Layout
from gateloop_transformer.ops.packing import cleared
from gateloop_transformer.ops.pairs import Pair, compute_dtype


class Blocks(NamedTuple):
    """Steps of a chunk, channels of a block of keys and of values, warps of a program (and of the two that hold the most
    sums: gradients of keys and of gates), stages of its loads.
    """

    C: int
    BK: int
    BV: int
    warps: int
    most_warps: int
    stages: int


# Entries of a state that one program carries from chunk to chunk.
CARRIED = 512


def blocks_for(T: int, K: int, V: int, mul: torch.dtype) -> Blocks:
    """Block sizes by shape: one of a few, so that little is compiled."""
    # A chunk is as long as its products stay in registers; short sequences are cut finer, to occupy the device.
    C = 16 if T <= 64 or mul == torch.float64 else 64
    most = 64 if mul == torch.bfloat16 else 32
    BK, BV = (min(most, max(16, 1 << (size - 1).bit_length())) for size in (K, V))
    return Blocks(C, BK, BV, 4, 8 if C == 64 else 4, 2)


# Kernel's name, grid, arguments by name, warps, stages: what launches a kernel, or writes down that it would be.
Launch = Callable[[str, tuple[int, ...], dict[str, Any], int, int], None]


def kernels() -> dict[str, Any]:
    """All kernels by name."""
    from gateloop_transformer.ops.backends import triton_adjoint, triton_chunks

    forwards = ["gate_products", "chunk_states", "carry", "outputs"]
    backwards = ["key_gradients", "value_gradients", "gate_gradients"]
    return {name: getattr(triton_chunks, name) for name in forwards} | {
        name: getattr(triton_adjoint, name) for name in backwards
    }


def _launch(name: str, grid: tuple[int, ...], arguments: dict[str, Any], warps: int, stages: int) -> None:
    kernels()[name][grid](**arguments, num_warps=warps, num_stages=stages)


def _target() -> str:
    """Who multiplies: "interpreter", "cuda" or "hip"."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreter"
    return "hip" if torch.version.hip else "cuda"


def _language(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))


def _place(x: Tensor) -> tuple[int, int, int]:
    """Strides of row, time and head."""
    return x.stride(0), x.stride(1), x.stride(2)


def _neighbours(x: Tensor) -> Tensor:
    """x with the numbers of a head next to each other."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class _Loop:
    """A gate loop cut into chunks, and the launches over them."""

    def __init__(
        self,
        queries: Tensor,
        values: Tensor,
        gates: Pair,
        reverse: bool,
        layout: Layout,
        target: str,
        launch: Launch,
    ) -> None:
        B, self.T, self.H, self.K = queries.shape
        self.V, self.sequences, self.parts = values.shape[-1], layout.states(B), len(gates.parts())
        self.wide, self.device = compute_dtype(queries.dtype, gates.re.dtype), queries.device
        narrow = queries.dtype == torch.bfloat16 and self.wide == torch.float32
        mul = torch.bfloat16 if narrow else self.wide
        self.blocks, self.launch = blocks_for(self.T, self.K, self.V, mul), launch
        self.chunks, self.table, self.borders = B * -(-self.T // self.blocks.C), None, None
        if layout.cu_seqlens is not None:
            self.chunks, self.table, self.borders = _documents(layout, self.T, self.blocks.C, reverse, self.device)
        half = queries.dtype != torch.float32 and target == "cuda"
        single = {"interpreter": "interpreter", "hip": "ieee", "cuda": "tf32" if half else "tf32x3"}[target]
        self.wide_precision = "interpreter" if target == "interpreter" else "ieee"
        if self.wide == torch.float32:
            self.wide_precision = single
        self.types = {
            "MUL": _language(mul),
            "WIDE": _language(self.wide),
            "PRECISION": self.wide_precision,
        }
        self.layout = {"REVERSE": reverse, "PACKED": self.table is not None}
        self.sizes = {
            "K": self.K,
            "V": self.V,
            "C": self.blocks.C,
            "PARTS": self.parts,
            "ROWS": 3 if self.parts == 1 else 7,
        }
        self.products = self._products(gates)

    def new(self, *shape: int) -> Tensor:
        """Memory of the wide dtype."""
        return torch.empty(shape, dtype=self.wide, device=self.device)

    def run(self, name: str, blocks: int | None, arguments: dict[str, Any]) -> None:
        """Launch a kernel over (chunks, heads) or (chunks, heads, blocks)."""
        grid = (self.chunks, self.H) if blocks is None else (self.chunks, self.H, blocks)
        # A table is given even where none is read: a kernel's argument is a pointer.
        table = self.products if self.table is None else self.table
        everything = {**arguments, "products": self.products, "table": table, "T": self.T, **self.layout}
        most = name in ("key_gradients", "gate_gradients")
        warps = self.blocks.most_warps if most else self.blocks.warps
        self.launch(name, grid, everything, warps, self.blocks.stages)

    def _products(self, gates: Pair) -> Tensor:
        self.products = self.new(self.chunks, self.H, self.sizes["ROWS"], self.blocks.C)
        if gates.im is not None and gates.im.stride() != gates.re.stride():
            gates = gates.map(torch.Tensor.contiguous)
        arguments = {"re": gates.re, "im": gates.re if gates.im is None else gates.im, "place": _place(gates.re)}
        sizes = {name: self.sizes[name] for name in ("C", "PARTS", "ROWS")}
        self.run("gate_products", None, {**arguments, **sizes, "WIDE": self.types["WIDE"]})
        return self.products

    @property
    def key_blocks(self) -> int:
        """How many blocks of keys there are."""
        return -(-self.K // self.blocks.BK)

    @property
    def value_blocks(self) -> int:
        """How many blocks of values there are."""
        return -(-self.V // self.blocks.BV)

    def matrix(self) -> dict[str, Any]:
        """Sizes and types for kernels that multiply."""
        return {**self.sizes, **self.types, "BK": self.blocks.BK, "BV": self.blocks.BV}

    def new_state(self, state: Pair | None) -> Pair:
        """Parts (sequences, H, K, V) of their own memory, zero for None."""
        given = [] if state is None else state.parts()[: self.parts]
        shape = self.sequences, self.H, self.K, self.V
        parts = [torch.zeros(shape, dtype=self.wide, device=self.device) for _ in range(self.parts)]
        for part, start in zip(parts, given, strict=False):
            part.copy_(start)
        return Pair(*parts)

    def states(self, x: Tensor, y: Tensor, state: Pair, adjoint: bool) -> Tensor:
        """States before chunks, or gradients of states after them (chunks, H, parts, K, V); `state` becomes the last."""
        states = self.new(self.chunks, self.H, self.parts, self.K, self.V)
        arguments = {"x": x, "y": y, "states": states, "x_place": _place(x), "y_place": _place(y), "ADJOINT": adjoint}
        self.run("chunk_states", self.key_blocks * self.value_blocks, {**arguments, **self.matrix()})
        grid = self.sequences * self.H, -(-self.K * self.V // CARRIED)
        arguments = {
            "states": states,
            "products": self.products,
            "re": state.re,
            "im": state.re if state.im is None else state.im,
            "borders": self.products if self.borders is None else self.borders,
            "T": self.T,
            "H": self.H,
            "BLOCK": CARRIED,
            "ADJOINT": adjoint,
            "PACKED": self.borders is not None,
        }
        self.launch("carry", grid, {**arguments, **self.sizes}, 4, 2)
        return states


def _documents(layout: Layout, T: int, C: int, reverse: bool, device: torch.device) -> tuple[int, Tensor, Tensor]:
    """How many chunks documents have; first step and steps of each; how many lie before each document, and in all."""
    numbers = layout.table(T, C, reverse)
    chunks, borders = [], [0]
    for first, steps in zip(numbers[::3], numbers[1::3], strict=True):
        chunks += [(first + step, min(C, steps - step)) for step in range(0, steps, C)]
        borders.append(len(chunks))
    table = torch.tensor(chunks, dtype=torch.int32, device=device)
    return len(chunks), table, torch.tensor(borders, dtype=torch.int32, device=device)


def _gates(gates: Pair, initial: Pair | None, layout: Layout) -> Pair:
    """Complex where the state is, and 0 where it begins anew."""
    gates = cleared(gates, layout.resets)
    return gates.as_complex() if initial is not None and initial.im is not None else gates


def run_forward(
    launch: Launch,
    target: str,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Pair,
    initial: Pair | None,
    reverse: bool,
    layout: Layout,
) -> tuple[Tensor, Pair]:
    q, k, v = (_neighbours(x) for x in (queries, keys, values))
    loop = _Loop(q, v, _gates(gates, initial, layout), reverse, layout, target, launch)
    state = loop.new_state(initial)
    before = loop.states(k, v, state, False)
    y = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    arguments = {"q": q, "k": k, "v": v, "y": y, "before": before, "places": tuple(map(_place, (q, k, v, y)))}
    loop.run("outputs", loop.value_blocks, {**arguments, **loop.matrix()})
    return y, state


def run_backward(
    launch: Launch,
    target: str,
    grad: Tensor,
    grad_final: Pair,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Pair,
    initial: Pair | None,
    reverse: bool,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor, Pair, Pair]:
    q, k, v, dy = (_neighbours(x) for x in (queries, keys, values, grad))
    loop = _Loop(q, v, _gates(gates, initial, layout), reverse, layout, target, launch)
    before = loop.states(k, v, loop.new_state(initial), False)
    last = loop.new_state(grad_final)
    after = loop.states(q, dy, last, True)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    sums = loop.new(loop.chunks, loop.H, loop.key_blocks, 3 * loop.parts, loop.blocks.C)
    inputs, matrix = {"q": q, "k": k, "v": v, "dy": dy}, loop.matrix()
    places = tuple(map(_place, (q, k, v, dy, dq, dk)))
    arguments = {**inputs, "dq": dq, "dk": dk, "before": before, "after": after, "sums": sums, "places": places}
    loop.run("key_gradients", loop.key_blocks, {**arguments, **matrix})
    arguments = {"q": q, "k": k, "dy": dy, "dv": dv, "after": after, "places": tuple(map(_place, (q, k, dy, dv)))}
    loop.run("value_gradients", loop.value_blocks, {**arguments, **matrix})
    da = [loop.new(*gates.re.shape) for _ in range(loop.parts)]
    arguments = {**inputs, "da": da[0], "da_im": da[-1], "sums": sums, "BLOCKS": loop.key_blocks}
    arguments["places"] = tuple(map(_place, (q, k, v, dy, da[0])))
    loop.run("gate_gradients", None, {**arguments, **matrix, "WIDE_PRECISION": loop.wide_precision})
    return dq, dk, dv, cleared(Pair(*da), layout.resets), last


def forward(
    queries: Tensor, keys: Tensor, values: Tensor, gates: Pair, initial: Pair | None, reverse: bool, layout: Layout
) -> tuple[Tensor, Pair]:
    """y and the last state."""
    with torch.cuda.device_of(queries):
        return run_forward(_launch, _target(), queries, keys, values, gates, initial, reverse, layout)


def backward(
    grad: Tensor,
    grad_final: Pair,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Pair,
    initial: Pair | None,
    reverse: bool,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor, Pair, Pair]:
    """All gradients; states at the borders of chunks are computed again."""
    with torch.cuda.device_of(queries):
        arguments = grad, grad_final, queries, keys, values, gates, initial, reverse, layout
        return run_backward(_launch, _target(), *arguments)
