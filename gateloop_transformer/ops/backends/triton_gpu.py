"""Triton on GPUs: fills in the kernels' arguments. Elementwise recurrences here, matrix states in `triton_matrix.py`.

B batch, T time, H heads, K key size, V value size, D channels; N documents. Results are the same bits in every run: no
sum depends on the order in which programs happen to run.
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gateloop_transformer.ops.backends import triton_matrix
from gateloop_transformer.ops.backends.triton_launch import interpreted, launch, power, precision
from gateloop_transformer.ops.backends.triton_tuning import fastest
from gateloop_transformer.ops.channels import ChannelLoop
from gateloop_transformer.ops.layout import Layout
from gateloop_transformer.ops.pairs import Pair, compute_dtype, one_width
from gateloop_transformer.ops.recurrences import GateLoop, LinearScan

INSTALL_HINT = "needs Triton, which PyTorch for CUDA and ROCm brings along: pip install triton"
_INSTALLED = importlib.util.find_spec("triton") is not None
# Steps of a tile, forwards and, where more is held in registers, backwards.
_FORWARD = 128
_BACKWARD = 64
# Channels and warps of a tile, the ones to be tried: with these no kernel spills (docs/results/gpu-compile.md). What a
# tile publishes is stored by its first warp, which also sets the flag: AMD's barriers do not wait for others' stores.
_SCAN = ((16, 4), (8, 4))
_LOOP_FORWARD = ((16, 4), (8, 8))
_LOOP_BACKWARD = ((16, 8), (8, 8))
_GIVEN_BACKWARD = ((16, 16), (8, 8))


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Real and complex floating point on CUDA and ROCm devices, which torch calls "cuda" both."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return "runs on CUDA and ROCm GPUs; on the CPU only in Triton's interpreter (TRITON_INTERPRET=1)"
    if not (dtype.is_floating_point or dtype.is_complex) or dtype.itemsize == 1:
        return "needs floating point of 16, 32 or 64 bits, or complex tensors"
    return None if _INSTALLED else INSTALL_HINT


def operand(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """x (B, T, D), its strides of rows and steps; channels are made neighbours where they are not."""
    if x is None:
        return None, 0, 0
    # Inside a tile offsets have 32 bits.
    if (x.stride(-1) != 1 and x.shape[-1] > 1) or x.stride(1) * _FORWARD >= 2**31:
        x = x.contiguous()
    return x, x.stride(0), x.stride(1)


def reads_layout(loop: GateLoop) -> bool:
    """Every gate loop's kernels know resets and documents."""
    return True


def fresh(like: Tensor) -> Tensor:
    """Memory in the shape and dtype of `like`."""
    return like.new_empty(like.shape)


