"""What is not finite at a step touches only what depends on that step, in JAX too; a reset forgets everything.

The laws of tests/ops/test_not_finite.py run on the backend `jax`; here is what only JAX has.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from both_sides import real_parts, to_jax, to_torch
from cases import SIZES, make_loop, make_scan, values_and_gradients, weights
from torch import Tensor

import gateloop_transformer.jax as gj
from gateloop_transformer import ops
from gateloop_transformer.jax import chunks, recurrence
from gateloop_transformer.jax.pairs import Pair

T, AT = 21, 9
BOUNDS = torch.tensor([0, 0, 4, 20, 20, 21])
# At the start of a document, before and after what is not finite, and where an empty document stands.
RESETS = torch.zeros(1, T, dtype=torch.bool).index_fill(1, torch.tensor([4, 7, 14, 20]), True)
VALUES = (math.nan, math.inf)


def spoiled(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The arguments of a gate loop, each in turn with a number that is not finite; then with products that overflow."""
    for n, value in itertools.product(range(len(tensors)), VALUES):
        copies = [x.clone() for x in tensors]
        copies[n][0, AT].view(-1)[-1:].fill_(value) if n < 4 else copies[n][::2].fill_(value)
        yield copies
    q, k, *rest = (x.clone() for x in tensors)
    k[0, AT] = 1e200
    yield [q * 1e200, k, *rest]


def assert_as(found: Sequence[Tensor], expected: Sequence[Tensor], outputs: int) -> None:
    """Outputs are finite where they should be and nowhere else, gradients where they should be, and equal there."""
    for n, (x, y) in enumerate(zip(found, expected, strict=True)):
        fine = y.isfinite()
        assert n >= outputs or torch.equal(x.isfinite(), fine), n
        torch.testing.assert_close(x[fine], y[fine], rtol=1e-9, atol=1e-9)


