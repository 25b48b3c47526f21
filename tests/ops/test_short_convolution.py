"""Laws of the short convolution, on every backend."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import assert_equal, check_operator, compiled, nan_filled_memory, rms_ratio, values_and_gradients

from gateloop_transformer.ops.short_convolution import ShortConvolution, short_convolution

BACKENDS = ["numba", "chunkwise"]


def arguments(B: int, T: int, D: int, taps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((B, T + taps - 1, D), (D, taps))
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 3, 5, 4), (1, 130, 33, 4), (3, 64, 16, 2), (2, 2, 17, 7)])
def test_equals_torch(backend: str, silu: bool, sizes: tuple[int, int, int, int]) -> None:
    def formula(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = F.conv1d(inputs.mT, weight.unsqueeze(1), groups=weight.shape[0]).mT
        return F.silu(y) if silu else y

    args = arguments(*sizes)
    function = partial(short_convolution, silu=silu, backend=backend)
    assert_equal(*(values_and_gradients(each, args) for each in (function, formula)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    args = [x.requires_grad_() for x in arguments(2, 3, 9, 3)]
    assert torch.autograd.gradcheck(partial(short_convolution, silu=True, backend=backend), args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gain", [torch.float32, torch.bfloat16])
def test_narrow_types(dtype: torch.dtype, gain: torch.dtype) -> None:
    inputs, weight = arguments(2, 100, 40, 4)
    args = [inputs.to(dtype), weight.to(gain)]
    function = partial(short_convolution, silu=True)
    exact = values_and_gradients(partial(function, backend="chunkwise"), [x.double() for x in args])
    ours, plain = (values_and_gradients(partial(function, backend=name), args) for name in BACKENDS)
    for value, other, reference in zip(ours, plain, exact, strict=True):
        assert value.dtype == other.dtype
        assert rms_ratio(value, reference) <= max(2 * rms_ratio(other, reference), 1e-6)


def test_opcheck_compile_and_memory() -> None:
    inputs, weight = arguments(2, 70, 19, 4)
    check_operator("short_convolution", ShortConvolution(inputs, weight, True, "numba"))
    function = partial(short_convolution, silu=True, backend="numba")
    with nan_filled_memory():
        expected = values_and_gradients(function, [inputs, weight])
    assert_equal(values_and_gradients(compiled(function), [inputs, weight]), expected)
    assert_equal(values_and_gradients(function, [inputs.mT.contiguous().mT, weight.mT.contiguous().mT]), expected, 0)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_bit(threads: int) -> None:
    args = [x.float() for x in arguments(3, 600, 64, 4)]
    before = torch.get_num_threads()
    expected = values_and_gradients(short_convolution, args)
    try:
        torch.set_num_threads(threads)
        assert_equal(values_and_gradients(short_convolution, args), expected, 0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 3, 3), (2, 5, 0)])
def test_nothing_in_is_nothing_out(backend: str, shape: tuple[int, int, int]) -> None:
    inputs = torch.zeros(shape, requires_grad=True)
    y = short_convolution(inputs, torch.ones(shape[2], 4), True, backend)
    assert y.shape == (shape[0], shape[1] - 3, shape[2])
    y.sum().backward()
    assert inputs.grad is not None


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"inputs must be \(B, L, D\) and weight \(D, taps\), not \(2, 4\)"):
        short_convolution(torch.zeros(2, 4), torch.ones(4, 2))
    with pytest.raises(ValueError, match="4 taps need 3 inputs or more, not 2"):
        short_convolution(torch.zeros(1, 2, 3), torch.ones(3, 4))
    with pytest.raises(ValueError, match="inputs must be a floating-point tensor"):
        short_convolution(torch.zeros(1, 5, 3).long(), torch.ones(3, 4))