class _Tiles(NamedTuple):
    """How a recurrence over (rows, T, D) is cut up."""

    rows: int
    T: int
    D: int
    steps: int
    channels: int
    warps: int

    @property
    def tiles(self) -> int:
        return -(-self.T // self.steps)

    @property
    def programs(self) -> int:
        """Of one tile."""
        return self.rows * -(-self.D // self.channels)

    @property
    def grid(self) -> tuple[int]:
        return (self.programs * self.tiles,)

    def handed_on(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """What tiles publish, and flags that say they have."""
        from gateloop_transformer.ops.backends.triton_scans import SLOTS

        if self.tiles == 1:
            return None, None
        size = self.programs * self.tiles
        room = x.new_empty(size * SLOTS.value * self.channels, dtype=dtype)
        return room, x.new_zeros(2 * size, dtype=torch.int32)

    def options(self, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "W": precision(dtype),
            "MANY": self.tiles > 1,
            "TT": self.steps,
            "DD": self.channels,
            "warps": self.warps,
        }


def _choices(shape: torch.Size, steps: int, blocks: tuple[tuple[int, int], ...]) -> list[_Tiles]:
    """For tiles of so many steps; small shapes are all of them in one tile."""
    rows, T, D = shape
    cut = min(steps, power(T))
    found = []
    for channels, warps in blocks:
        width = min(channels, power(D))
        found.append(_Tiles(rows, T, D, cut, width, max(1, warps * cut * width // (steps * channels))))
    return list(dict.fromkeys(found)) if cut == steps else found[:1]


def _launch(
    kernel: Any, choices: list[_Tiles], like: Tensor, wide: torch.dtype, arguments: list[Any], **constants: Any
) -> None:
    """A kernel over all tiles, in the fastest of the given sizes."""

    def run(tiles: _Tiles) -> None:
        handed_on, sizes = tiles.handed_on(like, wide), (tiles.T, tiles.D, tiles.rows)
        launch(kernel, tiles.grid, *arguments, *handed_on, *sizes, like=like, **constants, **tiles.options(wide))

    rows, T, D = choices[0][:3]
    sizes = tuple((tiles.steps, tiles.channels, tiles.warps) for tiles in choices)
    shapes = power(rows), power(T), power(D), like.dtype, wide, tuple(constants.items()), sizes
    run(fastest(kernel.__name__, shapes, choices, run, like))


class _Marks(NamedTuple):
    """Where states are cleared (B, T), and of which document a step in memory is the first and the last (T,)."""

    resets: Tensor | None
    begins: Tensor | None
    ends: Tensor | None


def _marks(layout: Layout, x: Tensor, reverse: bool) -> _Marks:
    """Of a batch x (B, T, D). No number is read back from the device for it; `cu_seqlens` may be elsewhere."""
    resets = None if layout.resets is None else layout.resets.contiguous().view(torch.uint8)
    if layout.cu_seqlens is None:
        return _Marks(resets, None, None)
    T, bounds = x.shape[1], layout.cu_seqlens.to(x.device).long()
    empty = bounds[1:] == bounds[:-1]
    numbers = torch.arange(len(empty), dtype=torch.int32, device=bounds.device)
    places = bounds[:-1], bounds[1:] - 1
    marks = []
    for place in places[::-1] if reverse else places:
        # Documents without steps are marked past the end.
        mark = torch.full((T + 1,), -1, dtype=torch.int32, device=bounds.device)
        marks.append(mark.scatter_(0, place.masked_fill(empty, T), numbers)[:T])
    return _Marks(resets, *marks)


def _states(layout: Layout, given: Pair | None, parts: int, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """States (N, D) of a recurrence over x (B, T, D) for a kernel to fill in.

    It does so where there are steps: documents without any have those given, or 0.
    """
    shape = layout.states(x.shape[0]), x.shape[2]
    if layout.cu_seqlens is None:
        return [x.new_empty(shape, dtype=dtype) for _ in range(parts)]
    states = [x.new_zeros(shape, dtype=dtype) for _ in range(parts)]
    for state, part in zip(states, [] if given is None else given.parts(), strict=False):
        state.copy_(part)
    return states


def _pointers(state: Pair | list[Tensor] | None) -> list[Tensor | None]:
    """Both parts, None for one that is not there."""
    parts = [] if state is None else list(state)
    return [None if part is None else part.contiguous() for part in [*parts, None, None][:2]]


# ---- h[t] = a[t] h[t-1] + x[t] ----------------------------------------------------------------------------


def linear_scan_forward(scan: LinearScan) -> Pair:
    """h[t] = a[t] h[t-1] + x[t]."""
    from gateloop_transformer.ops.backends.triton_scans import scan_forward

    gates, inputs, initial, reverse, _, layout = scan
    gates, inputs = one_width(gates, inputs)
    parts = scan.parts()
    dtype = torch.promote_types(gates.re.dtype, inputs.re.dtype)
    wide = compute_dtype(dtype)
    x = inputs.re
    states = [x.new_empty(x.shape, dtype=wide if parts == 2 else dtype) for _ in range(parts)]
    marks = _marks(layout, x, reverse)
    operands = [operand(part) for part in (gates.re, gates.im, x, inputs.im, *Pair(*states))]
    arguments = [*operands, *_pointers(initial), marks.resets, marks.begins]
    choices = _choices(x.shape, _FORWARD, _SCAN)
    _launch(scan_forward, choices, x, wide, arguments, COMPLEX=parts == 2, REVERSE=reverse)
    return Pair(*states)


def linear_scan_backward(scan: LinearScan, states: Pair, grad: Pair) -> tuple[Pair, Pair, Pair]:
    """One pass against the order of the first."""
    from gateloop_transformer.ops.backends.triton_scans import scan_backward

    gates, inputs, initial, reverse, _, layout = scan
    gates, inputs, grad, states = one_width(gates, inputs, grad, states)
    wide = compute_dtype(gates.re.dtype, inputs.re.dtype)
    x, parts = inputs.re, len(states.parts())
    d_gates, d_inputs = (pair.map(lambda part: part.new_empty(part.shape)) for pair in (gates, inputs))
    d_initial = _states(layout, None, parts, x, wide)
    marks = _marks(layout, x, reverse)
    read = [operand(part) for pair in (grad, gates, states) for part in pair]
    written = [operand(part) for pair in (d_gates, d_inputs) for part in pair]
    arguments = [*read, *_pointers(initial), *written, *_pointers(d_initial), marks.resets, marks.begins]
    choices = _choices(x.shape, _BACKWARD, _SCAN)
    _launch(scan_backward, choices, x, wide, arguments, COMPLEX=parts == 2, REVERSE=reverse)
    return d_gates, d_inputs, Pair(*d_initial)


# ---- the gate loop at head size 1 -------------------------------------------------------------------------


def _gate_code(loop: ChannelLoop) -> int:
    """The kernels' number of the gate."""
    from gateloop_transformer.ops.backends import triton_gates as gates

    if loop.gate == "given":
        return int((gates.GIVEN_REAL if loop.gates.im is None else gates.GIVEN_COMPLEX).value)
    return gates.CODES[loop.gate]


def _projections(gates: Pair, gate: str) -> tuple[list[tuple[Tensor | None, int, int]], bool]:
    """Operands, and whether the first has pairs, neighbours in memory."""
    re, im = gates
    if gate == "sigmoid" or (gate == "given" and im is None):
        return [operand(re), operand(None)], False
    if im is None:
        return [operand(re), operand(None)], True
    interleaved = re.stride() == im.stride() and re.stride(-1) == 2 and im.data_ptr() - re.data_ptr() == re.itemsize
    if interleaved:
        return [(re, re.stride(0), re.stride(1)), operand(None)], True
    return [operand(re), operand(im)], False


def loop_kept(loop: ChannelLoop) -> Tensor:
    """Room for the state before each tile and for the initial states.

    Its size may be symbolic: no decision here may depend on B or T.
    """
    B, T, D = loop.queries.shape
    states = B * ((T + _BACKWARD - 1) // _BACKWARD) + loop.layout.states(B)
    # Flat: a dimension that may be 1 would tie a traced program to it.
    return loop.queries.new_empty(loop.parts * states * D, dtype=loop.wide)


def _kept_states(loop: ChannelLoop, kept: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Those before tiles (parts, rows · tiles, D), and parts of the initial ones (N, D)."""
    B, T, D = loop.queries.shape
    before = loop.parts * B * -(-T // _BACKWARD)
    states = kept.view(-1, D)
    return states[:before], list(states[before:].view(loop.parts, -1, D))


def _biases(loop: ChannelLoop) -> list[Tensor | None]:
    if loop.bias is None:
        return [None, None]
    return [part.to(loop.wide).contiguous() for part in loop.bias.parts()]


def loop_forward(loop: ChannelLoop, initial: Pair | None) -> tuple[Tensor, Pair, Tensor]:
    """y (B, T, D), the last states (N, D), and what is kept."""
    from gateloop_transformer.ops.backends.triton_loops import loop_forward as kernel

    wide, x = loop.wide, loop.queries
    kept, y = loop_kept(loop), x.new_empty(x.shape)
    before, starts = _kept_states(loop, kept)
    final = _states(loop.layout, initial, loop.parts, x, wide)
    gates, pairs = _projections(loop.gates, loop.gate)
    arguments = [
        *(operand(part) for part in (x, loop.keys, loop.values)),
        *gates,
        operand(loop.swish),
        operand(y),
        *_biases(loop),
        *_pointers(initial),
        *_pointers(final),
        *_pointers(starts),
        before,
        *_marks(loop.layout, x, loop.reverse),
    ]
    constants = {"KEPT": _BACKWARD, "GATE": _gate_code(loop), "PAIRS": pairs, "REVERSE": loop.reverse}
    _launch(kernel, _choices(x.shape, _FORWARD, _LOOP_FORWARD), x, wide, arguments, **constants)
    return y, Pair(*final), kept


def loop_backward(
    loop: ChannelLoop, grad: Tensor, grad_final: Pair, kept: Tensor, results: list[Tensor | None]
) -> tuple[Pair | None, Pair]:
    """Fills gradients of queries, keys, values, gates (two parts) and SiLU gate; returns those of bias and states."""
    from gateloop_transformer.ops.backends.triton_loops import loop_backward as kernel

    wide, x = loop.wide, loop.queries
    choices = _choices(x.shape, _BACKWARD, _GIVEN_BACKWARD if loop.gate == "given" else _LOOP_BACKWARD)
    before, starts = _kept_states(loop, kept)
    d_initial = _states(loop.layout, grad_final, loop.parts, x, wide)
    gates, pairs = _projections(loop.gates, loop.gate)
    sums = None if loop.bias is None else x.new_empty(x.shape[0] * choices[0].tiles, 2, x.shape[2], dtype=wide)
    arguments = [
        *(operand(part) for part in (x, loop.keys, loop.values)),
        *gates,
        *(operand(part) for part in (loop.swish, grad, *results)),
        *_biases(loop),
        sums,
        *_pointers(starts),
        *_pointers(grad_final),
        *_pointers(d_initial),
        before,
        *_marks(loop.layout, x, loop.reverse),
    ]
    constants = {"FRACTION": loop.fraction, "GATE": _gate_code(loop), "PAIRS": pairs, "REVERSE": loop.reverse}
    _launch(kernel, choices, x, wide, arguments, **constants)
    return None if sums is None else Pair(sums[:, 0].sum(0), sums[:, 1].sum(0)), Pair(*d_initial)


def _as_wide(loop: GateLoop) -> GateLoop:
    """With inputs in float64 if the gates are."""
    if loop.gates.re.dtype != torch.float64:
        return loop
    q, k, v = (x.double() for x in loop[:3])
    return loop._replace(queries=q, keys=k, values=v)


def gate_loop_forward(loop: GateLoop) -> tuple[Tensor, Pair]:
    """Of matrix states."""
    y, final = triton_matrix.forward(_as_wide(loop))
    return y.to(loop.queries.dtype), final


def gate_loop_backward(loop: GateLoop, grad: Tensor, grad_final: Pair) -> tuple[Tensor, Tensor, Tensor, Pair, Pair]:
    """Gradients; states before each chunk are computed again."""
    wide = _as_wide(loop)
    dy = grad if wide is loop else grad.double()
    return triton_matrix.backward(wide, dy, grad_final)


# ---- gates of several heads, RMS norm, short convolution ----------------------------------------------------


def _gate_blocks(projections: Tensor) -> tuple[int, int, int, dict[str, int]]:
    """Rows, heads, blocks of rows, and block sizes."""
    heads = projections.shape[-1] // 2
    rows = projections.numel() // (2 * heads)
    width = min(64, power(heads))
    size = min(512 // width, power(rows))
    return rows, heads, -(-rows // size), {"RR": size, "HH": width, "warps": max(1, size * width // 128)}


def gates_forward(projections: Tensor, gate: str, bias: Pair | None, real: bool) -> list[Tensor]:
    """Gates (..., H), real and, unless `real`, imaginary part, and for "ring" the scale of the inputs."""
    from gateloop_transformer.ops.backends import triton_gates as gates

    z, wide = projections.contiguous(), compute_dtype(projections.dtype)
    rows, heads, blocks, options = _gate_blocks(z)
    ring = gate == "ring"
    results = [z.new_empty((*z.shape[:-1], heads), dtype=wide) for _ in range((1 if real else 2) + ring)]
    biases = [None, None] if bias is None else [part.to(wide).contiguous() for part in bias.parts()]
    places = [results[0], None if real else results[1], results[-1] if ring else None]
    launch(
        gates.gates_forward,
        (blocks * -(-heads // options["HH"]),),
        z,
        *biases,
        *places,
        rows,
        heads,
        GATE=gates.CODES[gate],
        REAL=real,
        W=precision(wide),
        like=z,
        **options,
    )
    return results


def gates_backward(
    grad: list[Tensor], projections: Tensor, gate: str, bias: Pair | None, real: bool, fraction: float
) -> tuple[Tensor, Pair | None]:
    """Gradients of projections and bias."""
    from gateloop_transformer.ops.backends import triton_gates as gates

    z, wide = projections.contiguous(), compute_dtype(projections.dtype)
    rows, heads, blocks, options = _gate_blocks(z)
    ring, given = gate == "ring", [x.contiguous() for x in grad]
    dz = torch.empty_like(z)
    biases = [None, None] if bias is None else [part.to(wide).contiguous() for part in bias.parts()]
    sums = z.new_empty((blocks, 2, heads), dtype=wide) if ring else None
    places = [given[0], None if real else given[1], given[-1] if ring else None]
    options |= {"GATE": gates.CODES[gate], "REAL": real}
    launch(
        gates.gates_backward,
        (blocks * -(-heads // options["HH"]),),
        z,
        *biases,
        *places,
        dz,
        sums,
        rows,
        heads,
        FRACTION=fraction,
        W=precision(wide),
        like=z,
        **options,
    )
    return dz, None if sums is None else Pair(sums[:, 0].sum(0), sums[:, 1].sum(0))


def norm_forward(x: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """The RMS norm of x (..., D) times gamma (D,) or (G, D), in a floating-point type."""
    from gateloop_transformer.ops.backends import triton_norm

    return triton_norm.norm_forward(x, gamma, dtype)


def norm_backward(grad: Tensor, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and gamma."""
    from gateloop_transformer.ops.backends import triton_norm

    return triton_norm.norm_backward(grad, x, gamma)


def conv_forward(inputs: Tensor, weight: Tensor, silu: bool) -> Tensor:
    """The convolution of inputs (B, L, D) by weight (D, taps), through a SiLU if asked for."""
    from gateloop_transformer.ops.backends import triton_conv

    return triton_conv.conv_forward(inputs, weight, silu)


def conv_backward(grad: Tensor, inputs: Tensor, weight: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """Gradients of inputs and weight."""
    from gateloop_transformer.ops.backends import triton_conv

    return triton_conv.conv_backward(grad, inputs, weight, silu)
