"""flash-linear-attention's `chunk_simple_gla` on doubled keys: a yardstick for other kernels, taken only by name.

B batch, T time, H heads, K key size, V value size. Written for fla-core 0.6.0, whose function takes q, k (B, T, H, K'),
v (B, T, H, V), log-decays g (B, T, H) and a state (B, H, K', V) in float32, and runs for positive gates only.
Gates a = |a| u are brought there by turning queries and keys by U[t] = u[1] ··· u[t] and states by its conjugate,
R = conj(U) S; complex numbers become two real blocks, which doubles K' (one block and signs where all is real):

    R[t] = |a[t]| R[t-1] + conj(U[t]) k[t] ⊗ v[t]        y[t] = q[t]ᵀ Re(U[t] R[t])
    q' = [q Re U, q Im U]    k' = [k Re U, k Im U]    state' = [Re R, -Im R]    g = log|a|

Its arithmetic is the package's own: float32 products are TF32 where the GPU has it (TRITON_F32_DEFAULT=ieee changes
that), states between chunks have the keys' dtype, and decays are differences of summed logarithms. A gate's gradient
is that of its logarithm divided by the gate, and so is its error: harmless where gates are sigmoids or exponentials,
too large for gates near 0 that are parameters themselves. Phases are summed in float64. Every call waits for the GPU
once, to see that no gate is 0.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gateloop_transformer.ops.layout import PLAIN, Layout
from gateloop_transformer.ops.pairs import Pair, compute_dtype

INSTALL_HINT = "needs flash-linear-attention 0.6 or newer: pip install flash-linear-attention"
LACKS = {
    "linear_scan": "its kernels are those of gate_loop",
    "gates per key channel": "its kernels have one gate per head",
    "resets": "its kernels know none; use cu_seqlens",
}
_OLDEST = (0, 6)


@functools.cache
def _version() -> tuple[int, ...] | None:
    """Of the package that holds the kernels, None where it is not installed."""
    try:
        text = importlib.metadata.version("fla-core")
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Floating point of up to 32 bits on CUDA and ROCm devices, which torch calls "cuda" both."""
    if device.type != "cuda":
        return "runs on CUDA and ROCm GPUs only"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "needs real floating point of 16 or 32 bits"
    version = _version()
    return None if version is not None and version >= _OLDEST else INSTALL_HINT


def _kernel() -> Callable[..., tuple[Tensor, Tensor]]:
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla  # type: ignore[no-any-return]


class _Loop(NamedTuple):
    """A gate loop in the order of time, and as the kernel takes it.

    gates: a (B, T, H) in float64, complex where the gates or a state are.
    turns: U (B, T, H), of the same kind; parts in float32 or better.
    arguments: q', k', v, g and the first state'.
    """

    gates: Pair
    turns: Pair
    arguments: list[Tensor]


def _loop(queries: Tensor, keys: Tensor, values: Tensor, gates: Pair, initial: Pair | None, reverse: bool) -> _Loop:
    """The kernel's arguments.

    Raises:
        NotImplementedError: gates are wider than the queries.
        ValueError: a gate is 0.
    """
    assert gates.re.ndim == 3
    wide = compute_dtype(queries.dtype)
    if compute_dtype(gates.re.dtype) != wide:
        raise NotImplementedError(
            f"gate_loop: backend 'fla' computes in float32, which gates of {gates.re.dtype} would lose digits in; "
            "accepted are float32, bfloat16 and float16"
        )
    a = (gates.as_complex() if initial is not None and initial.im is not None else gates).to(torch.float64)
    q, k, v = (_in_time(x, reverse) for x in (queries, keys, values))
    a = a.map(lambda part: _in_time(part, reverse))
    size = a.re.abs() if a.im is None else torch.hypot(a.re, a.im)
    if (size == 0).any():
        raise ValueError(
            "gate_loop: backend 'fla' takes logarithms of gates, and one of these is 0; it accepts gates other than 0, "
            "other backends accept all"
        )
    turns = _turns(a).to(wide)
    shape = q.shape[0], q.shape[2], q.shape[3], v.shape[3]
    start = Pair(q.new_zeros(shape, dtype=wide)) if initial is None else initial.to(wide)
    state = _blocks(start.as_complex() if a.im is not None else start)
    turned = [_blocks(_turned(x, turns).conj(), -1).to(x.dtype) for x in (q, k)]
    return _Loop(a, turns, [*turned, v.contiguous(), size.log().to(wide).contiguous(), state])


def _in_time(x: Tensor, reverse: bool) -> Tensor:
    return x.flip(1) if reverse else x


def _turns(gates: Pair) -> Pair:
    """U[t] = u[1] ··· u[t]: signs, or unit complex numbers from summed angles."""
    if gates.im is None:
        return Pair(torch.where(gates.re < 0, -1.0, 1.0).to(gates.re.dtype).cumprod(1))
    angles = torch.atan2(gates.im, gates.re).cumsum(1)
    return Pair(angles.cos(), angles.sin())


def _turned(x: Tensor, turns: Pair) -> Pair:
    """x (B, T, H, K) times U (B, T, H)."""
    return turns.map(lambda part: x * part.unsqueeze(-1))


