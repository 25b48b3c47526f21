"""S[t] = a[t] S[t-1] + k[t] ⊗ v[t], y[t] = Re(q[t]ᵀ S[t]): contract, checks, gradient."""

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from gateloop_transformer.ops import checks
from gateloop_transformer.ops.dispatch import TABLE, choose, direct
from gateloop_transformer.ops.pairs import Pair, compute_dtype, split, take

RealPair = tuple[Tensor, Tensor]


@overload
def gate_loop(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    initial: Tensor | None = None,
    *,
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
def gate_loop(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: RealPair,
    initial: RealPair | None = None,
    *,
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, RealPair]: ...


def gate_loop(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor | RealPair,
    initial: Tensor | RealPair | None = None,
    *,
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | RealPair]:
    """S[t] = a[t] S[t-1] + k[t] ⊗ v[t], y[t] = Re(q[t]ᵀ S[t]): the operator of GateLoop.

    Gate and state arithmetic is float32 or better whatever the dtype of the arguments. No state is kept per
    step when K or V exceeds 1; memory is linear in T. Differentiable (once) in every tensor argument and through
    both results, also under `torch.compile`.

    Args:
        queries: q (B, T, H, K).
        keys: k (B, T, H, K).
        values: v (B, T, H, V).
        gates: a, one per head (B, T, H) or one per key channel (B, T, H, K); real, complex, or a tuple
            (real part, imaginary part) of real tensors. Any value, 0 (forget all) included.
        initial: S before the first step (B, H, K, V), a tuple where `gates` is one; zero when None.
        reverse: run from the last step to the first.
        backend: "auto", or one of `available_backends(queries)`.

    Returns:
        y (B, T, H, V) in the queries' dtype, and S after the last step (B, H, K, V) in float32 or better:
        complex if the gates or `initial` are, a tuple (real, imaginary) if `gates` is one.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or no backend has that name.
        NotImplementedError: the backend asked for cannot run these tensors.

    Source: T. Katsch, GateLoop (2023), arXiv 2311.01927, equations 3 to 7.

    >>> ones = torch.ones(1, 3, 1, 1)
    >>> y, final = gate_loop(ones, ones, ones, torch.full((1, 3, 1), 0.5))
    >>> y.flatten().tolist(), final.item()
    ([1.0, 1.5, 1.75], 1.75)
    """
    a, start = split(gates), None if initial is None else split(initial)
    checks.gate_loop("gate_loop", queries, keys, values, a, start)
    if isinstance(gates, tuple) != isinstance(initial, tuple) and initial is not None:
        raise ValueError("gate_loop: gates and initial must both be tensors or both be tuples (real, imaginary)")
    chosen = choose(backend, queries.device, queries.dtype)
    forward = (
        _compute if direct(queries, keys, values, *a.parts(), *([] if start is None else start.parts())) else _forward
    )
    y, *final = forward(queries, keys, values, a.parts(), [] if start is None else start.parts(), reverse, chosen)
    if isinstance(gates, tuple):
        return y, (final[0], final[1])
    return y, Pair(*final).complex()


def _empty_final(queries: Tensor, values: Tensor, gates: Sequence[Tensor], initial: Sequence[Tensor]) -> list[Tensor]:
    B, _, H, K = queries.shape
    dtype = compute_dtype(queries.dtype, gates[0].dtype)
    return [queries.new_empty((B, H, K, values.shape[-1]), dtype=dtype) for _ in range(max(len(gates), len(initial)))]


@checks.full_precision
def _compute(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Sequence[Tensor],
    initial: Sequence[Tensor],
    reverse: bool,
    backend: str,
) -> list[Tensor]:
    final = _empty_final(queries, values, gates, initial)
    start = Pair(*initial) if initial else None
    if queries.numel() == 0 or values.numel() == 0:
        state = Pair(torch.zeros_like(final[0])) if start is None else start
        return [queries.new_zeros(values.shape), *(part.clone() for part in checks.fit(state, final))]
    outputs, state = TABLE[backend].gate_loop_forward(queries, keys, values, Pair(*gates), start, reverse)
    return [outputs, *checks.fit(state, final)]


_forward = torch.library.custom_op("gateloop::gate_loop", mutates_args=())(_compute)


@_forward.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Sequence[Tensor],
    initial: Sequence[Tensor],
    reverse: bool,
    backend: str,
) -> list[Tensor]:
    return [queries.new_empty(values.shape), *_empty_final(queries, values, gates, initial)]


@torch.library.custom_op("gateloop::gate_loop_backward", mutates_args=())
@checks.full_precision
def _backward(
    grad: Sequence[Tensor],
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Sequence[Tensor],
    initial: Sequence[Tensor],
    reverse: bool,
    backend: str,
) -> list[Tensor]:
    if queries.numel() == 0 or values.numel() == 0:
        through = checks.fit(Pair(*grad[1:]), list(initial)) if initial else []
        return [*checks.no_gradient(queries, keys, values, *gates), *(part.clone() for part in through)]
    dq, dk, dv, d_gates, d_initial = TABLE[backend].gate_loop_backward(
        grad[0],
        Pair(*grad[1:]),
        queries,
        keys,
        values,
        Pair(*gates),
        Pair(*initial) if initial else None,
        reverse,
    )
    d_inputs = [x.to(queries.dtype).contiguous() for x in (dq, dk, dv)]
    d_start = checks.fit(d_initial, list(initial)) if initial else []
    return [*d_inputs, *checks.fit(d_gates, list(gates)), *d_start]


@_backward.register_fake
def _(
    grad: Sequence[Tensor],
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Sequence[Tensor],
    initial: Sequence[Tensor],
    reverse: bool,
    backend: str,
) -> list[Tensor]:
    return checks.no_gradient(queries, keys, values, *gates, *initial)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    queries, keys, values, gates, initial, ctx.reverse, ctx.backend = inputs
    ctx.lengths = 3, len(gates), len(initial)
    ctx.save_for_backward(queries, keys, values, *gates, *initial)


def _gradient(ctx: Any, grad: list[Tensor]) -> tuple[Any, ...]:
    inputs, gates, initial = take(ctx.saved_tensors, ctx.lengths)
    gradients = _backward(grad, *inputs, gates, initial, ctx.reverse, ctx.backend)
    d_inputs, d_gates, d_initial = take(gradients, ctx.lengths)
    return (*d_inputs, d_gates, d_initial, None, None)


_forward.register_autograd(_gradient, setup_context=_setup)