def slopes(function: Callable[..., Any]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """What `values_and_gradients` gives, compiled once."""

    def loss(*arrays: Any) -> Any:
        outputs = [real_parts(x) for x in function(*arrays)]
        return sum((x * to_jax(weights(torch.empty(x.shape)))).sum() for x in outputs), outputs

    both = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        found, outputs = both(*to_jax(tuple(tensors)))
        return [to_torch(x) for x in [*outputs, *(real_parts(jnp.conj(x)) for x in found)]]

    return run


def in_pieces(q: Tensor, k: Tensor, v: Tensor, a: Tensor, start: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """The definition, of what lies between two resets or borders of documents at a time."""
    bounds, resets = BOUNDS, RESETS[0]
    if reverse:
        (q, k, v, a), start, resets = (x.flip(1) for x in (q, k, v, a)), start.flip(0), resets.flip(0)
        bounds = T - bounds.flip(0)
    outputs, finals = [], []
    for n, (begin, end) in enumerate(itertools.pairwise(bounds.tolist())):
        state = start[n : n + 1]
        cuts = [begin, *(t for t in range(begin, end) if resets[t]), end]
        for first, last in itertools.pairwise(cuts):
            if first < last:
                part = [x[:, first:last] for x in (q, k, v, a)]
                y, state = ops.gate_loop(*part, None if resets[first] else state, backend="eager")
                outputs.append(y)
        finals.append(state)
    y, final = torch.cat(outputs, 1), torch.cat(finals)
    return (y.flip(1), final.flip(0)) if reverse else (y, final)


@pytest.mark.parametrize(("size", "reverse"), [("K3V5", False), ("K1V1", True)])
def test_documents_and_resets_keep_it_where_it_belongs(size: str, reverse: bool) -> None:
    args = make_loop(1, T, **SIZES[size])
    start = torch.randn(5, *args.initial.shape[1:], dtype=args.initial.dtype)
    run = slopes(partial(gj.gate_loop, resets=to_jax(RESETS), cu_seqlens=to_jax(BOUNDS), reverse=reverse))
    for tensors in spoiled([*args[:4], start]):
        assert_as(run(tensors), values_and_gradients(partial(in_pieces, reverse=reverse), tensors), 2)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_tree_for_other_devices_keeps_it_where_it_belongs(reverse: bool) -> None:
    a, x, h = to_jax(make_scan(2, T, 3, kinds="rrr"))
    resets = to_jax(RESETS.expand(2, T))
    spoiled_gates = [a.at[0, t].set(jnp.inf) for t in (AT, 0 if reverse else -1)]
    arguments = [(a, x.at[0, AT].set(jnp.nan), h), (a, x, h.at[0].set(jnp.nan)), *((a, x, h) for a in spoiled_gates)]

    @partial(jax.jit, static_argnums=(0, 1))
    def both(states: Any, gradients: Any, arrays: Any, marks: Any) -> Any:
        a, x, h = map(Pair, arrays)
        found = states(a, x, h, marks, reverse)
        return jax.tree.leaves((found, recurrence._fitting(gradients, reverse, a, found, h, marks, found.map(jnp.sin))))

    for arrays, marks in itertools.product(arguments, (None, resets)):
        steps = both(recurrence._step_by_step, recurrence._gradients_step_by_step, arrays, marks)
        tree = both(recurrence._as_a_tree, recurrence._gradients_as_trees, arrays, marks)
        assert_as([to_torch(x) for x in tree], [to_torch(x) for x in steps], 4)


def test_nothing_is_computed_twice_where_all_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not under `vmap` either; and one row's trouble is none of the others'."""
    exact, calls = chunks._chunk_by_steps, []

    def counted(*arguments: Any) -> Any:
        jax.debug.callback(lambda: calls.append(1))
        return exact(*arguments)

    monkeypatch.setattr(chunks, "_chunk_by_steps", counted)
    q, k, v, a, _ = to_jax(make_loop(3, 8))
    rows = jax.jit(jax.vmap(lambda *row: gj.gate_loop(*(x[None] for x in row))[0][0]))
    fine = rows(q, k, v, a)
    jax.effects_barrier()
    assert not calls
    spoilt = rows(q, k.at[1, 5].set(jnp.nan), v, a)
    jax.effects_barrier()
    assert calls
    lost = jnp.zeros((3, 8), bool).at[1, 5:].set(True)
    assert jnp.array_equal(~jnp.isfinite(spoilt).all((2, 3)), lost)
    assert jnp.allclose(spoilt[~lost], fine[~lost], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        gj.GateLoopedAttention(8, heads=2, conv_size=3, gate="ring", head_norm=True),
        gj.GateLoopedAttention(8, conv_size=3, gate="paper"),
        gj.SimpleGateLoopLayer(8, post_ln=True, reverse=True),
    ],
    ids=["heads", "channels", "simple, reverse"],
)
def test_a_layer_keeps_it_where_it_belongs(layer: Any) -> None:
    params, marks = layer.init(jax.random.key(0)), to_jax(RESETS)
    x = jax.random.normal(jax.random.key(1), (1, T, 8))
    run = jax.jit(lambda x, state: layer.apply(params, x, state, resets=marks, return_state=True))
    _, state = jax.eval_shape(lambda x: layer.apply(params, x, return_state=True), x)
    zero, lost = (jax.tree.map(lambda part, n=n: jnp.full(part.shape, n), state) for n in (0.0, jnp.nan))
    expected, _ = run(x, zero)
    y, after = run(x.at[0, AT].set(jnp.nan), lost)
    # What comes in lasts to the first reset in the order of the scan, what stands at AT from there to the next one.
    touched = [8, AT] if layer.reverse else [*range(4), *range(AT, 14)]
    fine = jnp.ones(T, bool).at[jnp.array(touched)].set(False)
    assert jnp.array_equal(jnp.isfinite(y[0]).all(-1), fine)
    assert jnp.allclose(y[0, fine], expected[0, fine], rtol=1e-12, atol=1e-12)
    assert all(jnp.isfinite(part).all() for part in after)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_an_infinite_logit_is_a_gate_of_0_or_1(fraction: float) -> None:
    z = jnp.array([jnp.inf, 0.0, -jnp.inf, 0.0])
    re, im, scale = gj.head_gates(z, gate="ring", bias=(jnp.zeros(2), jnp.zeros(2)), fraction=fraction)
    assert re.tolist() == [1, 0]
    assert im.tolist() == [0, 0]
    assert jnp.allclose(scale, jnp.array([0.0, 1.0]))
    slope = jax.grad(lambda x: gj.head_gates(x, gate="paper", fraction=fraction)[0].sum())(jnp.array([0.0, 0.0]))
    assert slope.tolist() == [0.25 * fraction, 0]
