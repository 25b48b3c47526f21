"""h[t] = a[t] h[t-1] + x[t], real or complex: contract, checks, gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gateloop_transformer.ops import checks
from gateloop_transformer.ops.carry import Recurrence, Shift, over_ranks, product_over_time
from gateloop_transformer.ops.context_parallel import Ranks, current
from gateloop_transformer.ops.dispatch import FUSED, TABLE, choose
from gateloop_transformer.ops.layout import PLAIN, Layout
from gateloop_transformer.ops.operator import operator
from gateloop_transformer.ops.packing import by_documents, loop_inputs
from gateloop_transformer.ops.pairs import Pair, compute_dtype, split, take


def linear_scan(
    gates: Tensor,
    inputs: Tensor,
    initial: Tensor | None = None,
    *,
    reverse: bool = False,
    resets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """h[t] = a[t] h[t-1] + x[t], every channel on its own.

    Arithmetic is float32 or better whatever the dtype of the arguments. Memory is linear in T. Differentiable
    (once) in every tensor argument, also under `torch.compile`.

    What is not finite at a step reaches only what depends on that step. Rounding adds up where nothing is forgotten: in
    float32 a sum of a million equal numbers at a gate of 1 may be 1 % off, so give it float64.

    Args:
        gates: a (B, T, D), real or complex; any value, 0 (forget all) included.
        inputs: x (B, T, D), real or complex.
        initial: h before the first step (B, D), or of each document (N, D), real or complex; zero when None.
        reverse: run from the last step to the first: h[t] = a[t] h[t+1] + x[t].
        resets: (B, T) booleans: h is cleared before such a step, whatever it was, NaN included; None: never.
        cu_seqlens: (N + 1,) integers from 0 to T, ascending: documents packed in a batch of one row, document n being
            steps cu_seqlens[n] to cu_seqlens[n + 1]; each is computed as if alone, `initial` holds one state for each.
        backend: "auto", or one of `available_backends(inputs)`.

    Returns:
        All states (B, T, D): complex if any argument is, in the precision that gates and inputs promote to.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or no backend has that name.
        NotImplementedError: the backend asked for cannot run these tensors.

    >>> linear_scan(torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1)).flatten().tolist()
    [1.0, 1.5, 1.75]
    """
    layout = checks.scan("linear_scan", gates, inputs, initial, resets, cu_seqlens)
    chosen = choose(backend, inputs.device, inputs.dtype)
    part = split(gates), split(inputs), None if initial is None else split(initial), reverse, chosen, layout
    if (ranks := current()) is not None:
        return _over_ranks(ranks.along(reverse), *part)
    if cu_seqlens is None or chosen in FUSED:
        return _run(*part)
    return _as_rows(*part)


def _run(gates: Pair, inputs: Pair, initial: Pair | None, reverse: bool, backend: str, layout: Layout) -> Tensor:
    a, x, h = gates.parts(), inputs.parts(), [] if initial is None else initial.parts()
    return Pair(*_forward(a, x, h, reverse, backend, *layout)).complex()


def _over_ranks(
    ranks: Ranks, gates: Pair, inputs: Pair, initial: Pair | None, reverse: bool, backend: str, layout: Layout
) -> Tensor:
    """A part of a sequence; the states that are handed on are float32 or better."""
    dtype = torch.promote_types(gates.re.dtype, inputs.re.dtype)
    x = inputs.to(compute_dtype(dtype))
    parts = 2 if any(pair is not None and pair.im is not None for pair in (gates, inputs, initial)) else 1

    def run(start: Pair | None) -> tuple[Tensor, Pair]:
        states = _run(gates, x, start, reverse, backend, layout)
        first = None if start is None else start.complex()
        return states, split(last_states(states, first, reverse, PLAIN))

    def before(grad: Tensor, *gates: Tensor) -> Pair:
        return gradient_before(split(grad), Pair(*gates), reverse, backend, layout.resets)

    part = Recurrence(run, lambda: product_over_time(gates), before, gates.parts(), parts, layout.resets)
    states, _ = over_ranks(ranks, "linear_scan", part, initial)
    return states if states.is_complex() else states.to(dtype)


def gradient_before(grad: Pair, gates: Pair, reverse: bool, backend: str, resets: Tensor | None) -> Pair:
    """The gradient of the state before the first step (B, D), given that of all states (B, T, D)."""
    if not grad.re.shape[1]:
        return grad.map(lambda x: x.new_zeros(x.shape[0], x.shape[2]))
    shift, grad = Shift.of(reverse), grad.conj()
    inputs, later = grad.map(lambda x: x[:, shift.inputs]), gates.map(lambda x: x[:, shift.gates])
    start = grad.select(1, shift.last)
    states = _run(later, inputs, start, not reverse, backend, shift.layout(resets))
    last = split(last_states(states, start.complex(), not reverse, PLAIN))
    return shift.forgotten(gates.select(1, shift.first).times(last).conj(), resets)


def _as_rows(gates: Pair, inputs: Pair, initial: Pair | None, reverse: bool, backend: str, layout: Layout) -> Tensor:
    """Documents as rows of batches."""
    lengths = len(inputs.parts()), len(gates.parts()), layout.resets is not None

    def scan(rows: list[Tensor], start: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        x, a, resets = take(rows, lengths)
        before = Pair(*start) if start else None
        return [_run(Pair(*a), Pair(*x), before, reverse, backend, Layout(*resets))], []

    rows = loop_inputs(*inputs.parts(), gates=gates, resets=layout.resets)
    bounds = layout.bounds(inputs.re.shape[1])
    (states,), _ = by_documents(scan, rows, [] if initial is None else initial.parts(), bounds)
    return states


def last_states(states: Tensor, initial: Tensor | None, reverse: bool, layout: Layout) -> Tensor:
    """The state after the last step of every row or document (B or N, D), from those after all steps (B, T, D)."""
    B, T, D = states.shape
    if T == 0:
        return states.new_zeros(layout.states(B), D) if initial is None else initial.to(states.dtype, copy=True)
    if layout.cu_seqlens is None:
        # A copy: a view would keep all states in memory.
        return states[:, 0 if reverse else -1].clone()
    starts, ends = (part.to(states.device).long() for part in (layout.cu_seqlens[:-1], layout.cu_seqlens[1:]))
    last = states[0, starts.clamp(max=T - 1) if reverse else (ends - 1).clamp(min=0)]
    return torch.where((starts == ends)[:, None], 0 if initial is None else initial.to(states.dtype), last)


def _empty_states(
    gates: Sequence[Tensor], inputs: Sequence[Tensor], initial: Sequence[Tensor], shape: Sequence[int]
) -> list[Tensor]:
    parts = max(len(gates), len(inputs), len(initial))
    dtype = torch.promote_types(gates[0].dtype, inputs[0].dtype)
    # torch has no complex type of half precision that it computes with on every device.
    dtype = compute_dtype(dtype) if parts == 2 else dtype
    return [inputs[0].new_empty(shape, dtype=dtype) for _ in range(parts)]


@operator("linear_scan")
@checks.full_precision
def _forward(
    gates: Sequence[Tensor],
    inputs: Sequence[Tensor],
    initial: Sequence[Tensor],
    reverse: bool,
    backend: str,
    resets: Tensor | None,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    if inputs[0].numel() == 0:
        return _empty_states(gates, inputs, initial, inputs[0].shape)
    start = Pair(*initial) if initial else None
    layout = Layout(resets, cu_seqlens)
    states = TABLE[backend].linear_scan_forward(Pair(*gates), Pair(*inputs), start, reverse, layout)
    return checks.fit(states, _empty_states(gates, inputs, initial, [0]))


@_forward.register_fake
def _(
    gates: Sequence[Tensor],
    inputs: Sequence[Tensor],
    initial: Sequence[Tensor],
    reverse: bool,
    backend: str,
    resets: Tensor | None,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    return _empty_states(gates, inputs, initial, inputs[0].shape)


@operator("linear_scan_backward")
@checks.full_precision
def _backward(
    grad: Sequence[Tensor],
    gates: Sequence[Tensor],
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    initial: Sequence[Tensor],
    reverse: bool,
    backend: str,
    resets: Tensor | None,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    if inputs[0].numel() == 0:
        return checks.no_gradient(*gates, *inputs, *initial)
    start = Pair(*initial) if initial else None
    arguments = Pair(*grad), Pair(*gates), Pair(*inputs), Pair(*states), start, reverse
    d_gates, d_inputs, d_initial = TABLE[backend].linear_scan_backward(*arguments, Layout(resets, cu_seqlens))
    d_start = checks.fit(d_initial, list(initial)) if initial else []
    return [*checks.fit(d_gates, list(gates)), *checks.fit(d_inputs, list(inputs)), *d_start]


@_backward.register_fake
def _(
    grad: Sequence[Tensor],
    gates: Sequence[Tensor],
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    initial: Sequence[Tensor],
    reverse: bool,
    backend: str,
    resets: Tensor | None,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    return checks.no_gradient(*gates, *inputs, *initial)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    gates, xs, initial, *ctx.rest, resets, cu_seqlens = inputs
    ctx.lengths = len(gates), len(xs), len(output), len(initial)
    ctx.save_for_backward(*gates, *xs, *output, *initial, resets, cu_seqlens)


def _gradient(ctx: Any, grad: list[Tensor]) -> tuple[Any, ...]:
    *saved, resets, cu_seqlens = ctx.saved_tensors
    gates, inputs, states, initial = take(saved, ctx.lengths)
    gradients = _backward(grad, gates, inputs, states, initial, *ctx.rest, resets, cu_seqlens)
    return (*take(gradients, (len(gates), len(inputs), len(initial))), None, None, None, None)


_forward.register_autograd(_gradient, _setup)
