"""h[t] = a[t] h[t-1] + x[t] for real gates in [0, 1], forward in log space after Heinsen (2023)."""

import torch
from torch import Tensor

from gateloop_transformer.ops import checks
from gateloop_transformer.ops.associative_scan import Elements, associative_scan
from gateloop_transformer.ops.context_parallel import refuse
from gateloop_transformer.ops.dispatch import TABLE, choose
from gateloop_transformer.ops.operator import Gradient, Operator
from gateloop_transformer.ops.packing import as_rows, cleared
from gateloop_transformer.ops.pairs import Pair, compute_dtype
from gateloop_transformer.ops.plain import plain_scan
from gateloop_transformer.ops.recurrences import LinearScan


def heinsen_scan(
    gates: Tensor,
    inputs: Tensor,
    initial: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """h[t] = a[t] h[t-1] + x[t] with every product and sum carried as a logarithm.

    States far below the smallest float on the way to representable ones survive; nothing else is gained over
    `linear_scan`, which is faster and more accurate. Positive and negative inputs are summed apart, each as the
    logarithm of a sum of exponentials; stretches are combined in a tree, so no large running total is ever
    subtracted and gates and inputs of exactly 0 are exact. The gradient is the recurrence's own, exact there too.

    Digits are lost in two places: a logarithm of size L costs a relative error of L·eps, and where positive and
    negative parts cancel the error is relative to the parts, not to their difference.

    Args:
        gates: a (B, T, D), real, in [0, 1].
        inputs: x (B, T, D), real.
        initial: h before the first step (B, D), or of each document (N, D); zero when None.
        resets: (B, T) booleans: h is cleared before such a step, whatever it was, NaN included; None: never.
        cu_seqlens: (N + 1,) integers from 0 to T, ascending: documents packed in one row, as in `linear_scan`.

    Returns:
        All states (B, T, D), computed in float32 or better, in the dtype that gates and inputs promote to. A gate
        outside [0, 1] gives NaN from there on if negative; above 1 it is computed like any other.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Source: F. A. Heinsen, Efficient Parallelization of a Ubiquitous Sequential Computation (2023), arXiv 2311.06281.

    >>> heinsen_scan(torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1)).flatten()
    tensor([1.0000, 1.5000, 1.7500])
    """
    refuse("heinsen_scan", "linear_scan gives the same states")
    layout = checks.scan("heinsen_scan", gates, inputs, initial, resets, cu_seqlens)
    checks.floating("heinsen_scan", ("gates", "inputs", "initial"), gates=gates, inputs=inputs, initial=initial)
    scan = LinearScan(Pair(gates), Pair(inputs), None if initial is None else Pair(initial), layout=layout)
    (states,) = _scan(scan) if cu_seqlens is None else as_rows(scan, _scan)
    return states


def _combine(left: Elements, right: Elements) -> Elements:
    """log a₁a₂, and log(a₂x₁ + x₂) for the positive and for the negative part."""
    gate, *sums = right
    combined = [torch.logaddexp(gate + earlier, later) for earlier, later in zip(left[1:], sums, strict=True)]
    return (left[0] + gate, *combined)


def _combine_marked(left: Elements, right: Elements) -> Elements:
    """The same, with whether a stretch begins anew on its way last: then nothing is left of what precedes it."""
    anew = right[-1]
    combined = _combine(left[:-1], right[:-1])
    kept = [torch.where(anew, later, both) for later, both in zip(right[:-1], combined, strict=True)]
    return (*kept, left[-1] | anew)


def _results(scan: LinearScan) -> list[Tensor]:
    """Empty states."""
    x = scan.inputs.re
    return [x.new_empty(x.shape, dtype=torch.promote_types(scan.gates.re.dtype, x.dtype))]


def _forward(scan: LinearScan) -> list[Tensor]:
    if not scan.inputs.re.numel():
        return _results(scan)
    (a, _), (x, _), initial, *_, (resets, _) = scan
    dtype, own = compute_dtype(a.dtype, x.dtype), torch.promote_types(a.dtype, x.dtype)
    a, x = a.to(dtype), x.to(dtype)
    if initial is not None:
        first = cleared(Pair(a[:, 0] * initial.re.to(dtype)), None if resets is None else resets[:, 0]).re
        x = torch.cat([x[:, :1] + first.unsqueeze(1), x[:, 1:]], 1)
    elements = a.log(), x.clamp(min=0).log(), (-x).clamp(min=0).log()
    if resets is None:
        _, positive, negative = associative_scan(_combine, elements)
    else:
        _, positive, negative, _ = associative_scan(_combine_marked, (*elements, resets.unsqueeze(-1)))
    return [(positive.exp() - negative.exp()).to(own)]


def _backward(scan: LinearScan, states: list[Tensor], grad: list[Tensor]) -> tuple[Gradient, ...]:
    x = scan.inputs.re
    if not x.numel():
        return None, None, None
    return TABLE[choose("auto", x.device, x.dtype)].linear_scan_backward(scan, Pair(*states), Pair(*grad))


_scan = Operator(
    "heinsen_scan",
    LinearScan,
    results=_results,
    forward=_forward,
    backward=_backward,
    plain=lambda scan: checks.fit(plain_scan(scan), _results(scan)),
    saved=slice(None),
    rows=lambda scan: True,
)
