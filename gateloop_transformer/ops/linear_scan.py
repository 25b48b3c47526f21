"""h[t] = a[t] h[t-1] + x[t], real or complex: contract, checks, gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gateloop_transformer.ops import checks
from gateloop_transformer.ops.dispatch import TABLE, choose, direct
from gateloop_transformer.ops.pairs import Pair, compute_dtype, split, take


def linear_scan(
    gates: Tensor,
    inputs: Tensor,
    initial: Tensor | None = None,
    *,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """h[t] = a[t] h[t-1] + x[t], every channel on its own.

    Arithmetic is float32 or better whatever the dtype of the arguments. Memory is linear in T. Differentiable
    (once) in every tensor argument, also under `torch.compile`.

    Args:
        gates: a (B, T, D), real or complex; any value, 0 (forget all) included.
        inputs: x (B, T, D), real or complex.
        initial: h before the first step (B, D), real or complex; zero when None.
        reverse: run from the last step to the first: h[t] = a[t] h[t+1] + x[t].
        backend: "auto", or one of `available_backends(inputs)`.

    Returns:
        All states (B, T, D): complex if any argument is, in the precision that gates and inputs promote to.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or no backend has that name.
        NotImplementedError: the backend asked for cannot run these tensors.

    >>> linear_scan(torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1)).flatten().tolist()
    [1.0, 1.5, 1.75]
    """
    checks.scan("linear_scan", gates, inputs, initial)
    chosen = choose(backend, inputs.device, inputs.dtype)
    h = [] if initial is None else split(initial).parts()
    a, x = split(gates).parts(), split(inputs).parts()
    forward = _compute if direct(*a, *x, *h) else _forward
    return Pair(*forward(a, x, h, reverse, chosen)).complex()


def _empty_states(
    gates: Sequence[Tensor], inputs: Sequence[Tensor], initial: Sequence[Tensor], shape: Sequence[int]
) -> list[Tensor]:
    parts = max(len(gates), len(inputs), len(initial))
    dtype = torch.promote_types(gates[0].dtype, inputs[0].dtype)
    # torch has no complex type of half precision that it computes with on every device.
    dtype = compute_dtype(dtype) if parts == 2 else dtype
    return [inputs[0].new_empty(shape, dtype=dtype) for _ in range(parts)]


@checks.full_precision
def _compute(
    gates: Sequence[Tensor], inputs: Sequence[Tensor], initial: Sequence[Tensor], reverse: bool, backend: str
) -> list[Tensor]:
    if inputs[0].numel() == 0:
        return _empty_states(gates, inputs, initial, inputs[0].shape)
    start = Pair(*initial) if initial else None
    states = TABLE[backend].linear_scan_forward(Pair(*gates), Pair(*inputs), start, reverse)
    return checks.fit(states, _empty_states(gates, inputs, initial, [0]))


_forward = torch.library.custom_op("gateloop::linear_scan", mutates_args=())(_compute)


@_forward.register_fake
def _(
    gates: Sequence[Tensor], inputs: Sequence[Tensor], initial: Sequence[Tensor], reverse: bool, backend: str
) -> list[Tensor]:
    return _empty_states(gates, inputs, initial, inputs[0].shape)


@torch.library.custom_op("gateloop::linear_scan_backward", mutates_args=())
@checks.full_precision
def _backward(
    grad: Sequence[Tensor],
    gates: Sequence[Tensor],
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    initial: Sequence[Tensor],
    reverse: bool,
    backend: str,
) -> list[Tensor]:
    if inputs[0].numel() == 0:
        return checks.no_gradient(*gates, *inputs, *initial)
    start = Pair(*initial) if initial else None
    d_gates, d_inputs, d_initial = TABLE[backend].linear_scan_backward(
        Pair(*grad), Pair(*gates), Pair(*inputs), Pair(*states), start, reverse
    )
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
) -> list[Tensor]:
    return checks.no_gradient(*gates, *inputs, *initial)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    gates, xs, initial, ctx.reverse, ctx.backend = inputs
    ctx.lengths = len(gates), len(xs), len(output), len(initial)
    ctx.save_for_backward(*gates, *xs, *output, *initial)


def _gradient(ctx: Any, grad: list[Tensor]) -> tuple[Any, ...]:
    gates, inputs, states, initial = take(ctx.saved_tensors, ctx.lengths)
    gradients = _backward(grad, gates, inputs, states, initial, ctx.reverse, ctx.backend)
    return (*take(gradients, (len(gates), len(inputs), len(initial))), None, None)


_forward.register_autograd(_gradient, setup_context=_setup)
