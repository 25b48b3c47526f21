"""Laws of the fused gate loop at head size 1, on every backend; the definition is the composition on `eager`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import (
    INTERPRETED,
    assert_equal,
    check_operator,
    compiled,
    nan_filled_memory,
    rms_ratio,
    values_and_gradients,
)
from torch import Tensor

from gateloop_transformer.ops.channel_loop import PackedLoop, channel_gate_loop, simple_gate_loop
from gateloop_transformer.ops.dispatch import FUSED
from gateloop_transformer.ops.gates import GATES
from gateloop_transformer.ops.layout import PLAIN
from gateloop_transformer.ops.pairs import Pair

# JAX compiles every shape for seconds, and runs no kernel of its own here.
BACKENDS = ["numba", "triton", "chunkwise", "eager"]


def arguments(B: int = 2, T: int = 21, D: int = 5, gate: str = "polar", swish: bool = True) -> list[Tensor]:
    """Float64: qkv, projections, initial (re, im), then swish and, for "ring", bias (logits, phases)."""
    generator = torch.Generator().manual_seed(T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    z = 3 * normal(B, T, 2 * D)
    more = [normal(B, T, D)] if swish else []
    bias = [2 + normal(D), normal(D)] if gate == "ring" else []
    return [normal(B, T, 3 * D), z, normal(B, D), normal(B, D), *more, *bias]


def run(backend: str, gate: str, swish: bool = True, reverse: bool = False) -> Callable[..., Any]:
    def call(qkv: Tensor, z: Tensor, re: Tensor, im: Tensor, *rest: Tensor) -> Any:
        s = rest[0] if swish else None
        bias = (rest[-2], rest[-1]) if gate == "ring" else None
        options: dict[str, Any] = {"gate": gate, "bias": bias, "swish": s, "fraction": 0.7}
        return channel_gate_loop(qkv, z, (re, im), reverse=reverse, backend=backend, **options)

    return call


def simple(backend: str, reverse: bool = False) -> Callable[..., Any]:
    return partial(simple_gate_loop, reverse=reverse, backend=backend)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("T", "D"), [(1, 1), (2, 8), (63, 5), (129, 20), (1000, 3), (40, 33)])
def test_numba_equals_eager(gate: str, reverse: bool, T: int, D: int) -> None:
    # With and without the factor there are kernels of their own, which take a second each: each gate in vectors and in
    # single numbers, and with and without the factor, but not every product of these.
    swish = D < 8 or (D == 20 and gate != "paper")
    args = arguments(T=T, D=D, gate=gate, swish=swish)
    functions = (run(name, gate, swish, reverse) for name in ("numba", "eager"))
    assert_equal(*(values_and_gradients(function, args) for function in functions))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("T", "D"), [(1, 1), (2, 8), (63, 5), (129, 20), (1000, 3), (40, 33)])
def test_simple_numba_equals_eager(reverse: bool, T: int, D: int) -> None:
    qkva, _, h, _ = arguments(T=T, D=D, swish=False)
    assert_equal(*(values_and_gradients(simple(name, reverse), [qkva, h]) for name in ("numba", "eager")))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, gate: str) -> None:
    # A gradient multiplied by a fraction is not the derivative: here it is 1.
    args = [x.requires_grad_() for x in arguments(1, 7, 2, gate)]

    def call(qkv: Tensor, z: Tensor, re: Tensor, im: Tensor, s: Tensor, *bias: Tensor) -> Any:
        options: dict[str, Any] = {"gate": gate, "bias": bias or None, "swish": s}
        y, final = channel_gate_loop(qkv, z, (re, im), backend=backend, **options)
        return y, *final

    assert torch.autograd.gradcheck(call, args, fast_mode=backend in INTERPRETED)


@pytest.mark.parametrize("backend", BACKENDS)
def test_simple_gradcheck(backend: str) -> None:
    qkva, _, h, _ = arguments(1, 7, 2, swish=False)
    given = [qkva.requires_grad_(), h.requires_grad_()]
    assert torch.autograd.gradcheck(simple(backend), given, fast_mode=backend in INTERPRETED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("gate", GATES)
def test_narrow_types_lose_no_more_than_their_own_rounding(gate: str, dtype: torch.dtype) -> None:
    args = [x.to(dtype) for x in arguments(T=130, D=24, gate=gate)]
    exact = values_and_gradients(run("eager", gate), [x.double() for x in args])
    ours, naive = (values_and_gradients(run(name, gate), args) for name in ("numba", "eager"))
    for value, reference, plain in zip(ours, exact, naive, strict=True):
        assert rms_ratio(value, reference) <= max(2 * rms_ratio(plain, reference), 1e-6)


# Projections of "paper" are read as those of "polar".
@pytest.mark.parametrize("gate", ["polar", "ring", pytest.param("paper", marks=pytest.mark.slow)])
def test_inputs_may_lie_anyhow_in_memory(gate: str) -> None:
    args = arguments(3, 30, 20, gate)
    expected = values_and_gradients(run("numba", gate), args)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim == 3 else x for x in args]
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 3 else x for x in args]
    for moved in (turned, apart):
        assert any(not x.is_contiguous() for x in moved)
        assert_equal(values_and_gradients(run("numba", gate), moved), expected, 0)


@pytest.mark.parametrize("size", [0.0, -0.0, 1e-30, 1e-20, 1e18, 1e30])
def test_polar_is_defined_at_every_size(size: float) -> None:
    z = torch.full((1, 40, 40), size, requires_grad=True)
    qkv = torch.ones(1, 40, 60, requires_grad=True)
    y, _ = channel_gate_loop(qkv, z, gate="polar", backend="numba")
    expected, _ = channel_gate_loop(qkv, z, gate="polar", backend="eager")
    assert rms_ratio(y, expected) < 1e-5
    gradients = torch.autograd.grad(y.sum(), (qkv, z))
    assert all(bool(x.isfinite().all()) for x in gradients)


def test_long_phases_keep_their_digits() -> None:
    z = torch.stack([torch.full((1, 5, 16), 2.0), 1e5 * torch.rand(1, 5, 16)], -1).flatten(-2)
    qkv = torch.randn(1, 5, 48)
    y, _ = channel_gate_loop(qkv, z, gate="paper", backend="numba")
    expected, _ = channel_gate_loop(qkv.double(), z.double(), gate="paper", backend="eager")
    assert rms_ratio(y, expected) < 1e-6


@pytest.mark.parametrize("gate", GATES)
def test_opcheck(gate: str) -> None:
    qkv, z, re, im, s, *bias = arguments(T=9, gate=gate)
    ring = Pair(*bias) if bias else None
    check_operator("channel_loop", PackedLoop(qkv, z, s, ring, Pair(re, im), gate, 0.5, False, "numba", PLAIN))


def test_compiles_into_one_graph() -> None:
    args = arguments()
    assert_equal(
        values_and_gradients(compiled(run("numba", "polar")), args), values_and_gradients(run("numba", "polar"), args)
    )


def test_only_the_state_is_asked_for() -> None:
    args = [x.requires_grad_() for x in arguments()]
    results = []
    for backend in ("numba", "eager"):
        _, (re, im) = run(backend, "polar")(*args)
        results.append(torch.autograd.grad((re * im).sum(), args[:4]))
    assert_equal(*results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("B", "T", "D"), [(2, 0, 3), (0, 5, 3)])
def test_nothing_in_is_nothing_out_and_the_state_stays(backend: str, B: int, T: int, D: int) -> None:
    args = [x.requires_grad_() for x in arguments(B, T, D)]
    y, (re, im) = run(backend, "polar")(*args)
    assert y.shape == (B, T, D)
    assert torch.equal(re, args[2])
    assert torch.equal(im, args[3])
    (y.sum() + re.sum()).backward()
    assert torch.equal(args[2].grad, torch.ones_like(args[2]))
    h = torch.randn(B, D, dtype=torch.float64)
    assert torch.equal(simple_gate_loop(args[0], h, backend=backend)[1], h)


def test_results_are_written_whole() -> None:
    with nan_filled_memory():
        for gate in GATES:
            assert not any(
                bool(x.isnan().any()) for x in values_and_gradients(run("numba", gate), arguments(gate=gate))
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": "round"}, "gate must be one of polar, paper, ring, not 'round'"),
        ({"gate": "ring"}, "'ring' needs a bias"),
        ({"bias": (torch.zeros(2), torch.zeros(2))}, "other gates take none"),
        ({"qkv": torch.zeros(1, 3, 7)}, r"qkv must have shape \(B, T, 3·D\), not \(1, 3, 7\)"),
        ({"projections": torch.zeros(1, 3, 2)}, r"projections must have shape \(B, T, 2·D\) = \(1, 3, 4\)"),
        ({"projections": torch.zeros(1, 3, 4).double()}, "projections must have qkv's dtype torch.float32"),
        ({"swish": torch.zeros(1, 3, 3)}, r"swish must have shape \(B, T, D\) = \(1, 3, 2\)"),
        ({"initial": (torch.zeros(2, 2), torch.zeros(1, 2))}, r"initial must have shape \(B, D\) = \(1, 2\)"),
        ({"backend": "abacus"}, "unknown backend 'abacus'"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"qkv": torch.zeros(1, 3, 6), "projections": torch.zeros(1, 3, 4)} | change
    with pytest.raises(ValueError, match=message):
        channel_gate_loop(**given)


def test_wrong_arguments_of_simple_are_named() -> None:
    with pytest.raises(ValueError, match=r"qkva must have shape \(B, T, 3·D\), not \(1, 3, 7\)"):
        simple_gate_loop(torch.zeros(1, 3, 7))
    with pytest.raises(ValueError, match=r"initial must have shape \(B, D\) = \(1, 2\), not \(1, 3\)"):
        simple_gate_loop(torch.zeros(1, 3, 6), torch.zeros(1, 3))


def test_every_fused_backend_is_tested() -> None:
    assert set(FUSED) <= set(BACKENDS)


@pytest.mark.parametrize("bias", [(torch.zeros(2),), torch.zeros(2, 2)])
def test_a_pair_of_another_form_is_refused(bias: Any) -> None:
    qkv, projections = torch.zeros(1, 3, 6), torch.zeros(1, 3, 4)
    with pytest.raises(ValueError, match="bias must be a tuple of two tensors"):
        channel_gate_loop(qkv, projections, gate="ring", bias=bias)
