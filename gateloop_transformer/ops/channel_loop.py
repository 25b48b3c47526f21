"""The gate loop at head size 1 from projections to output: contract of the fused operator, its checks, its gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from gateloop_transformer.ops import checks
from gateloop_transformer.ops.carry import Recurrence, over_ranks, product_over_time
from gateloop_transformer.ops.channels import ChannelLoop, packed_gradients
from gateloop_transformer.ops.context_parallel import Ranks, context_parallel, current
from gateloop_transformer.ops.dispatch import FUSED, choose
from gateloop_transformer.ops.gate_loop import gate_loop
from gateloop_transformer.ops.gate_loop import gradient_before as loop_before
from gateloop_transformer.ops.gates import check_gate, gates_of
from gateloop_transformer.ops.head_gates import head_gates
from gateloop_transformer.ops.layout import Layout, read_layout
from gateloop_transformer.ops.linear_scan import gradient_before as scan_before
from gateloop_transformer.ops.linear_scan import linear_scan
from gateloop_transformer.ops.operator import Gradient, Operator
from gateloop_transformer.ops.pairs import Pair, compute_dtype, take
from gateloop_transformer.ops.plain import plain_channel_loop
from gateloop_transformer.ops.recurrences import last_states

RealPair = tuple[Tensor, Tensor]


class PackedLoop(NamedTuple):
    """What the fused operator computes from.

    packed: queries, keys and values side by side (B, T, 3·D); with "sigmoid" queries, inputs and logits.
    projections: what the gates are made of (B, T, 2·D); None: "sigmoid".
    swish: what the SiLU gate on the output is made of (B, T, D).
    bias: (D,), added to the projections of "ring".
    initial: the state before the first step (B, D), or of each document (N, D).
    """

    packed: Tensor
    projections: Tensor | None
    swish: Tensor | None
    bias: Pair | None
    initial: Pair | None
    gate: str
    fraction: float
    reverse: bool
    backend: str
    layout: Layout

    def loop(self) -> ChannelLoop:
        """What the kernels compute."""
        first, second, third = self.packed.chunk(3, -1)
        options = self.swish, self.bias, self.gate, self.fraction, self.reverse, self.layout
        if self.projections is None:
            return ChannelLoop(first, None, second, Pair(third), *options)
        return ChannelLoop(first, second, third, Pair(self.projections), *options)


def channel_gate_loop(
    qkv: Tensor,
    projections: Tensor,
    initial: RealPair | None = None,
    *,
    gate: str = "polar",
    bias: RealPair | None = None,
    swish: Tensor | None = None,
    fraction: float = 1.0,
    reverse: bool = False,
    resets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, RealPair]:
    """y[t] = Re(q[t] h[t]) · SiLU(s[t]) with h[t] = a[t] h[t-1] + k[t] v[t] and a = gate(projections), per channel.

    What the functions of `gates` and `gate_loop` give in turn at head size 1, in one pass over memory where the backend
    has one. Arithmetic is float32 or better. Memory is linear in T. Differentiable in every tensor argument.

    Args:
        qkv: q, k and v side by side (B, T, 3·D).
        projections: what the gate is made of, (B, T, 2·D): pairs, neighbours in memory; of `polar` (real, imaginary),
            of `paper` and `ring` (logit, phase).
        initial: (real, imaginary) part of h before the first step, each (B, D), or of each document (N, D); zero when
            None.
        gate: "polar", "paper" or "ring", the last with its inputs scaled by `ring_input_scale`.
        bias: (D,) each, added to the projections; for "ring" only, which needs it.
        swish: s (B, T, D); None for no gate on the output.
        fraction: the gradient of the projections (not that of the bias) is multiplied by this.
        reverse: run from the last step to the first.
        resets: (B, T) booleans: h is cleared before such a step; None: never.
        cu_seqlens: (N + 1,) integers from 0 to T, ascending: documents packed in a batch of one row, document n being
            steps cu_seqlens[n] to cu_seqlens[n + 1]; each is computed as if alone and has its own states.
        backend: "auto", or one of `available_backends(qkv)`.

    Returns:
        y (B, T, D) in qkv's dtype, and h after the last step, (real, imaginary), each (B, D), or (N, D), in float32 or
        better.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or no gate or backend has that name.
        NotImplementedError: the backend asked for cannot run these tensors.

    Source: T. Katsch, GateLoop (2023), arXiv 2311.01927, section 3.2, "maximally many heads".
    """
    layout = _check(qkv, projections, initial, gate, bias, swish, resets, cu_seqlens)
    chosen = choose(backend, qkv.device, qkv.dtype)
    if chosen in FUSED:
        start, b = (None if pair is None else Pair(*pair) for pair in (initial, bias))
        loop = PackedLoop(qkv, projections, swish, b, start, gate, float(fraction), reverse, chosen, layout)
        if (ranks := current()) is not None:
            y, final = _over_ranks(ranks.along(reverse), loop)
        else:
            y, final = _run(loop)
        return y, (final[0], final[1])
    # Wide before anything is multiplied: what is rounded between would not get to the state.
    wide = compute_dtype(qkv.dtype)
    q, k, v = (x.unsqueeze(-1) for x in qkv.to(wide).chunk(3, -1))
    re, im, scale = gates_of(projections, gate, bias, fraction)
    assert im is not None
    k = k if scale is None else k * scale.unsqueeze(-1)
    state = None if initial is None else (initial[0][..., None, None], initial[1][..., None, None])
    out, last = gate_loop(q, k, v, (re, im), state, reverse=reverse, backend=chosen, **layout.keywords())
    y = out.squeeze(-1) if swish is None else out.squeeze(-1) * torch.nn.functional.silu(swish.to(wide))
    return y.to(qkv.dtype), (last[0].flatten(1), last[1].flatten(1))


def simple_gate_loop(
    qkva: Tensor,
    initial: Tensor | None = None,
    *,
    reverse: bool = False,
    resets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """y[t] = q[t] · h[t] with h[t] = σ(a[t]) h[t-1] + kv[t], per channel, all real.

    Args:
        qkva: q, kv and the gate's logits a side by side (B, T, 3·D).
        initial: h before the first step (B, D), or of each document (N, D); zero when None.
        reverse: run from the last step to the first.
        resets: (B, T) booleans: h is cleared before such a step; None: never.
        cu_seqlens: (N + 1,) integers from 0 to T, ascending: documents packed in a batch of one row, document n being
            steps cu_seqlens[n] to cu_seqlens[n + 1]; each is computed as if alone and has its own states.
        backend: "auto", or one of `available_backends(qkva)`.

    Returns:
        y (B, T, D) in qkva's dtype, and h after the last step (B, D), or (N, D), in float32 or better.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or no backend has that name.
        NotImplementedError: the backend asked for cannot run these tensors.

    >>> y, final = simple_gate_loop(torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]]))
    >>> y.flatten().tolist(), final.item()
    ([1.0, 1.5], 1.5)
    """
    _check_packed("simple_gate_loop", "qkva", qkva)
    B, _, packed = qkva.shape
    layout = read_layout("simple_gate_loop", qkva, resets, cu_seqlens)
    if initial is not None:
        shape = (layout.states(B), packed // 3)
        checks.same_shape("simple_gate_loop", "initial", initial, shape, f"({layout.letter()}, D)")
        checks.floating("simple_gate_loop", ("initial",), initial=initial)
    checks.same_device("simple_gate_loop", qkva=qkva, initial=initial)
    chosen = choose(backend, qkva.device, qkva.dtype)
    if (ranks := current()) is not None:
        return _simple_over_ranks(ranks.along(reverse), qkva, initial, reverse, chosen, layout)
    return _simple(qkva, initial, reverse, chosen, layout)


def _simple(qkva: Tensor, initial: Tensor | None, reverse: bool, backend: str, layout: Layout) -> tuple[Tensor, Tensor]:
    if backend in FUSED:
        start = None if initial is None else Pair(initial)
        y, (final,) = _run(PackedLoop(qkva, None, None, None, start, "sigmoid", 1.0, reverse, backend, layout))
        return y, final
    q, kv, a = qkva.chunk(3, -1)
    wide = compute_dtype(qkva.dtype)
    gates = torch.sigmoid(a.to(wide))
    before = None if initial is None else initial.to(wide)
    h = linear_scan(gates, kv.to(wide), before, reverse=reverse, backend=backend, **layout.keywords())
    return (q * h).to(q.dtype), last_states(h, before, reverse, layout)


def _simple_over_ranks(
    ranks: Ranks, qkva: Tensor, initial: Tensor | None, reverse: bool, backend: str, layout: Layout
) -> tuple[Tensor, Tensor]:
    """A part of `simple_gate_loop`."""

    def gates(qkva: Tensor) -> Pair:
        a = qkva.chunk(3, -1)[2].detach()
        return Pair(torch.sigmoid(a.to(compute_dtype(a.dtype))))

    def run(start: Pair | None) -> tuple[Tensor, Pair]:
        with context_parallel(None):
            y, final = _simple(qkva, None if start is None else start.re, reverse, backend, layout)
        return y, Pair(final)

    def before(grad: Tensor, qkva: Tensor) -> Pair:
        a = gates(qkva)
        read = Pair(qkva.chunk(3, -1)[0].to(a.re.dtype) * grad.to(a.re.dtype))
        return scan_before(read, a, reverse, backend, layout.resets)

    part = Recurrence(run, lambda: product_over_time(gates(qkva)), before, [qkva], 1, layout.resets)
    y, final = over_ranks(ranks, "simple_gate_loop", part, None if initial is None else Pair(initial))
    return y, final.re


def _run(loop: PackedLoop) -> tuple[Tensor, list[Tensor]]:
    """y and the parts of the last state."""
    y, *final, _ = _loop(loop)
    return y, final


def _over_ranks(ranks: Ranks, loop: PackedLoop) -> tuple[Tensor, list[Tensor]]:
    """A part of `channel_gate_loop`."""
    packed, projections, swish, bias, initial, gate, _, reverse, backend, layout = loop
    assert projections is not None

    def run(state: Pair | None) -> tuple[Tensor, Pair]:
        y, final = _run(loop._replace(initial=state))
        return y, Pair(*final)

    def product() -> Pair:
        # What becomes of a state of 1 when nothing is added.
        nothing = packed.new_zeros(packed.shape[-1]).expand(packed.shape)
        one = packed.new_ones(packed.shape[0], packed.shape[-1] // 3, dtype=compute_dtype(packed.dtype))
        _, final = _run(loop._replace(packed=nothing, swish=None, initial=Pair(one).as_complex()))
        return Pair(*final)

    saved = [] if swish is None else [swish], [] if bias is None else bias.parts()

    def before(grad: Tensor, packed: Tensor, projections: Tensor, *rest: Tensor) -> Pair:
        swish, bias = take(rest, [len(tensors) for tensors in saved])
        read = grad * torch.nn.functional.silu(swish[0]) if swish else grad
        re, im, _ = head_gates(projections, gate=gate, bias=(bias[0], bias[1]) if bias else None, backend=backend)
        queries = packed.chunk(3, -1)[0]
        state = loop_before(read.unsqueeze(-1), queries.unsqueeze(-1), Pair(re, im), reverse, backend, layout.resets)
        return state.map(lambda x: x.flatten(1))

    part = Recurrence(run, product, before, [packed, projections, *saved[0], *saved[1]], 2, layout.resets)
    y, final = over_ranks(ranks, "channel_gate_loop", part, initial)
    return y, final.parts()


def _check_packed(operator: str, name: str, x: Tensor) -> None:
    checks.dims(operator, name, x, "B T 3·D")
    if x.shape[-1] % 3:
        raise ValueError(f"{operator}: {name} must have shape (B, T, 3·D), not {tuple(x.shape)}")
    checks.floating(operator, (name,), **{name: x})


def _check(
    qkv: Tensor,
    projections: Tensor,
    initial: RealPair | None,
    gate: str,
    bias: RealPair | None,
    swish: Tensor | None,
    resets: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Layout:
    operator = "channel_gate_loop"
    check_gate(operator, gate)
    if (bias is not None) != (gate == "ring"):
        raise ValueError(f"{operator}: 'ring' needs a bias (logits, phases), other gates take none")
    _check_packed(operator, "qkv", qkv)
    B, T, packed = qkv.shape
    D = packed // 3
    tensors: dict[str, Tensor | None] = {"qkv": qkv, "projections": projections, "swish": swish}
    checks.same_shape(operator, "projections", projections, (B, T, 2 * D), "(B, T, 2·D)")
    if swish is not None:
        checks.same_shape(operator, "swish", swish, (B, T, D), "(B, T, D)")
    layout = read_layout(operator, qkv, resets, cu_seqlens)
    states = (layout.states(B), D)
    for name, pair, shape, meaning in (
        ("initial", initial, states, f"({layout.letter()}, D)"),
        ("bias", bias, (D,), "(D,)"),
    ):
        if pair is None:
            continue
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"{operator}: {name} must be a tuple of two tensors, each {meaning} = {shape}")
        for n, part in enumerate(pair):
            checks.same_shape(operator, name, part, shape, meaning)
            tensors[f"{name}[{n}]"] = part
    checks.floating(operator, tuple(tensors), **tensors)
    checks.same_device(operator, **tensors)
    for name, x in (("projections", projections), ("swish", swish)):
        if x is not None and x.dtype != qkv.dtype:
            raise ValueError(f"{operator}: {name} must have qkv's dtype {qkv.dtype}, not {x.dtype}")
    return layout


def _empty_final(loop: PackedLoop) -> list[Tensor]:
    packed, projections = loop.packed, loop.projections
    real = projections is None
    dtype = compute_dtype(packed.dtype, packed.dtype if projections is None else projections.dtype)
    shape = loop.layout.states(packed.shape[0]), packed.shape[-1] // 3
    return [packed.new_empty(shape, dtype=dtype) for _ in range(1 if real else 2)]


def _results(loop: PackedLoop) -> list[Tensor]:
    """Empty y and last state, and room for what the backward pass is given."""
    inner = loop.loop()
    return [loop.packed.new_empty(inner.queries.shape), *_empty_final(loop), FUSED[loop.backend].loop_kept(inner)]


def _unchanged(loop: PackedLoop) -> list[Tensor]:
    """The results where there are no steps or no channels."""
    y, *final, kept = _results(loop)
    state = Pair(torch.zeros_like(final[0])) if loop.initial is None else loop.initial
    return [y, *(part.clone() for part in checks.fit(state, final)), kept]


def _forward(loop: PackedLoop) -> list[Tensor]:
    if not loop.packed.numel():
        return _unchanged(loop)
    y, state, kept = FUSED[loop.backend].loop_forward(loop.loop(), loop.initial)
    return [y, *state.parts(), kept]


def _backward(loop: PackedLoop, kept: list[Tensor], grad: list[Tensor]) -> tuple[Gradient, ...]:
    final = Pair(*grad[1:])
    if not loop.packed.numel():
        return None, None, None, None, final.map(torch.clone)
    return packed_gradients(FUSED[loop.backend], loop.loop(), grad[0], final, kept[0], loop.packed)


def _plain(loop: PackedLoop) -> list[Tensor]:
    if not loop.packed.numel():
        return _unchanged(loop)
    y, final = plain_channel_loop(loop.loop(), loop.initial)
    # No backward pass is given what is kept.
    return [y, *checks.fit(final, _empty_final(loop)), loop.packed.new_zeros(0)]


_loop = Operator(
    "channel_loop",
    PackedLoop,
    results=_results,
    forward=_forward,
    backward=_backward,
    plain=_plain,
    saved=slice(-1, None),
    hidden=1,
)
