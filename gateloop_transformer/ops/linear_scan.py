"""h[t] = a[t] h[t-1] + x[t], real or complex: contract, checks, gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gateloop_transformer.ops import checks
from gateloop_transformer.ops.carry import Recurrence, Shift, over_ranks, product_over_time
from gateloop_transformer.ops.context_parallel import Ranks, current
from gateloop_transformer.ops.dispatch import FUSED, TABLE, choose
from gateloop_transformer.ops.layout import PLAIN
from gateloop_transformer.ops.operator import Gradient, Operator
from gateloop_transformer.ops.packing import as_rows
from gateloop_transformer.ops.pairs import Pair, compute_dtype, split
from gateloop_transformer.ops.plain import plain_scan
from gateloop_transformer.ops.recurrences import LinearScan, last_states


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
    in every tensor argument, also under `torch.compile` (once) and by `torch.func`.

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
    start = None if initial is None else split(initial)
    scan = LinearScan(split(gates), split(inputs), start, reverse, chosen, layout)
    if (ranks := current()) is not None:
        return _over_ranks(ranks.along(reverse), scan)
    if cu_seqlens is None or chosen in FUSED:
        return _run(scan)
    return Pair(*as_rows(scan, _scan)).complex()


def _run(scan: LinearScan) -> Tensor:
    return Pair(*_scan(scan)).complex()


def _over_ranks(ranks: Ranks, scan: LinearScan) -> Tensor:
    """A part of a sequence; the states that are handed on are float32 or better."""
    gates, inputs, initial, reverse, backend, layout = scan
    dtype = torch.promote_types(gates.re.dtype, inputs.re.dtype)
    wide = scan._replace(inputs=inputs.to(compute_dtype(dtype)))

    def run(start: Pair | None) -> tuple[Tensor, Pair]:
        states = _run(wide._replace(initial=start))
        first = None if start is None else start.complex()
        return states, split(last_states(states, first, reverse, PLAIN))

    def before(grad: Tensor, *gates: Tensor) -> Pair:
        return gradient_before(split(grad), Pair(*gates), reverse, backend, layout.resets)

    part = Recurrence(run, lambda: product_over_time(gates), before, gates.parts(), scan.parts(), layout.resets)
    states, _ = over_ranks(ranks, "linear_scan", part, initial)
    return states if states.is_complex() else states.to(dtype)


def gradient_before(grad: Pair, gates: Pair, reverse: bool, backend: str, resets: Tensor | None) -> Pair:
    """The gradient of the state before the first step (B, D), given that of all states (B, T, D)."""
    if not grad.re.shape[1]:
        return grad.map(lambda x: x.new_zeros(x.shape[0], x.shape[2]))
    shift, grad = Shift.of(reverse), grad.conj()
    inputs, later = grad.map(lambda x: x[:, shift.inputs]), gates.map(lambda x: x[:, shift.gates])
    start = grad.select(1, shift.last)
    states = _run(LinearScan(later, inputs, start, not reverse, backend, shift.layout(resets)))
    last = split(last_states(states, start.complex(), not reverse, PLAIN))
    return shift.forgotten(gates.select(1, shift.first).times(last).conj(), resets)


def _empty(scan: LinearScan, shape: Sequence[int]) -> list[Tensor]:
    """Empty tensors in the dtypes of the states' parts."""
    parts, x = scan.parts(), scan.inputs.re
    dtype = torch.promote_types(scan.gates.re.dtype, x.dtype)
    # torch has no complex type of half precision that it computes with on every device.
    dtype = compute_dtype(dtype) if parts == 2 else dtype
    return [x.new_empty(shape, dtype=dtype) for _ in range(parts)]


def _results(scan: LinearScan) -> list[Tensor]:
    """Empty states."""
    return _empty(scan, scan.inputs.re.shape)


def _forward(scan: LinearScan) -> list[Tensor]:
    if not scan.inputs.re.numel():
        return _results(scan)
    return checks.fit(TABLE[scan.backend].linear_scan_forward(scan), _empty(scan, [0]))


def _backward(scan: LinearScan, states: list[Tensor], grad: list[Tensor]) -> tuple[Gradient, ...]:
    if not scan.inputs.re.numel():
        return None, None, None
    return TABLE[scan.backend].linear_scan_backward(scan, Pair(*states), Pair(*grad))


_scan = Operator(
    "linear_scan",
    LinearScan,
    results=_results,
    forward=_forward,
    backward=_backward,
    plain=lambda scan: checks.fit(plain_scan(scan), _empty(scan, [0])),
    saved=slice(None),
    rows=lambda scan: scan.layout.cu_seqlens is None,
)
