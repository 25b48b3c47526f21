"""S[t] = a[t] S[t-1] + k[t] ⊗ v[t], y[t] = Re(q[t]ᵀ S[t]): contract, checks, gradient."""

from typing import overload

import torch
from torch import Tensor

from gateloop_transformer.ops import checks, dispatch
from gateloop_transformer.ops.carry import Recurrence, Shift, over_ranks, product_over_time
from gateloop_transformer.ops.context_parallel import Ranks, current
from gateloop_transformer.ops.dispatch import choose, reads_layout
from gateloop_transformer.ops.operator import Gradient, Operator
from gateloop_transformer.ops.packing import as_rows
from gateloop_transformer.ops.pairs import Pair, compute_dtype, split
from gateloop_transformer.ops.plain import plain_gate_loop
from gateloop_transformer.ops.recurrences import GateLoop

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
    is linear in T. Differentiable in every tensor argument and through both results, also under `torch.compile` (once)
    and by `torch.func`.

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
    loop = GateLoop(queries, keys, values, a, start, reverse, chosen, layout)
    if (ranks := current()) is not None:
        y, final = _over_ranks(ranks.along(reverse), loop)
    elif cu_seqlens is None or reads_layout(loop):
        y, *final = _loop(loop)
    else:
        y, *final = as_rows(loop, _loop, 1)
    if isinstance(gates, tuple):
        return y, (final[0], final[1])
    return y, Pair(*final).complex()


def _over_ranks(ranks: Ranks, loop: GateLoop) -> tuple[Tensor, list[Tensor]]:
    """Outputs of a part of a sequence, and the state after the whole of it."""
    gates, reverse, resets = loop.gates, loop.reverse, loop.layout.resets

    def run(start: Pair | None) -> tuple[Tensor, Pair]:
        y, *final = _loop(loop._replace(initial=start))
        return y, Pair(*final)

    def product() -> Pair:
        return product_over_time(gates).map(beside_state)

    def before(grad: Tensor, queries: Tensor, *gates: Tensor) -> Pair:
        return gradient_before(grad, queries, Pair(*gates), reverse, loop.backend, resets)

    part = Recurrence(run, product, before, [loop.queries, *gates.parts()], loop.parts(), resets)
    y, state = over_ranks(ranks, "gate_loop", part, loop.initial)
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
    _, *state = _loop(GateLoop(q, q, dy, a, Pair(last), not reverse, backend, shift.layout(resets)))
    return shift.forgotten(gates.select(1, shift.first).map(beside_state).times(Pair(*state)).conj(), resets)


def _empty_final(loop: GateLoop) -> list[Tensor]:
    B, _, H, K = loop.queries.shape
    shape = (loop.layout.states(B), H, K, loop.values.shape[-1])
    return [loop.queries.new_empty(shape, dtype=loop.wide()) for _ in range(loop.parts())]


def _results(loop: GateLoop) -> list[Tensor]:
    """An empty y, and an empty last state."""
    return [loop.queries.new_empty(loop.values.shape), *_empty_final(loop)]


def _nothing(loop: GateLoop) -> bool:
    """Whether no number is multiplied with another."""
    return loop.queries.numel() == 0 or loop.values.numel() == 0


def _unchanged(loop: GateLoop) -> list[Tensor]:
    """The results where nothing is added to the state."""
    final = _empty_final(loop)
    state = Pair(torch.zeros_like(final[0])) if loop.initial is None else loop.initial
    return [loop.queries.new_zeros(loop.values.shape), *(part.clone() for part in checks.fit(state, final))]


def _forward(loop: GateLoop) -> list[Tensor]:
    if _nothing(loop):
        return _unchanged(loop)
    outputs, state = dispatch.gate_loop_forward(loop)
    return [outputs, *checks.fit(state, _empty_final(loop))]


def _backward(loop: GateLoop, _: list[Tensor], grad: list[Tensor]) -> tuple[Gradient, ...]:
    final = Pair(*grad[1:])
    if _nothing(loop):
        return None, None, None, None, final.map(torch.clone)
    return dispatch.gate_loop_backward(loop, grad[0], final)


def _plain(loop: GateLoop) -> list[Tensor]:
    if _nothing(loop):
        return _unchanged(loop)
    y, final = plain_gate_loop(loop)
    return [y.to(loop.queries.dtype), *checks.fit(final, _empty_final(loop))]


_loop = Operator(
    "gate_loop",
    GateLoop,
    results=_results,
    forward=_forward,
    backward=_backward,
    plain=_plain,
    rows=lambda loop: loop.layout.cu_seqlens is None,
)
