"""Laws of the RMS norm, on every backend."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import assert_equal, check_operator, compiled, nan_filled_memory, rms_ratio, values_and_gradients

from gateloop_transformer.ops.rms_norm import RmsNorm, rms_norm

BACKENDS = ["numba", "chunkwise"]


def arguments(*shape: int, groups: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    gamma = (groups, shape[-1]) if groups else shape[-1:]
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, gamma)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "groups"), [((1,), 0), ((3, 5), 0), ((2, 70, 33), 0), ((2, 3, 4, 17), 4), ((130, 64), 0)]
)
def test_equals_the_formula(backend: str, shape: tuple[int, ...], groups: int) -> None:
    def formula(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) * shape[-1] ** 0.5 * gamma

    args = arguments(*shape, groups=groups)
    assert_equal(*(values_and_gradients(function, args) for function in (partial(rms_norm, backend=backend), formula)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    args = [x.requires_grad_() for x in arguments(3, 2, 9, groups=2)]
    assert torch.autograd.gradcheck(partial(rms_norm, backend=backend), args)


@pytest.mark.parametrize("size", [0.0, 1e-14, 1e-20])
def test_no_norm_is_divided_by_below_the_limit(size: float) -> None:
    x, gamma = torch.full((2, 20), size, dtype=torch.float64), torch.ones(20, dtype=torch.float64)
    args = [x, gamma]
    assert_equal(*(values_and_gradients(partial(rms_norm, backend=name), args) for name in BACKENDS), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gain", [torch.float32, torch.bfloat16])
def test_narrow_types(dtype: torch.dtype, gain: torch.dtype) -> None:
    x, gamma = arguments(100, 40)
    args = [x.to(dtype), gamma.to(gain)]
    exact = values_and_gradients(partial(rms_norm, backend="chunkwise"), [x.double() for x in args])
    ours, plain = (values_and_gradients(partial(rms_norm, backend=name), args) for name in BACKENDS)
    for value, other, reference in zip(ours, plain, exact, strict=True):
        assert value.dtype == other.dtype
        assert rms_ratio(value, reference) <= max(2 * rms_ratio(other, reference), 1e-6)


@pytest.mark.parametrize("own", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_result_has_the_type_that_is_asked_for(own: torch.dtype, dtype: torch.dtype) -> None:
    args = [x.to(dtype) for x in arguments(70, 40)]
    ours, plain = (values_and_gradients(partial(rms_norm, backend=name, dtype=own), args) for name in BACKENDS)
    assert ours[0].dtype == plain[0].dtype == own
    assert [x.dtype for x in ours[1:]] == [dtype, dtype]
    assert_equal(ours, plain, 1e-9 if {own, dtype} == {torch.float64} else 1e-2)


def test_opcheck_compile_and_memory() -> None:
    x, gamma = arguments(2, 5, 19)
    check_operator("rms_norm", RmsNorm(x, gamma, torch.float32, "numba"))
    function = partial(rms_norm, backend="numba")
    with nan_filled_memory():
        expected = values_and_gradients(function, [x, gamma])
    assert_equal(values_and_gradients(compiled(function), [x, gamma]), expected)
    assert_equal(values_and_gradients(function, [x.mT.contiguous().mT, gamma]), expected, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_in_is_nothing_out(backend: str) -> None:
    x = torch.zeros(0, 3, requires_grad=True)
    rms_norm(x, torch.ones(3), backend).sum().backward()
    assert x.grad is not None


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"gamma must be \(D,\) or \(G, D\), the last dimensions of x, not \(3,\)"):
        rms_norm(torch.zeros(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match=r"dtype must be a floating-point type, not torch\.int64"):
        rms_norm(torch.zeros(2, 4), torch.ones(4), dtype=torch.int64)
    with pytest.raises(ValueError, match="x must be a floating-point tensor"):
        rms_norm(torch.zeros(2, 4, dtype=torch.long), torch.ones(4))