def _last(turns: Pair) -> Pair:
    """U after the last step, beside states (B, H, K, V)."""
    return turns.map(lambda part: part[:, -1, :, None, None])


def _blocks(number: Pair, dim: int = -2) -> Tensor:
    """[Re, -Im], or the real part alone where there is no other."""
    return number.re if number.im is None else torch.cat([number.re, -number.im], dim)


def _number(blocks: Tensor, turns: Pair, dim: int = -2) -> Pair:
    """The complex number of two blocks [Re, -Im], the real one of one."""
    if turns.im is None:
        return Pair(blocks)
    re, im = blocks.chunk(2, dim)
    return Pair(re, -im)


def gate_loop_forward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Pair,
    initial: Pair | None,
    reverse: bool,
    layout: Layout = PLAIN,
) -> tuple[Tensor, Pair]:
    """S[t] = a[t] S[t-1] + k[t] ⊗ v[t], y[t] = Re(q[t]ᵀ S[t]); gates per head, none of them 0."""
    loop = _loop(queries, keys, values, gates, initial, reverse)
    y, state = _run(loop.arguments)
    final = _last(loop.turns).times(_number(state, loop.turns))
    return _in_time(y, reverse).contiguous(), final


def _run(arguments: list[Tensor]) -> tuple[Tensor, Tensor]:
    q, k, v, g, state = arguments
    return _kernel()(q, k, v, g, scale=1.0, initial_state=state, output_final_state=True)


def gate_loop_backward(
    grad: Tensor,
    grad_final: Pair,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Pair,
    initial: Pair | None,
    reverse: bool,
    layout: Layout = PLAIN,
) -> tuple[Tensor, Tensor, Tensor, Pair, Pair]:
    """The kernel runs again and gives the gradients of its arguments; those of turning them are written out here.

    With complex gradients dL/dRe + i·dL/dIm, a number z = U x has dx = conj(U) dz and, for the angle of U,
    Im(dz conj(z)); a = exp(g + i·angle) has da = (dg + i·dangle) / conj(a).
    """
    loop = _loop(queries, keys, values, gates, initial, reverse)
    turns, last = loop.turns, _last(loop.turns)
    (dq, dk, dv, dg, d_state), state = _kernel_gradients(loop, _in_time(grad, reverse), grad_final)
    # Blocks of queries and keys are [Re, Im]: the conjugate of what blocks of states are.
    d_turned = [_number(x, turns, -1).conj() for x in (dq, dk)]
    d_inputs = [turns.map(lambda part: part.unsqueeze(-1)).conj().times(x).re for x in d_turned]
    d_log = Pair(dg.double())
    if turns.im is not None:
        turned = [_number(x, turns, -1).conj() for x in loop.arguments[:2]]
        d_turns = torch.stack([_angle(dz, z).sum(-1) for dz, z in zip(d_turned, turned, strict=True)]).sum(0)
        d_turns[:, -1] += _angle(grad_final.as_complex(), last.times(_number(state, turns))).sum((-1, -2))
        d_log = Pair(d_log.re, d_turns.flip(1).cumsum(1).flip(1))
    square = loop.gates.times(loop.gates.conj()).re
    d_gates = d_log.times(loop.gates).map(lambda part: _in_time(part / square, reverse))
    first, second, third = (_in_time(x, reverse) for x in (*d_inputs, dv))
    return first, second, third, d_gates, _number(d_state, turns)


def _angle(grad: Pair, number: Pair) -> Tensor:
    """Im(dz conj(z)) in float64: the gradient of z's angle."""
    product = grad.to(torch.float64).times(number.to(torch.float64).conj()).im
    assert product is not None
    return product


def _kernel_gradients(loop: _Loop, grad: Tensor, grad_final: Pair) -> tuple[tuple[Tensor, ...], Tensor]:
    """Gradients of the kernel's arguments, and its last state.

    The kernel is one autograd function, which records itself where a custom operator lets torch's own record nothing.
    """
    turns = loop.turns
    d_final = (grad_final.as_complex() if turns.im is not None else grad_final).to(turns.re.dtype)
    d_state = _blocks(_last(turns).conj().times(d_final))
    leaves = [x.detach().requires_grad_() for x in loop.arguments]
    with torch.enable_grad():
        y, state = _run(leaves)
    gradients = torch.autograd.grad([y, state], leaves, [grad.to(y.dtype).contiguous(), d_state.contiguous()])
    return gradients, state.detach()


def linear_scan_forward(gates: Pair, inputs: Pair, initial: Pair | None, reverse: bool, layout: Layout = PLAIN) -> Pair:
    """Not here: `LACKS`, which is asked first."""
    raise NotImplementedError(f"backend 'fla' has no linear_scan: {LACKS['linear_scan']}")


def linear_scan_backward(
    grad: Pair,
    gates: Pair,
    inputs: Pair,
    states: Pair,
    initial: Pair | None,
    reverse: bool,
    layout: Layout = PLAIN,
) -> tuple[Pair, Pair, Pair]:
    """Not here either."""
    raise NotImplementedError(f"backend 'fla' has no linear_scan: {LACKS['linear_scan']}")
