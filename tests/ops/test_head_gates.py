"""Laws of the gates of several heads, on every backend; the definition is the functions of `gates` in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_equal, check_operator, compiled, nan_filled_memory, rms_ratio, values_and_gradients
from torch import Tensor

from gateloop_transformer.ops.gates import GATES, ring_input_scale
from gateloop_transformer.ops.head_gates import HeadGates, head_gates
from gateloop_transformer.ops.pairs import Pair

BACKENDS = ["numba", "chunkwise"]


def arguments(*shape: int, gate: str = "polar") -> list[Tensor]:
    """Float64 projections and, for "ring", bias (logits, phases)."""
    generator = torch.Generator().manual_seed(0)
    sizes = [shape, *([shape[-1] // 2] * 2 if gate == "ring" else [])]
    return [3 * torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def run(backend: str, gate: str, real: bool = False, fraction: float = 0.7) -> Callable[..., Any]:
    def call(z: Tensor, *bias: Tensor) -> Any:
        pair = (bias[0], bias[1]) if bias else None
        results = head_gates(z, gate=gate, bias=pair, fraction=fraction, real=real, backend=backend)
        assert (results[1] is None) == real
        assert (results[2] is None) == (gate != "ring")
        return [x for x in results if x is not None]

    return call


def by_hand(gate: str, real: bool) -> Callable[..., Any]:
    def call(z: Tensor, *bias: Tensor) -> Any:
        first, second = z[..., ::2], z[..., 1::2]
        if bias:
            first, second = first + bias[0], second + bias[1]
        re, im = GATES[gate](first, 0 * second if real else second)
        return [re, *([] if real else [im]), *([ring_input_scale(first)] if gate == "ring" else [])]

    return call


SHAPES = [(2,), (3, 2), (2, 5, 6), (2, 70, 16), (5, 1000, 10), (9, 34)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_functions_of_gates(backend: str, gate: str, real: bool, shape: tuple[int, ...]) -> None:
    args = arguments(*shape, gate=gate)
    functions = run(backend, gate, real, fraction=1.0), by_hand(gate, real)
    assert_equal(*(values_and_gradients(function, args) for function in functions), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", GATES)
def test_the_fraction_is_of_the_gradient_of_projections_alone(backend: str, gate: str) -> None:
    args = arguments(2, 9, 6, gate=gate)
    part, whole = (values_and_gradients(run(backend, gate, fraction=f), args) for f in (0.25, 1.0))
    place = len(whole) - len(args)
    whole[place] /= 4
    assert_equal(part, whole, 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lanes", [1, 16])
@pytest.mark.parametrize("size", [0.0, -0.0, 1e-45, 1e-38, 1e-22, 1e-18, 1e-10, 1e10, 1e30, 3e38])
def test_polar_is_that_of_torch_at_every_size(size: float, lanes: int, dtype: torch.dtype) -> None:
    # Alone among ordinary numbers, for a vector of them takes one path.
    z = arguments(lanes, 2)[0].to(dtype)
    turns = torch.tensor([0.0, 0.3, 2.0, 3.0, -1.0, -2.5], dtype=dtype)
    for turn in turns:
        z[lanes // 2] = size * torch.stack([turn.cos(), turn.sin()])
        ours, plain = (values_and_gradients(run(name, "polar"), [z]) for name in BACKENDS)
        assert_equal(ours[:2], plain[:2], 1e-12 if dtype == torch.float64 else 1e-6)
        gradients = ours[2], plain[2]
        assert all(bool(x.isfinite().all()) for x in gradients)
        assert torch.allclose(*gradients, rtol=1e-12 if dtype == torch.float64 else 3e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("re", [0.0, -0.0])
@pytest.mark.parametrize("im", [0.0, -0.0])
def test_polar_of_zero_is_a_half_with_no_gradient(backend: str, dtype: torch.dtype, re: float, im: float) -> None:
    for pairs in (1, 16):
        z = torch.tensor([re, im] * pairs, dtype=dtype)
        values = values_and_gradients(run(backend, "polar"), [z])
        expected = [torch.full_like(z[::2], x) for x in (0.5, 0)]
        assert_equal(values, [*expected, torch.zeros_like(z)], 0)


@pytest.mark.parametrize("gate", GATES)
def test_what_is_not_finite_stays_so(gate: str) -> None:
    args = arguments(40, 2, gate=gate)
    args[0][3] = torch.nan
    re, im, *_ = run("numba", gate)(*args)
    assert bool(re[3].isnan() & im[3].isnan())
    assert not bool(re[4:].isnan().any() | re[:3].isnan().any())


@pytest.mark.parametrize(
    ("gate", "dtype"),
    [
        # How a number lies in memory does not depend on the gate: one of them for the third type.
        pytest.param(gate, dtype, marks=[pytest.mark.slow] * (dtype == torch.float16 and gate != "polar"))
        for gate in GATES
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ],
)
def test_narrow_types(gate: str, dtype: torch.dtype) -> None:
    args = [x.to(dtype) for x in arguments(3, 50, 14, gate=gate)]
    exact = values_and_gradients(run("chunkwise", gate), [x.double() for x in args])
    ours, plain = (values_and_gradients(run(name, gate), args) for name in BACKENDS)
    for value, other, reference in zip(ours, plain, exact, strict=True):
        assert value.dtype == other.dtype
        assert rms_ratio(value, reference) <= max(2 * rms_ratio(other, reference), 1e-6)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, gate: str) -> None:
    args = [x.requires_grad_() for x in arguments(3, 2, 6, gate=gate)]
    assert torch.autograd.gradcheck(run(backend, gate, fraction=1.0), args)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("real", [False, True])
def test_opcheck_compile_and_memory(gate: str, real: bool) -> None:
    z, *bias = arguments(2, 5, 6, gate=gate)
    record = HeadGates(z.clone(), Pair(*(x.clone() for x in bias)) if bias else None, gate, real, 0.5, "numba")
    check_operator("head_gates", record)
    function, args = run("numba", gate, real), [z.detach(), *bias]
    with nan_filled_memory():
        expected = values_and_gradients(function, args)
    assert not any(bool(x.isnan().any()) for x in expected)
    assert_equal(values_and_gradients(compiled(function), args), expected)
    assert_equal(
        values_and_gradients(function, [args[0].transpose(0, 1).contiguous().transpose(0, 1), *bias]), expected
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_in_is_nothing_out(backend: str) -> None:
    z = torch.zeros(2, 0, 6, requires_grad=True)
    bias = (torch.ones(3, requires_grad=True), torch.ones(3))
    re, im, scale = head_gates(z, gate="ring", bias=bias, backend=backend)
    assert re.shape == (2, 0, 3)
    assert im is not None
    assert scale is not None
    (re + im + scale).sum().backward()
    assert z.grad is not None
    assert not bias[0].grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": "round"}, "gate must be one of polar, paper, ring, not 'round'"),
        ({"gate": "ring"}, "'ring' needs a bias"),
        ({"bias": (torch.zeros(2), torch.zeros(2))}, "other gates take none"),
        ({"gate": "ring", "bias": (torch.zeros(2), torch.zeros(1))}, r"bias must have shape \(H,\) = \(2,\)"),
        ({"projections": torch.zeros(3, 7)}, r"projections must have shape \(..., 2·H\), not \(3, 7\)"),
        ({"projections": torch.zeros(4, dtype=torch.long)}, "projections must be a floating-point tensor"),
        ({"backend": "abacus"}, "unknown backend 'abacus'"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"projections": torch.zeros(1, 3, 4)} | change
    with pytest.raises(ValueError, match=message):
        head_gates(**given)
