"""The gate loop as attention: y = [(Q Kᵀ) ∘ Re Π a] V, quadratic in time, decay computed in log space."""

import torch
from torch import Tensor

from gateloop_transformer.ops import checks
from gateloop_transformer.ops.backends import stepwise
from gateloop_transformer.ops.context_parallel import refuse
from gateloop_transformer.ops.dispatch import choose, gate_loop_backward
from gateloop_transformer.ops.operator import Gradient, Operator
from gateloop_transformer.ops.packing import as_rows, cleared
from gateloop_transformer.ops.pairs import Pair, compute_dtype, split
from gateloop_transformer.ops.plain import plain_gate_loop
from gateloop_transformer.ops.recurrences import GateLoop


def surrogate_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor | tuple[Tensor, Tensor],
    *,
    resets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """y[i] = Σ_{j ≤ i} Re(q[i] k[j] a[j+1] ··· a[i]) v[j]: the outputs of `gate_loop`, the attention way.

    Memory and time grow with T²: it shows what the recurrence attends to and checks the linear forms; train with
    `gate_loop`. The products of gates are exp(L[i] - L[j]) with L the cumulated log-magnitude, the exponent masked
    before it is taken; a gate of 0 cuts the sequence there. The gradient is that of `gate_loop`, linear in memory.

    Args:
        queries: q (B, T, H, K).
        keys: k (B, T, H, K).
        values: v (B, T, H, V).
        gates: a, per head (B, T, H) or per key channel (B, T, H, K); real, complex, or a tuple (real, imaginary).
        resets: (B, T) booleans: such a step sees none before it; None: never.
        cu_seqlens: (N + 1,) integers from 0 to T, ascending: documents packed in one row, as in `gate_loop`.

    Returns:
        y (B, T, H, V) in the queries' dtype, computed in float32 or better.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Source: T. Katsch, GateLoop (2023), arXiv 2311.01927, section 3.3.

    >>> ones = torch.ones(1, 3, 1, 1)
    >>> surrogate_attention(ones, ones, ones, torch.full((1, 3, 1), 0.5)).flatten()
    tensor([1.0000, 1.5000, 1.7500])
    """
    refuse("surrogate_attention", "gate_loop gives the same outputs")
    a = split(gates)
    layout = checks.gate_loop("surrogate_attention", queries, keys, values, a, None, resets, cu_seqlens)
    loop = GateLoop(queries, keys, values, a, layout=layout)
    (y,) = _attention(loop) if cu_seqlens is None else as_rows(loop, _attention)
    return y


def _decay(gates: Tensor, imaginary: Tensor | None) -> Tensor:
    """Re(a[j+1] ··· a[i]) for i ≥ j, else 0: (..., T) → (..., T, T)."""
    # Float64 where the device has it: cumulated logarithms and phases grow with T, their differences do not.
    wide = gates.dtype if gates.device.type == "mps" else torch.float64
    re = gates.to(wide)
    im = torch.zeros_like(re) if imaginary is None else imaginary.to(wide)
    magnitude = torch.hypot(re, im)
    zero = magnitude == 0
    L = torch.log(torch.where(zero, 1.0, magnitude)).cumsum(-1)
    phase = torch.atan2(im, re).cumsum(-1)
    segment = zero.cumsum(-1)
    T = re.shape[-1]
    seen = torch.ones(T, T, dtype=torch.bool, device=re.device).tril()
    seen = seen & (segment[..., :, None] == segment[..., None, :])
    exponent = torch.where(seen, L[..., :, None] - L[..., None, :], -torch.inf)
    turned = torch.cos(phase[..., :, None] - phase[..., None, :])
    return (exponent.exp() * turned).to(gates.dtype)


def _forward(loop: GateLoop) -> list[Tensor]:
    queries, keys, values, gates, *_ = loop
    if queries.numel() == 0 or values.numel() == 0:
        return [torch.zeros_like(values, memory_format=torch.contiguous_format)]
    y = _attend(queries, keys, values, cleared(gates, loop.layout.resets))
    if not stepwise.all_finite(y):
        # What a step must not see was multiplied by 0.
        return [stepwise.gate_loop_forward(loop)[0]]
    return [y.to(queries.dtype).contiguous()]


def _attend(queries: Tensor, keys: Tensor, values: Tensor, gates: Pair) -> Tensor:
    """y in the precision of the arithmetic."""
    dtype = compute_dtype(queries.dtype, gates.re.dtype)
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (queries, keys, values))
    a = gates.map(lambda x: x.to(dtype).transpose(1, 2))
    if a.re.ndim == 3:
        scores = (q @ k.transpose(-1, -2)) * _decay(a.re, a.im)
    else:
        scores = torch.zeros(*q.shape[:3], q.shape[2], dtype=dtype, device=q.device)
        for c in range(q.shape[-1]):
            gate = a.select(-1, c)
            scores += q[..., c, None] * k[..., None, :, c] * _decay(gate.re, gate.im)
    return (scores @ v).transpose(1, 2)


def _backward(loop: GateLoop, _: list[Tensor], grad: list[Tensor]) -> tuple[Gradient, ...]:
    queries, values = loop.queries, loop.values
    if queries.numel() == 0 or values.numel() == 0:
        return None, None, None, None
    shape = queries.shape[0], *queries.shape[2:], values.shape[-1]
    state = Pair(queries.new_zeros(shape, dtype=loop.wide()))
    loop = loop._replace(backend=choose("auto", queries.device, queries.dtype))
    return gate_loop_backward(loop, grad[0], state if loop.parts() == 1 else state.as_complex())


def _plain(loop: GateLoop) -> list[Tensor]:
    if loop.queries.numel() == 0 or loop.values.numel() == 0:
        return [torch.zeros_like(loop.values)]
    return [plain_gate_loop(loop)[0].to(loop.queries.dtype)]


_attention = Operator(
    "surrogate_attention",
    GateLoop,
    results=lambda loop: [loop.queries.new_empty(loop.values.shape)],
    forward=_forward,
    backward=_backward,
    plain=_plain,
    rows=lambda loop: True,
)
