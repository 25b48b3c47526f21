"""The operators of the JAX side. The laws of tests/ops run on them by way of the backend `jax`; here is the rest."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from both_sides import to_jax, to_torch, values_and_slopes
from cases import (
    DIRECTIONS,
    KINDS,
    SCAN_KINDS,
    SIZES,
    assert_equal,
    cast,
    make_loop,
    make_scan,
    rms_ratio,
    values_and_gradients,
)
from torch import Tensor

import gateloop_transformer.jax as gj
from gateloop_transformer import ops
from gateloop_transformer.jax import recurrence
from gateloop_transformer.jax.pairs import Pair
from gateloop_transformer.jax.phases import cos_sin
from gateloop_transformer.ops import gates

BOUNDS = torch.tensor([0, 0, 3, 20, 20, 21])


def marks(T: int, seed: int = 0) -> Tensor:
    return torch.rand(1, T, generator=torch.Generator().manual_seed(seed)) < 0.2


@pytest.mark.parametrize("size", ["K3V5", "K1V1"])
@pytest.mark.parametrize(("kind", "direction"), list(zip(KINDS, ["forward", "reverse"] * 2, strict=True)))
def test_documents_with_resets_equal_torchs(kind: str, direction: str, size: str) -> None:
    args = make_loop(1, 21, **SIZES[size], **KINDS[kind])
    start = torch.randn(5, *args.initial.shape[1:], dtype=args.initial.dtype)
    options = {"reverse": DIRECTIONS[direction], "resets": marks(21)}
    tensors = [*args[:4], start]
    expected = values_and_gradients(
        lambda *x: ops.gate_loop(*x, backend="eager", cu_seqlens=BOUNDS, **options), tensors
    )

    def traced(*x: Any) -> Any:
        # Bounds that a compiler knows nothing of.
        return gj.gate_loop(*x, cu_seqlens=to_jax(BOUNDS) + 0 * x[0].real.astype(int).sum(), **to_jax(options))

    assert_equal(values_and_slopes(traced, tensors), expected)


@pytest.mark.parametrize("kinds", SCAN_KINDS[::3])
@pytest.mark.parametrize("reverse", [False, True])
def test_scans_of_documents_with_resets_equal_torchs(kinds: str, reverse: bool) -> None:
    args = make_scan(1, 21, 3, kinds=kinds)
    tensors = [*args[:2], torch.randn(5, 3, dtype=args.initial.dtype)]
    options = {"reverse": reverse, "resets": marks(21), "cu_seqlens": BOUNDS}
    expected = values_and_gradients(lambda *x: ops.linear_scan(*x, backend="eager", **options), tensors)
    assert_equal(values_and_slopes(lambda *x: gj.linear_scan(*x, **to_jax(options)), tensors), expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kinds", ["ccc", "rrc", "rrr"])
def test_the_tree_for_other_devices_equals_the_steps(kinds: str, reverse: bool) -> None:
    args = [Pair(x.real, x.imag) if jnp.iscomplexobj(x) else Pair(x) for x in to_jax(make_scan(T=33, kinds=kinds))]
    a, x, h = args
    h = h.as_complex() if kinds != "rrr" else h

    resets = to_jax(torch.rand(x.re.shape[:2]) < 0.1) if kinds == "ccc" else None

    @partial(jax.jit, static_argnums=(0, 1))
    def both(states: Any, gradients: Any, a: Pair, x: Pair, h: Pair) -> Any:
        found = states(a, x, h, resets, reverse)
        return found, recurrence._fitting(gradients, reverse, a, found, h, resets, found.map(jnp.sin))

    steps = both(recurrence._step_by_step, recurrence._gradients_step_by_step, a, x, h)
    tree = both(recurrence._as_a_tree, recurrence._gradients_as_trees, a, x, h)
    results, expected = ([to_torch(leaf) for leaf in jax.tree.leaves(side)] for side in (tree, steps))
    assert_equal(results, expected)


def test_rows_by_vmap_equal_a_batch() -> None:
    args = to_jax(make_loop(3, 19))
    whole = jax.jit(gj.gate_loop)(*args)
    one = jax.jit(jax.vmap(lambda *row: jax.tree.map(lambda x: x[0], gj.gate_loop(*(x[None] for x in row)))))
    rows = one(*args)
    for x, y in zip(rows, whole, strict=True):
        assert_equal([to_torch(x)], [to_torch(y)])


@pytest.mark.parametrize("size", ["K3V5", "K1V1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_inputs_are_computed_wide(size: str, dtype: torch.dtype) -> None:
    q, k, v, a, s = make_loop(T=129, **SIZES[size])
    expected = ops.gate_loop(*(x.to(dtype).double() for x in (q, k, v)), a, s, backend="eager")
    arrays = [to_jax(x.to(dtype).float()).astype(jnp.dtype(str(dtype).removeprefix("torch."))) for x in (q, k, v)]
    y, final = jax.jit(gj.gate_loop)(*arrays, *to_jax(tuple(cast([a, s], torch.float32))))
    assert y.dtype == arrays[0].dtype
    assert final.dtype == jnp.complex64
    assert rms_ratio(to_torch(y.astype(jnp.float32)), expected[0]) < (1e-5 if dtype == torch.float32 else 4e-3)
    assert rms_ratio(to_torch(real(final)), torch.view_as_real(expected[1])) < 1e-5


def real(x: Any) -> Any:
    return jnp.stack([x.real, x.imag], -1)


@pytest.mark.parametrize("name", gates.GATES)
def test_gates_and_their_gradients_are_torchs(name: str) -> None:
    first, second = (torch.randn(50, dtype=torch.float64) * 3 for _ in range(2))
    first[:4], second[:4] = torch.tensor([0, 1e-200, 800, -800]), torch.tensor([0, 0, 1e3, 0])
    results = values_and_slopes(gj.gates.GATES[name], [first, second])
    assert_equal(results, values_and_gradients(gates.GATES[name], [first, second]), 1e-12)


def test_the_input_scale_keeps_its_digits_and_its_slope() -> None:
    logits = torch.linspace(-60, 60, 121, dtype=torch.float64)
    results = values_and_slopes(gj.ring_input_scale, [logits])
    for x, y in zip(results, values_and_gradients(gates.ring_input_scale, [logits]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-15)
    assert jnp.isfinite(jax.grad(gj.ring_input_scale)(jnp.float32(1000.0)))


@pytest.mark.parametrize("largest", [4, 8192, 1e6])
def test_cosines_of_float32_are_exact_to_two_digits_of_the_last(largest: float) -> None:
    phases = np.random.default_rng(0).uniform(-largest, largest, 10_000).astype(np.float32)
    for found, exact in zip(cos_sin(phases), (np.cos, np.sin), strict=True):
        assert np.abs(found - exact(phases.astype(np.float64))).max() < 2e-7
    assert jnp.isnan(cos_sin(jnp.float32(jnp.nan))[0])


def test_a_gate_of_zero_forgets_exactly_with_its_gradient() -> None:
    args = make_loop(1, 40, 2)
    args.gates[:, 7] = 0
    expected = values_and_gradients(partial(ops.gate_loop, backend="eager"), args)
    assert_equal(values_and_slopes(gj.gate_loop, args), expected)
    args.values[:, :7] = torch.inf
    y, _ = jax.jit(gj.gate_loop)(*to_jax(args))
    assert not jnp.isfinite(y[:, :7]).all()


def test_a_gradient_of_matrix_states_can_be_differentiated_again() -> None:
    q, k, v, a, state = to_jax(make_loop(1, 3, 1, 2, 2, is_complex=False))

    def naive(k: Any) -> Any:
        S, y = state, []
        for t in range(3):
            S = a[:, t, :, None, None] * S + k[:, t, ..., None] * v[:, t, :, None]
            y.append((q[:, t, ..., None] * S).sum(-2))
        return jnp.stack(y, 1)

    def twice(loop: Any) -> Any:
        once = jax.grad(lambda k: jnp.sin(loop(k)).sum())
        return jax.jit(jax.grad(lambda k: jnp.square(once(k)).sum()))(k)

    assert jnp.allclose(twice(lambda k: gj.gate_loop(q, k, v, a, state)[0]), twice(naive), rtol=1e-12, atol=1e-12)


def test_memory_of_a_step_does_not_grow_with_the_state() -> None:
    """A state of each step would be K·V times the inputs."""
    T, K = 1024, 64
    q = jnp.ones((1, T, 1, K), jnp.float32)
    a = jnp.full((1, T, 1), 0.9, jnp.float32)
    step = jax.jit(jax.grad(lambda q, a: gj.gate_loop(q, q, q, a)[0].sum(), argnums=(0, 1)))
    assert step.lower(q, a).compile().memory_analysis().temp_size_in_bytes < T * K * K * 4 / 4


ONES = jnp.ones((1, 3, 2, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: gj.linear_scan(jnp.ones((1, 2)), jnp.ones((1, 2))),
            r"inputs must have shape \(B, T, D\), not \(1, 2\)",
        ),
        (lambda: gj.linear_scan(jnp.ones((1, 3, 2)), [1.0]), "inputs must be an array, not list"),
        (
            lambda: gj.linear_scan(jnp.ones((1, 3, 2)), jnp.ones((1, 3, 2), int)),
            "inputs must be a floating-point array",
        ),
        (lambda: gj.gate_loop(ONES, ONES, ONES, jnp.ones((1, 2, 2))), "gates must have shape"),
        (lambda: gj.gate_loop(ONES, ONES, ONES, ONES, (ONES, ONES)), "both be arrays or both be tuples"),
        (lambda: gj.gate_loop(ONES, ONES, ONES * 1j, ONES), "values must be real"),
        (lambda: gj.gate_loop(ONES, ONES, ONES, ONES, cu_seqlens=jnp.array([0, 2])), "ascend from 0 to T = 3"),
        (lambda: gj.gate_loop(ONES, ONES, ONES, ONES, resets=jnp.ones((1, 3))), "resets must be booleans"),
        (lambda: gj.channel_gate_loop(jnp.ones((1, 2, 4)), jnp.ones((1, 2, 2))), r"must have shape \(B, T, 3·D\)"),
        (lambda: gj.polar(jnp.ones(2), jnp.ones(3)), "must have one shape"),
        (lambda: gj.GateLoopedAttention(8, heads=3), "heads must divide dim_inner"),
        (lambda: gj.Transformer(8, num_tokens=4, depth=1, gate="round"), "gate must be one of polar, paper, ring"),
    ],
)
def test_what_does_not_fit_is_one_error(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
