"""Numba on the CPU: fills in the kernels' arguments. Elementwise recurrences here, matrix states in `numba_matrix.py`.

B batch, T time, H heads, K key size, V value size, D channels. Recurrences read their inputs in any strides; they are
copied only to float64, where one of them has it. The norm wants its rows in order. Results do not depend on the
number of threads.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gateloop_transformer.ops.backends import chunkwise, numba_matrix
from gateloop_transformer.ops.backends.numba_memory import in_huge_pages, kind_of, new_memory, start_of
from gateloop_transformer.ops.channels import ChannelLoop
from gateloop_transformer.ops.layout import Layout
from gateloop_transformer.ops.pairs import Pair, compute_dtype, one_width
from gateloop_transformer.ops.recurrences import GateLoop, LinearScan

if TYPE_CHECKING:
    from gateloop_transformer.ops.backends.numba_cache import Kernel

INSTALL_HINT = "needs Numba: pip install numba"
_INSTALLED = importlib.util.find_spec("numba") is not None
# As Numba reads it, once, when it is imported.
_DISABLED = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
# Channels that a row of the batch is cut into, at most: their state and a chunk of them stay in the cache.
_BLOCK = 1024


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Real and complex floating point on the CPU."""
    if device.type != "cpu":
        return "runs on the CPU only"
    if not (dtype.is_floating_point or dtype.is_complex) or dtype.itemsize == 1:
        return "needs floating point of 16, 32 or 64 bits, or complex tensors"
    if not _INSTALLED:
        return INSTALL_HINT
    if _DISABLED:
        return "compiles nothing while NUMBA_DISABLE_JIT is set: unset it"
    if dtype == torch.float16 and not _converts_half():
        return "needs a processor that converts float16 (F16C); use float32 or bfloat16"
    return None


@functools.cache
def _converts_half() -> bool:
    """Whether there are instructions for it: without them code would call a function that is nowhere."""
    from gateloop_transformer.ops.backends.numba_cache import processor

    triple, _, features = processor()
    return not triple.startswith(("x86", "i386", "i686")) or "f16c" in features


def reads_layout(loop: GateLoop) -> bool:
    """Kernels know documents, but those for gates per key channel are plain torch's."""
    return loop.elementwise() or not loop.per_channel()


def fresh(like: Tensor) -> Tensor:
    """Memory in the shape and dtype of `like`."""
    return new_memory(like, *like.shape)


