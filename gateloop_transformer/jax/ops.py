"""The recurrences in JAX: pure functions of arrays, under `jit`, `vmap`, `grad` and `shard_map`, linear memory in time.

B batch, T time, H heads, K key size, V value size, D channels, N documents. Arithmetic is float32 or better, whatever
the inputs. Names, arguments and meaning are those of `gateloop_transformer.ops`.
"""

from __future__ import annotations

from typing import Any, overload

import jax
import jax.numpy as jnp

from gateloop_transformer.jax import checks
from gateloop_transformer.jax.chunks import Packed, chunked_loop
from gateloop_transformer.jax.gates import check_gate, head_gates
from gateloop_transformer.jax.pairs import Array, Pair, compute_dtype, split
from gateloop_transformer.jax.recurrence import recurrence
from gateloop_transformer.jax.sharding import over_axis

RealPair = tuple[Array, Array]


def linear_scan(
    gates: Array,
    inputs: Array,
    initial: Array | None = None,
    *,
    reverse: bool = False,
    resets: Array | None = None,
    cu_seqlens: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """h[t] = a[t] h[t-1] + x[t], every channel on its own.

    Arithmetic is float32 or better whatever the dtype of the arguments. Memory is linear in T: the gradient is a
    recurrence of its own, which keeps gates and states.

    Args:
        gates: a (B, T, D), real or complex; any value, 0 (forget all) included.
        inputs: x (B, T, D), real or complex.
        initial: h before the first step (B, D), or of each document (N, D), real or complex; zero when None.
        reverse: run from the last step to the first: h[t] = a[t] h[t+1] + x[t].
        resets: (B, T) booleans: h is cleared before such a step, whatever it was, NaN included; None: never.
        cu_seqlens: (N + 1,) integers from 0 to T, ascending: documents packed in a batch of one row, document n being
            steps cu_seqlens[n] to cu_seqlens[n + 1]; each is computed as if alone, `initial` holds one state for each.
            Under `jit` they are not checked.
        axis_name: inside of `jax.shard_map`: T is sharded along this axis of the mesh; `initial` is the same everywhere
            and cu_seqlens is None.

    Returns:
        All states (B, T, D): complex if any argument is, in the precision that gates and inputs promote to.

    Raises:
        ValueError: shapes or dtypes do not fit.

    >>> linear_scan(jnp.full((1, 3, 1), 0.5), jnp.ones((1, 3, 1))).ravel().tolist()
    [1.0, 1.5, 1.75]
    """
    gates, inputs = (checks.array("linear_scan", n, x) for n, x in (("gates", gates), ("inputs", inputs)))
    checks.dims("linear_scan", "inputs", inputs, "B T D")
    checks.same_shape("linear_scan", "gates", gates, inputs.shape, "(B, T, D), that of inputs,")
    layout = checks.Layout("linear_scan", inputs, resets, cu_seqlens)
    start = None
    if initial is not None:
        initial = checks.array("linear_scan", "initial", initial)
        shape = (layout.states, inputs.shape[2])
        checks.same_shape("linear_scan", "initial", initial, shape, f"({layout.letter}, D)")
    checks.floating("linear_scan", gates=gates, inputs=inputs, initial=initial)
    dtype = compute_dtype(gates.dtype, inputs.dtype)
    a, x = (split(value).map(lambda part: part.astype(dtype)) for value in (gates, inputs))
    if initial is not None:
        start = split(initial).map(lambda part: part.astype(dtype))
    states, _ = _scan(a, x, start, reverse, layout, axis_name)
    if states.im is None:
        return states.re.astype(jnp.promote_types(gates.dtype, inputs.dtype))
    return states.join()


def _scan(
    gates: Pair,
    inputs: Pair,
    initial: Pair | None,
    reverse: bool,
    layout: checks.Layout,
    axis_name: str | None = None,
) -> tuple[Pair, Pair]:
    """Compute all states (B, T, D), and those after the last steps (B or N, D)."""
    if axis_name is not None:
        _refuse_documents("a sharded time axis", layout)

        def run(start: Pair | None) -> tuple[Pair, Pair]:
            return _scan(gates, inputs, start, reverse, layout)

        forgets = layout.forgets(2)
        return over_axis(axis_name, run, lambda: _product(gates, layout), initial, forgets, reverse)
    if layout.packed is not None:
        return _scan_documents(gates, inputs, initial, reverse, layout.packed, layout.resets)
    states = recurrence(gates, inputs, initial, layout.resets, reverse)
    if inputs.re.shape[1]:
        return states, states.map(lambda h: h[:, 0 if reverse else -1])
    return states, _or_zero(initial, inputs, inputs.re.shape[0])


def _or_zero(initial: Pair | None, inputs: Pair, rows: int) -> Pair:
    """`initial`, or zeros (rows, D)."""
    return inputs.map(lambda x: jnp.zeros((rows, x.shape[2]), x.dtype)) if initial is None else initial


def _refuse_documents(what: str, layout: checks.Layout) -> None:
    if layout.packed is not None:
        raise ValueError(f"{what} takes no cu_seqlens: mark where documents begin by resets")


def _product(gates: Pair, layout: checks.Layout) -> Pair:
    """Multiply the gates of all steps (B, ...); the product is 0 where there was a reset, whatever the other gates."""
    forgets = layout.forgets(gates.re.ndim)
    return split(jnp.prod(gates.cleared(forgets).join(), axis=1))


def _scan_documents(
    gates: Pair, inputs: Pair, initial: Pair | None, reverse: bool, packed: Packed, resets: Array | None
) -> tuple[Pair, Pair]:
    """Each document begins with a reset, its own state coming in with its first input."""
    T = inputs.re.shape[1]
    start = _or_zero(initial, inputs, packed.number)
    if any(pair.im is not None for pair in (gates, inputs, start)):
        inputs, start = inputs.as_complex(), start.as_complex()
    if not inputs.re.size:
        return inputs, start
    there = packed.lengths() > 0
    first, last = packed.bounds[:-1], packed.bounds[1:] - 1
    first, last = (last, first) if reverse else (first, last)
    # An empty document has no step: what is written to step T is dropped.
    into = jnp.where(there, first, T)
    dropped = ~there if resets is None else ~there | resets[0, jnp.minimum(into, T - 1)]
    # Both sides of the product: what is not finite would come back in the gradient of the other, times 0.
    coming = start.cleared(dropped[:, None])
    carried = gates.map(lambda a: a[0, jnp.minimum(into, T - 1)]).cleared(dropped[:, None]).times(coming)
    x = Pair.of_parts(lambda part, c: part.at[0, into].add(c, mode="drop"), inputs, carried)
    begins = (jnp.zeros((1, T), bool) if resets is None else resets).at[0, into].set(True, mode="drop")
    states = recurrence(gates, x, None, begins, reverse)
    kept = Pair.of_parts(lambda h, h0: jnp.where(there[:, None], h[0, jnp.maximum(last, 0)], h0), states, start)
    return states, kept


@overload
def gate_loop(
    queries: Array,
    keys: Array,
    values: Array,
    gates: Array,
    initial: Array | None = None,
    *,
    reverse: bool = False,
    resets: Array | None = None,
    cu_seqlens: Array | None = None,
    axis_name: str | None = None,
) -> tuple[Array, Array]: ...


@overload
def gate_loop(
    queries: Array,
    keys: Array,
    values: Array,
    gates: RealPair,
    initial: RealPair | None = None,
    *,
    reverse: bool = False,
    resets: Array | None = None,
    cu_seqlens: Array | None = None,
    axis_name: str | None = None,
) -> tuple[Array, RealPair]: ...


def gate_loop(
    queries: Array,
    keys: Array,
    values: Array,
    gates: Array | RealPair,
    initial: Array | RealPair | None = None,
    *,
    reverse: bool = False,
    resets: Array | None = None,
    cu_seqlens: Array | None = None,
    axis_name: str | None = None,
) -> tuple[Array, Array | RealPair]:
    """S[t] = a[t] S[t-1] + k[t] ⊗ v[t], y[t] = Re(q[t]ᵀ S[t]): the operator of GateLoop.

    Gate and state arithmetic is float32 or better whatever the dtype of the arguments. No state is kept per step when
    K or V exceeds 1; memory is linear in T.

    Args:
        queries: q (B, T, H, K).
        keys: k (B, T, H, K).
        values: v (B, T, H, V).
        gates: a, one per head (B, T, H) or one per key channel (B, T, H, K); real, complex, or a tuple
            (real part, imaginary part) of real arrays. Any value, 0 (forget all) included.
        initial: S before the first step (B, H, K, V), or of each document (N, H, K, V), a tuple where `gates` is one;
            zero when None.
        reverse: run from the last step to the first.
        resets: (B, T) booleans: S is cleared before such a step, whatever it was, NaN included; None: never.
        cu_seqlens: (N + 1,) integers from 0 to T, ascending: documents packed in a batch of one row, document n being
            steps cu_seqlens[n] to cu_seqlens[n + 1]; each is computed as if alone and has its own states. Under `jit`
            they are not checked.
        axis_name: inside of `jax.shard_map`: T is sharded along this axis of the mesh, `initial` is the same everywhere
            and so is the last state, that after the whole sequence.

    Returns:
        y (B, T, H, V) in the queries' dtype, and S after the last step (B, H, K, V), or (N, H, K, V), in float32 or
        better: complex if the gates or `initial` are, a tuple (real, imaginary) if `gates` is one.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Source: T. Katsch, GateLoop (2023), arXiv 2311.01927, equations 3 to 7.

    >>> ones = jnp.ones((1, 3, 1, 1))
    >>> y, final = gate_loop(ones, ones, ones, jnp.full((1, 3, 1), 0.5))
    >>> y.ravel().tolist(), final.item()
    ([1.0, 1.5, 1.75], 1.75)
    """
    if isinstance(gates, tuple) != isinstance(initial, tuple) and initial is not None:
        raise ValueError("gate_loop: gates and initial must both be arrays or both be tuples (real, imaginary)")
    named = {"queries": queries, "keys": keys, "values": values}
    q, k, v = (checks.array("gate_loop", name, x) for name, x in named.items())
    a, start = _pair("gates", gates), None if initial is None else _pair("initial", initial)
    layout = _check_loop(q, k, v, a, start, resets, cu_seqlens)
    dtype = compute_dtype(q.dtype, a.re.dtype)
    a = a.map(lambda x: x.astype(dtype))
    before = None if start is None else start.map(lambda x: x.astype(dtype))
    wide = [x.astype(dtype) for x in (q, k, v)]
    y, final = _loop(wide[0], wide[1], wide[2], a, before, reverse, layout, axis_name)
    y = y.astype(q.dtype)
    if isinstance(gates, tuple):
        final = final.as_complex()
        assert final.im is not None
        return y, (final.re, final.im)
    return y, final.join()


def _pair(name: str, value: Any) -> Pair:
    if isinstance(value, tuple):
        if len(value) != 2:
            raise ValueError(f"gate_loop: {name} must be an array or a tuple (real, imaginary), not {len(value)} parts")
        re, im = (checks.array("gate_loop", f"{name}[{n}]", part) for n, part in enumerate(value))
        return Pair(re, im)
    return split(checks.array("gate_loop", name, value))


def _check_loop(
    queries: Array, keys: Array, values: Array, gates: Pair, initial: Pair | None, resets: Any, cu_seqlens: Any
) -> checks.Layout:
    checks.dims("gate_loop", "queries", queries, "B T H K")
    B, T, H, K = queries.shape
    checks.same_shape("gate_loop", "keys", keys, (B, T, H, K), "(B, T, H, K), that of queries,")
    checks.dims("gate_loop", "values", values, "B T H V")
    checks.same_shape("gate_loop", "values", values, (B, T, H, values.shape[-1]), "(B, T, H, V)")
    for part in gates:
        if part is not None and part.shape not in ((B, T, H), (B, T, H, K)):
            raise ValueError(
                f"gate_loop: gates must have shape (B, T, H) = {(B, T, H)} or (B, T, H, K) = {(B, T, H, K)}, "
                f"not {part.shape}"
            )
    if gates.im is not None and gates.im.shape != gates.re.shape:
        raise ValueError("gate_loop: the gates' real and imaginary parts must have one shape")
    layout = checks.Layout("gate_loop", queries, resets, cu_seqlens)
    for part in initial or ():
        if part is not None:
            shape = (layout.states, H, K, values.shape[-1])
            checks.same_shape("gate_loop", "initial", part, shape, f"({layout.letter}, H, K, V)")
    named: dict[str, Array | None] = {"queries": queries, "keys": keys, "values": values}
    named |= {"gates": gates.re, "gates[1]": gates.im}
    named |= {} if initial is None else {"initial": initial.re, "initial[1]": initial.im}
    checks.floating("gate_loop", tuple(named), **named)
    if not queries.dtype == keys.dtype == values.dtype:
        raise ValueError(
            f"gate_loop: queries, keys and values must have one dtype, not {queries.dtype}, {keys.dtype}, "
            f"{values.dtype}"
        )
    return layout


def _loop(
    q: Array,
    k: Array,
    v: Array,
    gates: Pair,
    initial: Pair | None,
    reverse: bool,
    layout: checks.Layout,
    axis_name: str | None = None,
) -> tuple[Array, Pair]:
    """Everything in one precision: y (B, T, H, V) and the last state (B or N, H, K, V)."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    start = _zero_state(layout.states, H, K, V, gates, initial)
    if axis_name is not None:
        _refuse_documents("a sharded time axis", layout)

        def run(before: Pair | None) -> tuple[Array, Pair]:
            return _loop(q, k, v, gates, start.map(jnp.zeros_like) if before is None else before, reverse, layout)

        def product() -> Pair:
            return _product(gates, layout).map(lambda x: x.reshape(B, H, *x.shape[2:] or (1,), 1))

        return over_axis(axis_name, run, product, start, layout.forgets(4), reverse)
    if not q.size or not v.size:
        return jnp.zeros((B, T, H, V), q.dtype), start
    if K == V == 1:
        flat = gates.map(lambda x: x.reshape(B, T, H))
        before = start.map(lambda x: x.reshape(x.shape[:2]))
        states, last = _scan(flat, Pair(k[..., 0] * v[..., 0]), before, reverse, layout)
        return q * states.re[..., None], last.map(lambda x: x[:, :, None, None])
    resets, packed = layout.resets, layout.packed
    if reverse:
        q, k, v = (jnp.flip(x, 1) for x in (q, k, v))
        gates = gates.map(lambda x: jnp.flip(x, 1))
        resets = None if resets is None else jnp.flip(resets, 1)
        if packed is not None:
            packed, start = Packed(T - packed.bounds[::-1]), start.map(lambda x: x[::-1])
    a = gates.map(lambda x: x.reshape(B, T, H, -1))
    y, final = chunked_loop(q, k, v, a, start, resets, packed)
    if not reverse:
        return y, final
    return jnp.flip(y, 1), final if packed is None else final.map(lambda x: x[::-1])


def _zero_state(rows: int, H: int, K: int, V: int, gates: Pair, initial: Pair | None) -> Pair:
    """`initial`, or zeros; complex where the gates are."""
    state = Pair(jnp.zeros((rows, H, K, V), gates.re.dtype)) if initial is None else initial
    return state.as_complex() if gates.im is not None else state


def channel_gate_loop(
    qkv: Array,
    projections: Array,
    initial: RealPair | None = None,
    *,
    gate: str = "polar",
    bias: RealPair | None = None,
    swish: Array | None = None,
    fraction: float = 1.0,
    reverse: bool = False,
    resets: Array | None = None,
    cu_seqlens: Array | None = None,
    axis_name: str | None = None,
) -> tuple[Array, RealPair]:
    """y[t] = Re(q[t] h[t]) · SiLU(s[t]) with h[t] = a[t] h[t-1] + k[t] v[t] and a = gate(projections), per channel.

    What `head_gates` and `gate_loop` give in turn at head size 1. Arithmetic is float32 or better. Of what lies between
    arguments and results nothing is kept for the gradient; it is computed again.

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
        cu_seqlens: (N + 1,) integers from 0 to T, ascending: documents packed in a batch of one row.
        axis_name: inside of `jax.shard_map`: T is sharded along this axis of the mesh.

    Returns:
        y (B, T, D) in qkv's dtype, and h after the last step, (real, imaginary), each (B, D), or (N, D), in float32 or
        better.

    Raises:
        ValueError: shapes or dtypes do not fit, or no gate has that name.

    Source: T. Katsch, GateLoop (2023), arXiv 2311.01927, section 3.2, "maximally many heads".
    """
    operator = "channel_gate_loop"
    check_gate(operator, gate)
    qkv = checks.packed_inputs(operator, "qkv", qkv)
    B, T, D = *qkv.shape[:2], qkv.shape[2] // 3
    projections = checks.array(operator, "projections", projections)
    checks.same_shape(operator, "projections", projections, (B, T, 2 * D), "(B, T, 2·D)")
    if swish is not None:
        swish = checks.array(operator, "swish", swish)
        checks.same_shape(operator, "swish", swish, (B, T, D), "(B, T, D)")
    if (bias is not None) != (gate == "ring"):
        raise ValueError(f"{operator}: 'ring' needs a bias (logits, phases), other gates take none")
    layout = checks.Layout(operator, qkv, resets, cu_seqlens)
    initial = checks.real_pair(operator, "initial", initial, (layout.states, D), f"({layout.letter}, D)")
    bias = checks.real_pair(operator, "bias", bias, (D,), "(D,)")
    for name, x in (("projections", projections), ("swish", swish)):
        if x is not None and x.dtype != qkv.dtype:
            raise ValueError(f"{operator}: {name} must have qkv's dtype {qkv.dtype}, not {x.dtype}")

    @jax.checkpoint
    def compute(
        qkv: Array, projections: Array, start: Pair | None, bias: RealPair | None, swish: Array | None
    ) -> tuple[Array, Pair]:
        dtype = compute_dtype(qkv.dtype)
        q, k, v = (x.astype(dtype) for x in jnp.split(qkv, 3, -1))
        re, im, scale = head_gates(projections, gate=gate, bias=bias, fraction=fraction)
        x = k * v if scale is None else k * scale * v
        h, final = _scan(Pair(re, im), Pair(x), start, reverse, layout, axis_name)
        y = q * h.re if swish is None else q * h.re * jax.nn.silu(swish.astype(dtype))
        return y.astype(qkv.dtype), final

    start = None if initial is None else Pair(*(x.astype(compute_dtype(qkv.dtype)) for x in initial))
    y, final = compute(qkv, projections, start, bias, swish)
    final = final.as_complex()
    assert final.im is not None
    return y, (final.re, final.im)


def simple_gate_loop(
    qkva: Array,
    initial: Array | None = None,
    *,
    reverse: bool = False,
    resets: Array | None = None,
    cu_seqlens: Array | None = None,
    axis_name: str | None = None,
) -> tuple[Array, Array]:
    """y[t] = q[t] · h[t] with h[t] = σ(a[t]) h[t-1] + kv[t], per channel, all real.

    Args:
        qkva: q, kv and the gate's logits a side by side (B, T, 3·D).
        initial: h before the first step (B, D), or of each document (N, D); zero when None.
        reverse: run from the last step to the first.
        resets: (B, T) booleans: h is cleared before such a step; None: never.
        cu_seqlens: (N + 1,) integers from 0 to T, ascending: documents packed in a batch of one row.
        axis_name: inside of `jax.shard_map`: T is sharded along this axis of the mesh.

    Returns:
        y (B, T, D) in qkva's dtype, and h after the last step (B, D), or (N, D), in float32 or better.

    Raises:
        ValueError: shapes or dtypes do not fit.

    >>> y, final = simple_gate_loop(jnp.array([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]]))
    >>> y.ravel().tolist(), final.item()
    ([1.0, 1.5], 1.5)
    """
    operator = "simple_gate_loop"
    qkva = checks.packed_inputs(operator, "qkva", qkva)
    layout = checks.Layout(operator, qkva, resets, cu_seqlens)
    dtype = compute_dtype(qkva.dtype)
    start = None
    if initial is not None:
        initial = checks.array(operator, "initial", initial)
        shape = (layout.states, qkva.shape[2] // 3)
        checks.same_shape(operator, "initial", initial, shape, f"({layout.letter}, D)")
        checks.floating(operator, ("initial",), initial=initial)
        start = Pair(initial.astype(dtype))

    @jax.checkpoint
    def compute(qkva: Array, start: Pair | None) -> tuple[Array, Pair]:
        q, kv, a = (x.astype(dtype) for x in jnp.split(qkva, 3, -1))
        h, final = _scan(Pair(jax.nn.sigmoid(a)), Pair(kv), start, reverse, layout, axis_name)
        return (q * h.re).astype(qkva.dtype), final

    y, final = compute(qkva, start)
    return y, final.re
