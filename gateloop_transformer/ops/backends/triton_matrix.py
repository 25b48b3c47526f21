"""The Triton backend for matrix states: sizes, block sizes, and the kernels' arguments.

Kernels and letters: `triton_chunks.py`.

Types. Inputs are multiplied as they are given: bfloat16 by bfloat16, and what meets them (weighted inputs, scores,
states) is rounded to the same 8 bits on its way into a product, nowhere else. float16 has too small a range for states:
it goes through the tensor cores as TF32, which holds all its digits. float32 is multiplied as three TF32 products
("tf32x3", about 2⁻²¹ relative; "ieee" would not run on tensor cores), on AMD as float32. Sums, gates, products of gates
and states are float32; where these meet each other in a product, in the gradient of gates, it is of float32 (of TF32
where inputs are of 16 bits). All is float64 where an input is.

Memory: for each chunk and head one state, twice in the backward pass; nothing per step but products of gates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gateloop_transformer.ops.backends.triton_launch import launch, target
from gateloop_transformer.ops.layout import Layout
from gateloop_transformer.ops.packing import cleared
from gateloop_transformer.ops.pairs import Pair, compute_dtype
from gateloop_transformer.ops.recurrences import GateLoop


class Blocks(NamedTuple):
    """Steps of a chunk; channels that a program has of the matrix that is its own, and of those that it goes through;
    warps, and warps for the gradient of gates, which holds the most sums.
    """

    C: int
    own: int
    other: int
    warps: int
    gate_warps: int


# Entries of a state that one program carries from chunk to chunk, or multiplies at a time.
ENTRIES = 512

# Queries or what stands in their place, and so on.
Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def blocks_for(T: int, K: int, V: int, G: int, mul: torch.dtype) -> Blocks:
    """One of a few configurations: little is compiled, and none of it spills."""
    # With a gate per key channel the work within a chunk is proportional to its length, and not done by tensor cores.
    if G > 1:
        return Blocks(16, 64 if mul == torch.bfloat16 else 32, 16, 4, 8)
    # Short sequences are cut finer, to occupy the device.
    if T <= 64 or mul == torch.float64:
        return Blocks(16, 32, 16, 4, 4)
    # Where channels are one block, all of it is in registers at once. Three TF32 products take more of them than one of
    # bfloat16.
    C = 64 if min(K, V) > 16 else 32
    return Blocks(C, 64, 32, 4, 8) if mul == torch.bfloat16 else Blocks(C, 32, 16, 8, 8)


def _block(size: int, most: int) -> int:
    return min(most, max(16, 1 << (size - 1).bit_length()))


def kernels() -> dict[str, Any]:
    """All kernels by name."""
    from gateloop_transformer.ops.backends import triton_channels, triton_chunks

    names = ["gate_products", "chunk_states", "carry", "attend", "gate_gradients"]
    channel_names = ["channel_attend", "channel_gradients"]
    return {name: getattr(triton_chunks, name) for name in names} | {
        name: getattr(triton_channels, name) for name in channel_names
    }


def _precision(inputs: torch.dtype, wide: torch.dtype) -> str:
    """How numbers of the wide dtype are multiplied."""
    if target() == "interpreter":
        return "interpreter"
    if target() == "hip" or wide == torch.float64:
        return "ieee"
    return "tf32x3" if inputs == torch.float32 else "tf32"


def _language(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))


def _places(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    """Strides of row, time and head of each."""
    return tuple(x.stride()[:3] for x in tensors)


def _neighbours(x: Tensor) -> Tensor:
    """x with the numbers of a head next to each other."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _documents(layout: Layout, T: int, C: int, reverse: bool, device: torch.device) -> tuple[int, Tensor, Tensor]:
    """How many chunks documents have; first step and steps of each; how many lie before each document, and in all."""
    numbers = layout.table(T, C, reverse)
    chunks, borders = [], [0]
    for first, steps in zip(numbers[::3], numbers[1::3], strict=True):
        chunks += [(first + step, min(C, steps - step)) for step in range(0, steps, C)]
        borders.append(len(chunks))
    table = torch.tensor(chunks, dtype=torch.int32, device=device)
    return len(chunks), table, torch.tensor(borders, dtype=torch.int32, device=device)