class _Channels(NamedTuple):
    """How D channels of B sequences are shared out: in vectors of `lanes`, the last overlapping where lanes do not
    divide D. T: steps of a row.
    """

    B: int
    T: int
    D: int
    lanes: int
    threads: int

    @property
    def vectors(self) -> int:
        return -(-self.D // self.lanes)

    @property
    def width(self) -> int:
        """Vectors in a block: a whole row where there are rows for all threads, for memory is best read in order."""
        blocks = 1 if self.B % self.threads == 0 or 4 * self.threads <= self.B else -(-self.threads // self.B)
        blocks = max(blocks, -(-self.vectors * self.lanes // _BLOCK))
        return -(-self.vectors // min(blocks, self.vectors))

    @property
    def blocks(self) -> int:
        return -(-self.vectors // self.width)

    @property
    def shared(self) -> int:
        """Channels of the last vector that the one before has too."""
        return self.vectors * self.lanes - self.D

    def spread(self, x: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(B, D) → (B, lanes of all vectors), always fresh; zero for None."""
        if x is None:
            return torch.zeros(self.B, self.vectors * self.lanes, dtype=dtype)
        x = x.reshape(-1, self.D)
        if not self.shared:
            return x.to(dtype, copy=True).contiguous()
        last = self.D - self.lanes
        return torch.cat([x[:, : last + self.shared], x[:, last:]], 1).to(dtype)

    def spread_state(self, state: Pair | None, parts: int, dtype: torch.dtype) -> list[Tensor]:
        """`spread` of the first `parts` parts of a state, zero for None and for a missing imaginary part."""
        given = [None, None] if state is None else [state.re, state.im]
        return [self.spread(part, dtype) for part in given[:parts]]

    def gathered(self, lanes: Tensor) -> Tensor:
        """The opposite of `spread`."""
        if not self.shared:
            return lanes
        last = self.D - self.lanes
        return torch.cat([lanes[:, :last], lanes[:, last + self.shared :]], 1)


def _lanes(D: int, double: bool) -> int:
    lanes = 8 if double else 16
    return lanes if lanes <= D else 1


def _channels(shape: torch.Size, double: bool, layout: Layout) -> _Channels:
    from gateloop_transformer.ops.backends.numba_launch import threads_for

    B, T, D = shape
    return _Channels(layout.states(B), T, D, _lanes(D, double), threads_for(layout.states(B) * D, B * T * D))


def _operand(x: Tensor | None, reverse: bool = False) -> list[int]:
    """Address, strides of batch and time in bytes, stride of channels in numbers."""
    if x is None:
        return [0, 0, 0, 0]
    if x.ndim == 2:
        return [x.data_ptr(), x.stride(0) * x.element_size(), 0, x.stride(1)]
    return [*start_of(x, reverse), x.stride(2)]


def _strided(*tensors: Tensor | None) -> bool:
    """Whether neighbouring channels of one are apart in memory."""
    return any(x is not None and x.stride(-1) != 1 and x.shape[-1] > 1 for x in tensors)


def _run(
    kernel: Kernel,
    channels: _Channels,
    operands: list[list[int]],
    slots: int,
    double: bool,
    layout: Layout,
    backwards: bool,
    *more: int,
) -> None:
    """Launch a kernel over all blocks of all sequences; `slots` vectors of scratch per step of a chunk and vector."""
    from gateloop_transformer.ops.backends.numba_launch import HEADER, launch, threads_for
    from gateloop_transformer.ops.backends.numba_scans import CHUNK

    c = channels
    items = c.B * c.blocks
    room = (CHUNK + 1) * c.width * c.lanes * slots * (8 if double else 4)
    numbers = c.T * c.D * (c.B if layout.cu_seqlens is None else 1)
    scratch = torch.empty(room * threads_for(items, numbers), dtype=torch.uint8)
    resets = None if layout.resets is None else layout.resets.unsqueeze(-1)
    arguments = [*(number for operand in [_operand(resets, backwards), *operands] for number in operand), *more]
    documents = layout.table(c.T, CHUNK, backwards)
    head = [c.blocks, c.vectors, c.width, c.T, c.D, scratch.data_ptr(), room]
    # The table of documents stands behind all else.
    head.append(HEADER + len(head) + 1 + len(arguments) if documents else 0)
    launch(kernel, items, [*head, *arguments, *documents], numbers)


def _bits(number: float) -> int:
    """A float64 as the integer that kernels take."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


# ---- h[t] = a[t] h[t-1] + x[t] ----------------------------------------------------------------------------


def linear_scan_forward(scan: LinearScan) -> Pair:
    """h[t] = a[t] h[t-1] + x[t]."""
    from gateloop_transformer.ops.backends.numba_scans import scan_forward

    gates, inputs, initial, reverse, _, layout = scan
    if initial is not None and initial.im is not None and gates.im is None:
        inputs = inputs.as_complex()
    gates, inputs = one_width(gates, inputs)
    parts = 2 if gates.im is not None or inputs.im is not None else 1
    dtype = torch.promote_types(gates.re.dtype, inputs.re.dtype)
    wide = compute_dtype(dtype)
    dtype = wide if parts == 2 else dtype
    c = _channels(inputs.re.shape, wide == torch.float64, layout)
    states = [new_memory(inputs.re, *inputs.re.shape, dtype=dtype) for _ in range(parts)]
    carry = c.spread_state(initial, parts, wide)
    tensors = [gates.re, gates.im, inputs.re, inputs.im]
    kernel = scan_forward(
        kind_of(gates.re.dtype),
        kind_of(inputs.re.dtype),
        kind_of(dtype),
        gates.im is not None,
        inputs.im is not None,
        _strided(*tensors),
        c.lanes,
    )
    operands = [_operand(x, reverse) for x in (*tensors, states[0], states[1] if parts == 2 else None)]
    operands += [_operand(x) for x in (carry[0], carry[1] if parts == 2 else None)]
    _run(kernel, c, operands, 0, wide == torch.float64, layout, reverse)
    return Pair(*states)


def _materialized(x: Tensor) -> Tensor:
    """A gradient that is one number for all channels, written out: kernels for it would be kernels of their own."""
    return x.contiguous() if x.stride(-1) == 0 and x.shape[-1] > 1 else x


def linear_scan_backward(scan: LinearScan, states: Pair, grad: Pair) -> tuple[Pair, Pair, Pair]:
    """One pass against the order of the first."""
    from gateloop_transformer.ops.backends.numba_scans import scan_backward

    gates, inputs, initial, reverse, _, layout = scan
    gates, inputs, grad, states = one_width(gates, inputs, grad, states)
    wide = compute_dtype(gates.re.dtype, inputs.re.dtype)
    c = _channels(inputs.re.shape, wide == torch.float64, layout)
    parts = len(states.parts())
    before, carry = c.spread_state(initial, parts, wide), c.spread_state(None, parts, wide)
    grad = grad.map(_materialized)
    tensors = [grad.re, grad.im, gates.re, gates.im, states.re, states.im]
    kernel = scan_backward(
        kind_of(grad.re.dtype),
        kind_of(gates.re.dtype),
        kind_of(states.re.dtype),
        kind_of(inputs.re.dtype),
        gates.im is not None,
        inputs.im is not None,
        parts == 2,
        _strided(*tensors),
        c.lanes,
    )
    d_gates = gates.map(fresh)
    d_inputs = inputs.map(fresh)
    operands = [_operand(x, not reverse) for x in tensors]
    operands += [_operand(before[0]), _operand(before[1] if parts == 2 else None)]
    operands += [_operand(x, not reverse) for x in (d_gates.re, d_gates.im, d_inputs.re, d_inputs.im)]
    operands += [_operand(carry[0]), _operand(carry[1] if parts == 2 else None)]
    _run(kernel, c, operands, 0, wide == torch.float64, layout, not reverse)
    return d_gates, d_inputs, Pair(*(c.gathered(part) for part in carry))


# ---- the gate loop at head size 1 -------------------------------------------------------------------------


def _shares(loop: ChannelLoop) -> _Channels:
    return _channels(loop.queries.shape, loop.wide == torch.float64, loop.layout)


def _gate_code(loop: ChannelLoop) -> int:
    """The kernels' number of the gate."""
    from gateloop_transformer.ops.backends import numba_gates as gates

    if loop.gate == "given":
        return gates.GIVEN_REAL if loop.gates.im is None else gates.GIVEN_COMPLEX
    return gates.CODES[loop.gate]


def _inputs(loop: ChannelLoop) -> list[Tensor | None]:
    return [loop.queries, loop.keys, loop.values, loop.gates.re, loop.gates.im, loop.swish]


def _operands(loop: ChannelLoop, biases: list[Tensor], carry: list[Tensor], kept: Tensor) -> list[list[int]]:
    """Those that forward and backward share."""
    states = _states(loop, kept)
    operands = [_operand(x, loop.reverse) for x in _inputs(loop)]
    operands += [_operand(x) for x in biases] if biases else [_operand(None)] * 2
    return [*operands, *(_operand(x) for x in (carry[0], carry[-1], states[0], states[-1]))]


def _biases(loop: ChannelLoop) -> list[Tensor]:
    """Each vector's own bias."""
    one = _shares(loop)._replace(B=1)
    return [] if loop.bias is None else [one.spread(part, loop.wide) for part in loop.bias.parts()]


def loop_kept(loop: ChannelLoop) -> Tensor:
    """Room for the state before each chunk. Its size may be symbolic: no decision here may depend on B or T."""
    from gateloop_transformer.ops.backends.numba_scans import CHUNK

    B, T, D = loop.queries.shape
    lanes = _lanes(D, loop.wide == torch.float64)
    # Flat: a dimension that may be 1 would tie a traced program to it.
    chunks = B * ((T + CHUNK - 1) // CHUNK)
    if loop.layout.cu_seqlens is not None:
        # Enough for documents of whatever lengths.
        chunks = T // CHUNK + loop.layout.states(B)
    size = loop.parts * chunks * (-(-D // lanes) * lanes)
    return loop.queries.new_empty(size, dtype=loop.wide)


def _states(loop: ChannelLoop, kept: Tensor) -> Tensor:
    """What is kept as (parts, chunks of all sequences, lanes of all vectors)."""
    c = _shares(loop)
    return kept.view(loop.parts, -1, c.vectors * c.lanes)


def loop_forward(loop: ChannelLoop, initial: Pair | None) -> tuple[Tensor, Pair, Tensor]:
    """y (B, T, D), the last state (B, D), and the states before each chunk, for `loop_backward`."""
    from gateloop_transformer.ops.backends.numba_loops import loop_forward as build

    c, wide, parts = _shares(loop), loop.wide, loop.parts
    carry = c.spread_state(initial, parts, wide)
    kept, y = in_huge_pages(loop_kept(loop)), new_memory(loop.queries, *loop.queries.shape)
    biases = _biases(loop)
    kernel = build(
        kind_of(loop.queries.dtype),
        kind_of(loop.gates.re.dtype),
        _gate_code(loop),
        loop.swish is not None,
        _strided(*_inputs(loop)),
        c.lanes,
    )
    operands = [*_operands(loop, biases, carry, kept), _operand(y, loop.reverse)]
    _run(kernel, c, operands, 0, wide == torch.float64, loop.layout, loop.reverse)
    return y, Pair(*(c.gathered(part) for part in carry)), kept


def loop_backward(
    loop: ChannelLoop, grad: Tensor, grad_final: Pair, kept: Tensor, results: list[Tensor | None]
) -> tuple[Pair | None, Pair]:
    """Fills `results` with the gradients of `_inputs(loop)`; returns those of the bias and the initial state."""
    from gateloop_transformer.ops.backends.numba_loops import loop_backward as build

    c, wide, parts = _shares(loop), loop.wide, loop.parts
    carry = c.spread_state(grad_final, parts, wide)
    sums = [] if loop.bias is None else [torch.zeros_like(_states(loop, kept)[0]) for _ in range(2)]
    biases, grad = _biases(loop), _materialized(grad)
    kernel = build(
        kind_of(loop.queries.dtype),
        kind_of(loop.gates.re.dtype),
        _gate_code(loop),
        loop.swish is not None,
        _strided(*_inputs(loop), grad),
        c.lanes,
    )
    operands = [*_operands(loop, biases, carry, kept), *(_operand(x, loop.reverse) for x in (grad, *results))]
    operands += [_operand(x) for x in sums] if sums else [_operand(None)] * 2
    _run(kernel, c, operands, 3 * parts, wide == torch.float64, loop.layout, loop.reverse, _bits(loop.fraction))
    d_bias = Pair(*(c.gathered(x.sum(0)[None])[0] for x in sums)) if sums else None
    return d_bias, Pair(*(c.gathered(part) for part in carry))


def gate_loop_forward(loop: GateLoop) -> tuple[Tensor, Pair]:
    """Of matrix states."""
    return (chunkwise.gate_loop_forward if loop.per_channel() else numba_matrix.forward)(loop)


def gate_loop_backward(loop: GateLoop, grad: Tensor, grad_final: Pair) -> tuple[Tensor, Tensor, Tensor, Pair, Pair]:
    """Gradients; states before each chunk are computed again."""
    return (chunkwise.gate_loop_backward if loop.per_channel() else numba_matrix.backward)(loop, grad, grad_final)


# ---- RMS norm ---------------------------------------------------------------------------------------------


def _norm_kinds(x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, torch.dtype, int]:
    """Both arguments with their rows in order and in one width, the dtype of the arithmetic, and the lanes."""
    wide = compute_dtype(x.dtype, gamma.dtype)
    double = wide == torch.float64
    if double:
        x, gamma = x.to(wide), gamma.to(wide)
    return x.contiguous(), gamma.contiguous(), wide, 8 if double else 16


def _stored(dtype: torch.dtype, wide: torch.dtype) -> torch.dtype:
    """What kernels whose arithmetic is `wide` read or write for `dtype`."""
    narrow = wide == torch.float32 and dtype in (torch.float32, torch.bfloat16, torch.float16)
    return dtype if narrow else wide


def norm_forward(x: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """The RMS norm of x (..., D) times gamma (D,) or (G, D), in a floating-point type."""
    from gateloop_transformer.ops.backends.numba_launch import launch
    from gateloop_transformer.ops.backends.numba_norm import ROWS
    from gateloop_transformer.ops.backends.numba_norm import norm_forward as build

    x, gamma, wide, lanes = _norm_kinds(x, gamma)
    y = new_memory(x, *x.shape, dtype=_stored(dtype, wide))
    D = x.shape[-1]
    rows = x.numel() // D
    kernel = build(kind_of(x.dtype), kind_of(gamma.dtype), kind_of(y.dtype), lanes)
    launch(kernel, -(-rows // ROWS), [rows, D, gamma.numel() // D, x.data_ptr(), gamma.data_ptr(), y.data_ptr()])
    return y.to(dtype)


def norm_backward(grad: Tensor, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and gamma."""
    from gateloop_transformer.ops.backends.numba_launch import launch
    from gateloop_transformer.ops.backends.numba_norm import ROWS
    from gateloop_transformer.ops.backends.numba_norm import norm_backward as build

    own, (x, gamma, wide, lanes) = (x.dtype, gamma.dtype), _norm_kinds(x, gamma)
    dy, dx = grad.to(_stored(grad.dtype, wide)).contiguous(), new_memory(x, *x.shape)
    D = x.shape[-1]
    rows = x.numel() // D
    items = -(-rows // ROWS)
    sums = torch.zeros(items, gamma.numel(), dtype=wide)
    kernel = build(kind_of(x.dtype), kind_of(gamma.dtype), kind_of(dy.dtype), lanes)
    places = [t.data_ptr() for t in (x, gamma, dx, dy, dx, sums)]
    launch(kernel, items, [rows, D, gamma.numel() // D, *places])
    return dx.to(own[0]), sums.sum(0).reshape(gamma.shape).to(own[1])


# ---- short convolution --------------------------------------------------------------------------------------


def _conv_kinds(inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, torch.dtype, int]:
    """Inputs with their channels in order, weights (taps, D) in the width of the arithmetic, y's dtype, the lanes."""
    dtype = torch.promote_types(inputs.dtype, weight.dtype)
    double = dtype == torch.float64
    x = (inputs.to(dtype) if double else inputs).contiguous()
    return x, weight.t().to(compute_dtype(dtype)).contiguous(), dtype, 8 if double else 16


def conv_forward(inputs: Tensor, weight: Tensor, silu: bool) -> Tensor:
    """The convolution of inputs (B, L, D) by weight (D, taps), through a SiLU if asked for."""
    from gateloop_transformer.ops.backends.numba_conv import STEPS
    from gateloop_transformer.ops.backends.numba_conv import conv_forward as build
    from gateloop_transformer.ops.backends.numba_launch import launch

    x, w, dtype, lanes = _conv_kinds(inputs, weight)
    (B, L, D), taps = x.shape, len(w)
    T = L - taps + 1
    y = new_memory(x, B, T, D, dtype=dtype)
    blocks = -(-T // STEPS)
    kernel = build(kind_of(x.dtype), kind_of(dtype), silu, lanes)
    launch(kernel, B * blocks, [T, D, taps, blocks, x.data_ptr(), w.data_ptr(), y.data_ptr()], y.numel())
    return y


def conv_backward(grad: Tensor, inputs: Tensor, weight: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """Gradients of inputs and weight."""
    from gateloop_transformer.ops.backends.numba_conv import STEPS, conv_inputs, conv_slopes
    from gateloop_transformer.ops.backends.numba_launch import launch

    x, w, dtype, lanes = _conv_kinds(inputs, weight)
    (B, L, D), taps = x.shape, len(w)
    T = L - taps + 1
    dy, dx = grad.to(dtype).contiguous(), new_memory(x, B, L, D)
    slopes = new_memory(x, B, T, D, dtype=w.dtype) if silu else dy
    blocks = -(-T // STEPS)
    sums = torch.zeros(B * blocks, taps, D, dtype=w.dtype)
    places = [t.data_ptr() for t in (x, w, dy, dy, slopes, sums, dx)]
    kernel = conv_slopes(kind_of(x.dtype), kind_of(dtype), silu, lanes)
    launch(kernel, B * blocks, [T, D, taps, blocks, *places], dy.numel())
    blocks = -(-L // STEPS)
    launch(
        conv_inputs(kind_of(x.dtype), kind_of(slopes.dtype), lanes),
        B * blocks,
        [T, D, taps, blocks, *places],
        dy.numel(),
    )
    return dx.to(inputs.dtype), sums.sum(0).t().to(weight.dtype).contiguous()


# ---- gates of several heads -------------------------------------------------------------------------------


def _repeated(bias: Pair | None, heads: int, lanes: int, wide: torch.dtype) -> list[Tensor]:
    """Biases (H,) over again, until a vector may start in the first H."""
    parts = [] if bias is None else bias.parts()
    return [part.to(wide).repeat(-(-(heads + lanes) // heads)) for part in parts]


def _gate_places(parts: list[Tensor], scale: Tensor | None) -> list[int]:
    """Addresses of gates, of their imaginary part (0: none) and of the scale."""
    return [x.data_ptr() if x is not None else 0 for x in (parts[0], parts[1] if len(parts) == 2 else None, scale)]


def gates_forward(projections: Tensor, gate: str, bias: Pair | None, real: bool) -> list[Tensor]:
    """Gates (..., H), real and, unless `real`, imaginary part, and for "ring" the scale of the inputs."""
    from gateloop_transformer.ops.backends import numba_gates as gates
    from gateloop_transformer.ops.backends.numba_launch import launch

    z, wide = projections.contiguous(), compute_dtype(projections.dtype)
    pairs, heads, lanes = z.numel() // 2, z.shape[-1] // 2, 8 if wide == torch.float64 else 16
    results = [new_memory(z, *z.shape[:-1], heads, dtype=wide) for _ in range((1 if real else 2) + (gate == "ring"))]
    scale = results[-1] if gate == "ring" else None
    biases = _repeated(bias, heads, lanes, wide)
    kernel = gates.gates_forward(kind_of(z.dtype), gates.CODES[gate], real, lanes)
    places = [x.data_ptr() for x in biases] if biases else [0, 0]
    places += _gate_places(results[: 1 if real else 2], scale)
    launch(kernel, -(-pairs // gates.PAIRS), [pairs, heads, z.data_ptr(), *places])
    return results


def gates_backward(
    grad: list[Tensor], projections: Tensor, gate: str, bias: Pair | None, real: bool, fraction: float
) -> tuple[Tensor, Pair | None]:
    """Gradients of projections and bias."""
    from gateloop_transformer.ops.backends import numba_gates as gates
    from gateloop_transformer.ops.backends.numba_launch import launch

    z, wide = projections.contiguous(), compute_dtype(projections.dtype)
    pairs, heads, lanes = z.numel() // 2, z.shape[-1] // 2, 8 if wide == torch.float64 else 16
    given = [x.contiguous() for x in grad]
    dz = new_memory(z, *z.shape)
    biases = _repeated(bias, heads, lanes, wide)
    items = -(-pairs // gates.PAIRS)
    sums = torch.zeros(items, 2, biases[0].numel(), dtype=wide) if biases else None
    kernel = gates.gates_backward(kind_of(z.dtype), gates.CODES[gate], real, lanes)
    places = [x.data_ptr() for x in biases] if biases else [0, 0]
    places += [*_gate_places(given[: 1 if real else 2], given[-1] if gate == "ring" else None), dz.data_ptr()]
    places += [0, 0] if sums is None else [sums.data_ptr(), sums.stride(0) * wide.itemsize]
    launch(kernel, items, [pairs, heads, z.data_ptr(), *places, _bits(fraction)])
    if sums is None:
        return dz, None
    return dz, Pair(*(part.sum(0).view(-1, heads).sum(0) for part in sums.unbind(1)))
