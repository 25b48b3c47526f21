"""h[t] = a[t] h[t-1] + x[t] for real gates in [0, 1], forward in log space after Heinsen (2023)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gateloop_transformer.ops import checks
from gateloop_transformer.ops.associative_scan import Elements, associative_scan
from gateloop_transformer.ops.context_parallel import refuse
from gateloop_transformer.ops.dispatch import TABLE, choose
from gateloop_transformer.ops.operator import operator
from gateloop_transformer.ops.packing import by_documents, cleared
from gateloop_transformer.ops.pairs import Pair, compute_dtype, take


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
        resets: (B, T) booleans: h is cleared before such a step (its gate counts as 0); None: never.
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
    gates, start = cleared(Pair(gates), resets).re, [] if initial is None else [initial]
    if cu_seqlens is None:
        result: Tensor = _forward(gates, inputs, start)
        return result
    bounds = layout.bounds(inputs.shape[1])
    (states,), _ = by_documents(
        lambda rows, first: ([_forward(*rows, first)], []), [(gates, 1), (inputs, 0)], start, bounds
    )
    return states


def _combine(left: Elements, right: Elements) -> Elements:
    """log a₁a₂, and log(a₂x₁ + x₂) for the positive and for the negative part."""
    gate, *sums = right
    combined = [torch.logaddexp(gate + earlier, later) for earlier, later in zip(left[1:], sums, strict=True)]
    return (left[0] + gate, *combined)


@operator("heinsen_scan")
@checks.full_precision
def _forward(gates: Tensor, inputs: Tensor, initial: Sequence[Tensor]) -> Tensor:
    dtype = compute_dtype(gates.dtype, inputs.dtype)
    out_dtype = torch.promote_types(gates.dtype, inputs.dtype)
    if inputs.numel() == 0:
        return inputs.new_empty(inputs.shape, dtype=out_dtype)
    a, x = gates.to(dtype), inputs.to(dtype)
    if initial:
        first = torch.addcmul(x[:, :1], a[:, :1], initial[0].to(dtype).unsqueeze(1))
        x = torch.cat([first, x[:, 1:]], 1)
    positive, negative = x.clamp(min=0).log(), (-x).clamp(min=0).log()
    _, positive, negative = associative_scan(_combine, (a.log(), positive, negative))
    return (positive.exp() - negative.exp()).to(out_dtype)


@_forward.register_fake
def _(gates: Tensor, inputs: Tensor, initial: Sequence[Tensor]) -> Tensor:
    return inputs.new_empty(inputs.shape, dtype=torch.promote_types(gates.dtype, inputs.dtype))


@operator("heinsen_scan_backward")
@checks.full_precision
def _backward(grad: Tensor, gates: Tensor, inputs: Tensor, states: Tensor, initial: Sequence[Tensor]) -> list[Tensor]:
    if inputs.numel() == 0:
        return checks.no_gradient(gates, inputs, *initial)
    start = Pair(initial[0]) if initial else None
    gradients = TABLE[choose("auto", inputs.device, inputs.dtype)].linear_scan_backward(
        Pair(grad), Pair(gates), Pair(inputs), Pair(states), start, False
    )
    arguments = [gates, inputs, *initial]
    return [
        part
        for gradient, argument in zip(gradients, arguments, strict=False)
        for part in checks.fit(gradient, [argument])
    ]


@_backward.register_fake
def _(grad: Tensor, gates: Tensor, inputs: Tensor, states: Tensor, initial: Sequence[Tensor]) -> list[Tensor]:
    return checks.no_gradient(gates, inputs, *initial)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gates, xs, initial = inputs
    ctx.lengths = 1, 1, 1, len(initial)
    ctx.save_for_backward(gates, xs, output, *initial)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (gates,), (inputs,), (states,), initial = take(ctx.saved_tensors, ctx.lengths)
    d_gates, d_inputs, *d_initial = _backward(grad, gates, inputs, states, initial)
    return d_gates, d_inputs, d_initial


_forward.register_autograd(_gradient, _setup)