class _Loop:
    """A gate loop cut into chunks, and the launches over them."""

    def __init__(self, queries: Tensor, values: Tensor, gates: Pair, reverse: bool, layout: Layout) -> None:
        B, self.T, self.H, self.K = queries.shape
        self.V, self.sequences, self.parts = values.shape[-1], layout.states(B), len(gates.parts())
        self.G = 1 if gates.re.ndim == 3 else self.K
        self.wide, self.device = compute_dtype(queries.dtype, gates.re.dtype), queries.device
        narrow = queries.dtype == torch.bfloat16 and self.wide == torch.float32
        mul = torch.bfloat16 if narrow else self.wide
        self.blocks = blocks_for(self.T, self.K, self.V, self.G, mul)
        self.chunks, table, borders = B * -(-self.T // self.blocks.C), None, None
        if layout.cu_seqlens is not None:
            self.chunks, table, borders = _documents(layout, self.T, self.blocks.C, reverse, self.device)
        self.packed = {"PACKED": table is not None}
        self.sizes = {"C": self.blocks.C, "PARTS": self.parts, "ROWS": 3 if self.parts == 1 else 7}
        precision = _precision(queries.dtype, self.wide)
        self.types = {"MUL": _language(mul), "WIDE": _language(self.wide), "PRECISION": precision}
        self.products = self.new(self.chunks, self.H, self.sizes["ROWS"], self.blocks.C, self.G)
        # Tables are given even where none is read: a kernel's argument is a pointer.
        self.borders = self.products if borders is None else borders
        self.common: dict[str, Any] = {
            "table": self.products if table is None else table,
            "products": self.products,
            "T": self.T,
        }
        self.common |= {"REVERSE": reverse, **self.packed, **self.sizes}
        self._multiply(gates)

    def new(self, *shape: int) -> Tensor:
        """Memory of the wide dtype."""
        return torch.empty(shape, dtype=self.wide, device=self.device)

    def run(self, name: str, blocks: int, arguments: dict[str, Any]) -> None:
        """Launch a kernel over (chunks, heads, blocks)."""
        warps = self.blocks.gate_warps if name in ("gate_gradients", "channel_gradients") else self.blocks.warps
        self._launch(name, (self.chunks, self.H, blocks), {**arguments, **self.common}, warps)

    def _launch(self, name: str, grid: tuple[int, ...], arguments: dict[str, Any], warps: int) -> None:
        launch(kernels()[name], grid, like=self.products, warps=warps, **arguments)

    def _multiply(self, gates: Pair) -> None:
        if gates.im is not None and gates.im.stride() != gates.re.stride():
            gates = gates.map(torch.Tensor.contiguous)
        if self.G > 1:
            gates = gates.map(_neighbours)
        BG = min(16, 1 << (self.G - 1).bit_length())
        arguments: dict[str, Any] = {"re": gates.re, "im": gates.parts()[-1], "place": _places(gates.re)[0]}
        arguments |= {"G": self.G, "BG": BG, "WIDE": self.types["WIDE"]}
        self.run("gate_products", -(-self.G // BG), arguments)

    def new_state(self, state: Pair | None) -> Pair:
        """Parts (sequences, H, K, V) of their own memory, zero for None."""
        given = [] if state is None else state.parts()[: self.parts]
        shape = self.sequences, self.H, self.K, self.V
        parts = [part.to(self.wide, copy=True, memory_format=torch.contiguous_format) for part in given]
        parts += [torch.zeros(shape, dtype=self.wide, device=self.device) for _ in range(self.parts - len(given))]
        return Pair(*parts)

    def states(self, x: Tensor, y: Tensor, state: Pair, adjoint: bool) -> Tensor:
        """States before chunks, or gradients of those after (chunks, H, parts, K, V); `state` becomes the last."""
        K, V, own = self.K, self.V, self.blocks.own
        BK, BV = _block(K, own), _block(V, own)
        states = self.new(self.chunks, self.H, self.parts, K, V)
        shared: dict[str, Any] = {"states": states, "K": K, "V": V, "G": self.G, "ADJOINT": adjoint}
        arguments: dict[str, Any] = {"x": x, "y": y, "places": _places(x, y), "BK": BK, "BV": BV, **self.types}
        self.run("chunk_states", -(-K // BK) * -(-V // BV), {**shared, **arguments})
        arguments = {"re": state.re, "im": state.parts()[-1], "products": self.products, "borders": self.borders}
        arguments |= {"T": self.T, "H": self.H, "BLOCK": ENTRIES, **self.packed, **self.sizes}
        self._launch("carry", (self.sequences * self.H, -(-K * V // ENTRIES)), {**shared, **arguments}, 4)
        return states

    def attend(
        self, inputs: Four, dtype: torch.dtype, states: Tensor, adjoint: bool, summed: bool
    ) -> tuple[Tensor, Tensor]:
        """[(X Yᵀ) ∘ Re D] Z + Re(P ∘ (X S)), or its adjoint: see `triton_chunks.py`.

        Args:
            inputs: x, y, z, and the partner of sums.
            dtype: of the result.
            states: before each chunk, or after it where `adjoint`.
            adjoint: which of the two.
            summed: whether sums are asked for. Then the channels of x and y are values, those of z are keys.

        Returns:
            (B, T, H, channels of z), and sums (chunks, H, blocks, parts, C).
        """
        x, y, z, partner = inputs
        M, N = x.shape[-1], z.shape[-1]
        BM, BN = _block(M, self.blocks.other), _block(N, self.blocks.own)
        out = torch.empty(z.shape, dtype=dtype, device=self.device)
        blocks = -(-N // BN)
        sums = self.new(self.chunks, self.H, blocks, self.parts, self.blocks.C) if summed else self.products
        arguments: dict[str, Any] = {
            "x": x,
            "y": y,
            "z": z,
            "out": out,
            "partner": partner,
            "states": states,
            "sums": sums,
        }
        arguments |= {"places": _places(x, y, z, out, partner), "M": M, "N": N, "BM": BM, "BN": BN, **self.types}
        self.run("attend", blocks, {**arguments, "TRANSPOSED": summed, "ADJOINT": adjoint, "SUMS": summed})
        return out, sums

    def gate_gradients(self, inputs: Four, states: tuple[Tensor, Tensor], sums: tuple[Tensor, Tensor]) -> Pair:
        """da (B, T, H) from q, k, v and dy, states before and after chunks, and what `attend` added up."""
        q, k, v, dy = inputs
        da = [self.new(*q.shape[:3]) for _ in range(self.parts)]
        arguments: dict[str, Any] = {
            "q": q,
            "k": k,
            "v": v,
            "dy": dy,
            "da": da[0],
            "da_im": da[-1],
            "K": self.K,
            "V": self.V,
        }
        arguments |= {"before": states[0], "after": states[1], "starts": sums[0], "ends": sums[1]}
        arguments |= {"places": _places(*inputs, da[0]), "BLOCKS": sums[0].shape[2], "BLOCK": ENTRIES, **self.types}
        arguments |= {"BK": _block(self.K, self.blocks.other), "BV": _block(self.V, self.blocks.other)}
        self.run("gate_gradients", 1, arguments)
        return Pair(*da)

    def channel_attend(self, inputs: Three, dtype: torch.dtype, states: Tensor, adjoint: bool) -> Tensor:
        """y from queries, keys, values and states before chunks, or dv from queries, keys, dy and those after them."""
        q, k, z = inputs
        out = torch.empty(z.shape, dtype=dtype, device=self.device)
        BK, BV = _block(self.K, self.blocks.other), _block(self.V, self.blocks.own)
        arguments: dict[str, Any] = {"q": q, "k": k, "z": z, "out": out, "states": states, "ADJOINT": adjoint}
        arguments |= {"places": _places(q, k, z, out), "K": self.K, "V": self.V, "BK": BK, "BV": BV, **self.types}
        self.run("channel_attend", -(-self.V // BV), arguments)
        return out

    def channel_gradients(self, inputs: Four, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Pair]:
        """dq, dk and da (B, T, H, K) from queries, keys, values and dy, and states before and after chunks."""
        q, k, v, dy = inputs
        dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=self.device) for x in (q, k))
        da = [self.new(*q.shape) for _ in range(self.parts)]
        BK, BV = _block(self.K, self.blocks.other), _block(self.V, self.blocks.other)
        arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "dy": dy, "dq": dq, "dk": dk, "da": da[0], "da_im": da[-1]}
        arguments |= {"before": states[0], "after": states[1], "places": _places(*inputs, dq, dk, da[0])}
        arguments |= {"K": self.K, "V": self.V, "BK": BK, "BV": BV, **self.types}
        self.run("channel_gradients", -(-self.K // BK), arguments)
        return dq, dk, Pair(*da)


def _gates(gates: Pair, initial: Pair | None, layout: Layout) -> Pair:
    """Complex where the state is, and 0 where it begins anew."""
    gates = cleared(gates, layout.resets)
    return gates.as_complex() if initial is not None and initial.im is not None else gates


def forward(given: GateLoop) -> tuple[Tensor, Pair]:
    """y and the last state."""
    queries, keys, values, gates, initial, reverse, _, layout = given
    q, k, v = (_neighbours(x) for x in (queries, keys, values))
    if queries.shape[1] == 1 and layout.cu_seqlens is None:
        from gateloop_transformer.ops.backends import triton_step

        per_channel = gates.map(_neighbours) if gates.re.ndim == 4 else gates
        return triton_step.forward(q, k, v, per_channel, initial, layout.resets)
    loop = _Loop(q, v, _gates(gates, initial, layout), reverse, layout)
    state = loop.new_state(initial)
    before = loop.states(k, v, state, False)
    if loop.G > 1:
        return loop.channel_attend((q, k, v), q.dtype, before, False), state
    return loop.attend((q, k, v, v), q.dtype, before, False, False)[0], state


def backward(given: GateLoop, grad: Tensor, grad_final: Pair) -> tuple[Tensor, Tensor, Tensor, Pair, Pair]:
    """All gradients; states at the borders of chunks are computed again."""
    queries, keys, values, gates, initial, reverse, _, layout = given
    q, k, v, dy = (_neighbours(x) for x in (queries, keys, values, grad))
    loop = _Loop(q, v, _gates(gates, initial, layout), reverse, layout)
    before, last = loop.states(k, v, loop.new_state(initial), False), loop.new_state(grad_final)
    after = loop.states(q, dy, last, True)
    if loop.G > 1:
        dq, dk, da = loop.channel_gradients((q, k, v, dy), (before, after))
        dv = loop.channel_attend((q, k, dy), v.dtype, after, True)
        return dq, dk, dv, cleared(da, layout.resets), last
    dq, starts = loop.attend((dy, v, k, q), q.dtype, before, False, True)
    dk, ends = loop.attend((v, dy, q, k), k.dtype, after, True, True)
    dv, _ = loop.attend((k, q, dy, dy), v.dtype, after, True, False)
    da = loop.gate_gradients((q, k, v, dy), (before, after), (starts, ends))
    da = da.map(lambda x: x.reshape(gates.re.shape))
    return dq, dk, dv, cleared(da, layout.resets), last
