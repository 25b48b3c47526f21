"""S[t] = a[t] S[t-1] + k[t] ⊗ v[t], y[t] = Re(q[t]ᵀ S[t]): contract, checks, gradient."""

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from gateloop_transformer.ops import checks
from gateloop_transformer.ops.carry import Recurrence, Shift, over_ranks, product_over_time
from gateloop_transformer.ops.context_parallel import Ranks, current
from gateloop_transformer.ops.dispatch import TABLE, choose, reads_layout
from gateloop_transformer.ops.layout import Layout
from gateloop_transformer.ops.operator import operator
from gateloop_transformer.ops.packing import by_documents, loop_inputs
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
    resets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
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
    resets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
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
    resets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | RealPair]:
    """S[t] = a[t] S[t-1] + k[t] ⊗ v[t], y[t] = Re(q[t]ᵀ S[t]): the operator of GateLoop.

    Gate and state arithmetic is float32 or better whatever the dtype of the arguments; on the backend `triton` states
    are rounded where they are multiplied with bfloat16 inputs. No state is kept per step when K or V exceeds 1; memory
    is linear in T. Differentiable (once) in every tensor argument and through both results, also under
    `torch.compile`.

    What is not finite at a step reaches only what depends on that step. Rounding adds up where nothing is forgotten: in
    float32 a sum of a million equal numbers at a gate of 1 may be 1 % off, so give it float64.

    Args:
        queries: q (B, T, H, K).
        keys: k (B, T, H, K).
        values: v (B, T, H, V).
        gates: a, one per head (B, T, H) or one per key channel (B, T, H, K); real, complex, or a tuple
            (real part, imaginary part) of real tensors. Any value, 0 (forget all) included.
        initial: S before the first step (B, H, K, V), or of each document (N, H, K, V), a tuple where `gates` is one;
            zero when None.
        reverse: run from the last step to the first.
        resets: (B, T) booleans: S is cleared before such a step, whatever it was, NaN included; None: never.
        cu_seqlens: (N + 1,) integers from 0 to T, ascending: documents packed in a batch of one row, document n being
            steps cu_seqlens[n] to cu_seqlens[n + 1]; each is computed as if alone and has its own states.
        backend: "auto", or one of `available_backends(queries)`.

    Returns:
        y (B, T, H, V) in the queries' dtype, and S after the last step (B, H, K, V), or (N, H, K, V), in float32 or
        better: complex if the gates or `initial` are, a tuple (real, imaginary) if `gates` is one.

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
    layout = checks.gate_loop("gate_loop", queries, keys, values, a, start, resets, cu_seqlens)
    if isinstance(gates, tuple) != isinstance(initial, tuple) and initial is not None:
        raise ValueError("gate_loop: gates and initial must both be tensors or both be tuples (real, imaginary)")
    chosen = choose(backend, queries.device, queries.dtype)
    inputs = queries, keys, values
    if (ranks := current()) is not None:
        y, final = _over_ranks(ranks.along(reverse), *inputs, a, start, reverse, chosen, layout)
    elif cu_seqlens is None or reads_layout(chosen, keys, values, a):
        y, final = _run(*inputs, a, start, reverse, chosen, layout)
    else:
        y, final = _as_rows(*inputs, a, start, reverse, chosen, layout)
    if isinstance(gates, tuple):
        return y, (final[0], final[1])
    return y, Pair(*final).complex()


def _run(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Pair,
    initial: Pair | None,
    reverse: bool,
    backend: str,
    layout: Layout,
) -> tuple[Tensor, list[Tensor]]:
    a, start = gates.parts(), [] if initial is None else initial.parts()
    y, *final = _forward(queries, keys, values, a, start, reverse, backend, *layout)
    return y, final


def _over_ranks(
    ranks: Ranks,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Pair,
    initial: Pair | None,
    reverse: bool,
    backend: str,
    layout: Layout,
) -> tuple[Tensor, list[Tensor]]:
    """Outputs of a part of a sequence, and the state after the whole of it."""

    def run(start: Pair | None) -> tuple[Tensor, Pair]:
        y, final = _run(queries, keys, values, gates, start, reverse, backend, layout)
        return y, Pair(*final)

    def product() -> Pair:
        return product_over_time(gates).map(beside_state)

    def before(grad: Tensor, queries: Tensor, *gates: Tensor) -> Pair:
        return gradient_before(grad, queries, Pair(*gates), reverse, backend, layout.resets)

    parts = 1 if gates.im is None and (initial is None or initial.im is None) else 2
    part = Recurrence(run, product, before, [queries, *gates.parts()], parts, layout.resets)
    y, state = over_ranks(ranks, "gate_loop", part, initial)
    return y, state.parts()


def beside_state(gate: Tensor) -> Tensor:
    """Gates of a step (B, H) or (B, H, K), to be multiplied with states (B, H, K, V)."""
    return gate.reshape(*gate.shape[:2], -1, 1)


def gradient_before(
    grad: Tensor, queries: Tensor, gates: Pair, reverse: bool, backend: str, resets: Tensor | None
) -> Pair:
    """The gradient of the state before the first step (B, H, K, V), given that of the outputs (B, T, H, V)."""
    B, T, H, K = queries.shape
    dtype = compute_dtype(queries.dtype, gates.re.dtype)
    if not T:
        return Pair(queries.new_zeros(B, H, K, grad.shape[-1], dtype=dtype))
    shift = Shift.of(reverse)
    q, dy, a = queries[:, shift.inputs], grad[:, shift.inputs], gates.map(lambda x: x[:, shift.gates])
    last = queries[:, shift.last, :, :, None].to(dtype) * grad[:, shift.last, :, None].to(dtype)
    _, state = _run(q, q, dy, a, Pair(last), not reverse, backend, shift.layout(resets))
    return shift.forgotten(gates.select(1, shift.first).map(beside_state).times(Pair(*state)).conj(), resets)


def _as_rows(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Pair,
    initial: Pair | None,
    reverse: bool,
    backend: str,
    layout: Layout,
) -> tuple[Tensor, list[Tensor]]:
    """Documents as rows of batches."""
    lengths = 1, 1, 1, len(gates.parts()), layout.resets is not None

    def loop(rows: list[Tensor], start: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        (q,), (k,), (v,), a, resets = take(rows, lengths)
        y, final = _run(q, k, v, Pair(*a), Pair(*start) if start else None, reverse, backend, Layout(*resets))
        return [y], final

    inputs = loop_inputs(queries, keys, values, gates=gates, resets=layout.resets)
    start = [] if initial is None else initial.parts()
    (y,), final = by_documents(loop, inputs, start, layout.bounds(queries.shape[1]))
    return y, final


def _empty_final(
    queries: Tensor, values: Tensor, gates: Sequence[Tensor], initial: Sequence[Tensor], layout: Layout
) -> list[Tensor]:
    B, _, H, K = queries.shape
    dtype = compute_dtype(queries.dtype, gates[0].dtype)
    shape = (layout.states(B), H, K, values.shape[-1])
    return [queries.new_empty(shape, dtype=dtype) for _ in range(max(len(gates), len(initial)))]


@operator("gate_loop")
@checks.full_precision
def _forward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Sequence[Tensor],
    initial: Sequence[Tensor],
    reverse: bool,
    backend: str,
    resets: Tensor | None,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    layout = Layout(resets, cu_seqlens)
    final = _empty_final(queries, values, gates, initial, layout)
    start = Pair(*initial) if initial else None
    if queries.numel() == 0 or values.numel() == 0:
        state = Pair(torch.zeros_like(final[0])) if start is None else start
        return [queries.new_zeros(values.shape), *(part.clone() for part in checks.fit(state, final))]
    outputs, state = TABLE[backend].gate_loop_forward(queries, keys, values, Pair(*gates), start, reverse, layout)
    return [outputs, *checks.fit(state, final)]


@_forward.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Sequence[Tensor],
    initial: Sequence[Tensor],
    reverse: bool,
    backend: str,
    resets: Tensor | None,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    return [queries.new_empty(values.shape), *_empty_final(queries, values, gates, initial, Layout(resets, cu_seqlens))]


@operator("gate_loop_backward")
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
    resets: Tensor | None,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    if queries.numel() == 0 or values.numel() == 0:
        through = checks.fit(Pair(*grad[1:]), list(initial)) if initial else []
        return [*checks.no_gradient(queries, keys, values, *gates), *(part.clone() for part in through)]
    start = Pair(*initial) if initial else None
    arguments = grad[0], Pair(*grad[1:]), queries, keys, values, Pair(*gates), start, reverse
    dq, dk, dv, d_gates, d_initial = TABLE[backend].gate_loop_backward(*arguments, Layout(resets, cu_seqlens))
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
    resets: Tensor | None,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    return checks.no_gradient(queries, keys, values, *gates, *initial)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    queries, keys, values, gates, initial, *ctx.rest, resets, cu_seqlens = inputs
    ctx.lengths = 3, len(gates), len(initial)
    ctx.save_for_backward(queries, keys, values, *gates, *initial, resets, cu_seqlens)


def _gradient(ctx: Any, grad: list[Tensor]) -> tuple[Any, ...]:
    *saved, resets, cu_seqlens = ctx.saved_tensors
    inputs, gates, initial = take(saved, ctx.lengths)
    gradients = _backward(grad, *inputs, gates, initial, *ctx.rest, resets, cu_seqlens)
    d_inputs, d_gates, d_initial = take(gradients, ctx.lengths)
    return (*d_inputs, d_gates, d_initial, None, None, None, None)


_forward.register_autograd(_gradient, _setup)
