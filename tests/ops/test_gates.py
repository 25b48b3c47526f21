"""Laws of the gates."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import assert_equal, compiled, values_and_gradients
from torch import Tensor

from gateloop_transformer.ops import paper, polar, ring, ring_input_scale
from gateloop_transformer.ops.gates import ring_start

DTYPES = [torch.float32, torch.float64]
GATES = [polar, paper, ring]
Gate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def as_defined(real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
    """σ(|z|)·e^{i arg z}, letter by letter."""
    z = torch.complex(real, imaginary)
    a = torch.sigmoid(z.abs()) * torch.exp(1j * z.angle())
    return a.real, a.imag


def test_polar_is_its_definition_in_value_and_gradient() -> None:
    axis = torch.tensor([-30.0, -2.0, -0.5, 1e-3, 0.7, 3.0, 20.0], dtype=torch.float64)
    z = [part.flatten() for part in torch.meshgrid(axis, axis - 0.1, indexing="ij")]
    assert_equal(*(values_and_gradients(gate, z) for gate in (polar, as_defined)), 1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("re", [0.0, -0.0])
@pytest.mark.parametrize("im", [0.0, -0.0])
def test_polar_of_zero_of_either_sign_is_plus_a_half_with_no_gradient(re: float, im: float, dtype: torch.dtype) -> None:
    z = torch.tensor([re], dtype=dtype), torch.tensor([im], dtype=dtype)
    values = values_and_gradients(polar, z)
    assert [x.item() for x in values] == [0.5, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e-22, 1e-10, 1e10, 1e30, 3e38])
@pytest.mark.parametrize("turn", [0, 0.3, 1, 2, 3, -1, math.pi])
def test_polar_is_finite_and_in_its_ring_at_every_size(size: float, turn: float, dtype: torch.dtype) -> None:
    z = [torch.tensor([size * f(turn)], dtype=torch.float64).to(dtype) for f in (math.cos, math.sin)]
    re, im, *gradients = values_and_gradients(polar, z)
    assert all(x.isfinite().all() for x in gradients)
    assert 0.5 * (1 - 1e-6) <= math.hypot(re.item(), im.item()) <= 1 + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-3, 1e10])
def test_polar_keeps_the_phase_of_small_and_large_numbers(size: float, dtype: torch.dtype) -> None:
    re, im = polar(torch.tensor(size * math.cos(2.5), dtype=dtype), torch.tensor(size * math.sin(2.5), dtype=dtype))
    assert math.atan2(im.item(), re.item()) == pytest.approx(2.5, abs=1e-6)


def test_polar_with_a_real_projection_is_a_signed_real_gate() -> None:
    z = torch.tensor([-2.0, 2.0])
    re, im = polar(z, torch.zeros_like(z))
    assert torch.allclose(re, torch.tensor([-1.0, 1.0]) * torch.sigmoid(torch.tensor(2.0)))
    assert not im.any()


@pytest.mark.parametrize("gate", [paper, ring])
def test_paper_and_ring_are_sigmoid_times_a_turn(gate: Gate) -> None:
    logit, phase = torch.randn(2, 50, dtype=torch.float64) * 3

    def expected(logit: Tensor, phase: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(logit) * phase.cos(), torch.sigmoid(logit) * phase.sin()

    args = logit, phase
    assert_equal(*(values_and_gradients(f, args) for f in (gate, expected)), 1e-14)


@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(gate: Gate) -> None:
    args = torch.randn(2, 9, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: gate(*z), args)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gates_are_computed_in_float32_or_better(gate: Gate, dtype: torch.dtype) -> None:
    z = torch.randn(2, 5).to(dtype).requires_grad_()
    re, im = gate(*z)
    assert re.dtype == im.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (re + im).sum().backward()
    assert z.grad.dtype == dtype


@pytest.mark.parametrize("gate", GATES)
def test_empty_gates_are_empty(gate: Gate) -> None:
    assert all(part.shape == (2, 0) for part in gate(torch.ones(2, 0), torch.ones(2, 0)))


@pytest.mark.parametrize("gate", GATES)
def test_compiles_into_one_graph(gate: Gate) -> None:
    args = tuple(torch.randn(2, 7, dtype=torch.float64))
    one_graph = compiled(gate)
    assert_equal(*(values_and_gradients(f, args) for f in (one_graph, gate)))


@pytest.mark.parametrize("gate", GATES)
def test_bad_input_is_named(gate: Gate) -> None:
    name, z = gate.__name__, torch.ones(3)
    with pytest.raises(ValueError, match=rf"{name}: .*one shape, not \(3,\) and \(2,\)"):
        gate(z, z[1:])
    with pytest.raises(ValueError, match=f"{name}: .*not torch.int64"):
        gate(z, z.long())
    with pytest.raises(ValueError, match=f"{name}: .*not torch.complex64"):
        gate(z.to(torch.complex64), z)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ring_input_scale_is_the_root_of_one_minus_the_square(dtype: torch.dtype) -> None:
    logit = torch.linspace(-8, 8, 33, dtype=dtype)

    def expected(logit: Tensor) -> Tensor:
        return (1 - torch.sigmoid(logit.double()) ** 2).sqrt().to(dtype)

    results = (values_and_gradients(f, [logit]) for f in (ring_input_scale, expected))
    assert_equal(*results, 1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *DTYPES])
def test_ring_input_scale_is_finite_at_every_logit(dtype: torch.dtype) -> None:
    logit = torch.tensor([-1e4, -90, -20, 0, 20, 90, 1e4], dtype=dtype).requires_grad_()
    scale = ring_input_scale(logit)
    scale.sum().backward()
    assert ((scale >= 0) & (scale <= 1)).all()
    assert (logit.grad.abs() <= 0.5).all()


def test_a_state_fed_by_noise_keeps_unit_variance() -> None:
    logit = torch.tensor(2.0)
    a, scale = torch.sigmoid(logit), ring_input_scale(logit)
    h = torch.zeros(20_000)
    for _ in range(60):
        h = a * h + scale * torch.randn_like(h)
    assert h.var().item() == pytest.approx(1, abs=0.05)


def test_ring_starts_with_memories_from_one_step_to_the_longest() -> None:
    logits, phases = ring_start(100, 1000)
    memories = 1 / (1 - torch.sigmoid(logits.double()))
    assert 1 < memories.min() < 1.1
    assert 900 < memories.max() < 1000
    ratios = memories[1:] / memories[:-1]
    assert torch.allclose(ratios, ratios[0].expand_as(ratios), rtol=1e-3)
    assert (phases.abs() <= math.pi / memories * 1.001).all()


@pytest.mark.parametrize("longest", [1, 0, -3, float("nan")])
def test_ring_start_refuses_memories_of_no_step(longest: float) -> None:
    with pytest.raises(ValueError, match=f"above 1 step, not {longest}"):
        ring_start(4, longest)
