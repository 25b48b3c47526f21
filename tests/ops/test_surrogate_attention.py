"""The quadratic form is the gate loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    LENGTHS,
    assert_equal,
    cast,
    check_operator,
    compiled,
    make_loop,
    nan_filled_memory,
    rms_ratio,
    values_and_gradients,
)
from torch import Tensor

from gateloop_transformer.ops import gate_loop, surrogate_attention
from gateloop_transformer.ops.pairs import split
from gateloop_transformer.ops.recurrences import GateLoop

KINDS = [(is_complex, per_channel) for is_complex in (False, True) for per_channel in (False, True)]


def loop(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
    return gate_loop(q, k, v, a, backend="eager")[0]


@pytest.mark.parametrize("T", LENGTHS[:-1])
@pytest.mark.parametrize(("is_complex", "per_channel"), KINDS)
def test_is_the_gate_loop_in_value_and_gradient(T: int, is_complex: bool, per_channel: bool) -> None:
    args = make_loop(T=T, is_complex=is_complex, per_channel=per_channel)[:4]
    assert_equal(*(values_and_gradients(function, args) for function in (surrogate_attention, loop)))


def test_is_the_gate_loop_over_a_thousand_steps() -> None:
    args = make_loop(1, 1000, 3, 2, 2)[:4]
    assert_equal([surrogate_attention(*args)], [loop(*args)])


def test_head_size_one() -> None:
    args = make_loop(K=1, V=1)[:4]
    assert_equal(*(values_and_gradients(function, args) for function in (surrogate_attention, loop)))


def test_gradcheck_and_opcheck() -> None:
    args = make_loop(1, 7, 1, 2, 1)[:4]
    check_operator("surrogate_attention", GateLoop(*(x.clone() for x in args[:3]), split(args[3])))
    assert torch.autograd.gradcheck(surrogate_attention, [x.requires_grad_() for x in args])


def test_float32_has_a_relative_error_of_1e_5() -> None:
    args = cast(make_loop(T=300)[:4], torch.float32)
    exact = values_and_gradients(loop, cast(args, torch.float64))
    for x, reference in zip(values_and_gradients(surrogate_attention, args), exact, strict=True):
        assert rms_ratio(x, reference) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_errs_like_its_rounding(dtype: torch.dtype) -> None:
    q, k, v, a = make_loop()[:4]
    args = [x.to(dtype) for x in (q, k, v, a.real, a.imag)]

    def parts(function: Any) -> Any:
        return lambda q, k, v, re, im: function(q, k, v, (re, im))

    exact = values_and_gradients(parts(loop), [x.double() for x in args])
    for x, reference in zip(values_and_gradients(parts(surrogate_attention), args), exact, strict=True):
        assert x.dtype == dtype
        assert rms_ratio(x, reference) <= torch.finfo(dtype).eps


@pytest.mark.parametrize(("B", "T", "V"), [(2, 0, 5), (0, 5, 5), (2, 5, 0)])
def test_nothing_in_is_nothing_out(B: int, T: int, V: int) -> None:
    args = [x.requires_grad_() for x in make_loop(B, T, 3, 2, V)[:4]]
    y = surrogate_attention(*args)
    y.sum().backward()
    assert y.shape == (B, T, 3, V)
    assert not any(x.grad.any() for x in args)


def test_strides_and_uninitialised_memory_do_not_matter() -> None:
    args = make_loop()[:4]
    expected = values_and_gradients(surrogate_attention, args)

    def strided(*args: Tensor) -> Tensor:
        return surrogate_attention(*(x.transpose(0, -1).contiguous().transpose(0, -1) for x in args))

    with nan_filled_memory():
        assert_equal(values_and_gradients(strided, args), expected, 1e-14)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiles_into_one_graph(compiler: str) -> None:
    q, k, v, a = make_loop()[:4]

    def function(q: Tensor, k: Tensor, v: Tensor, re: Tensor, im: Tensor) -> Tensor:
        return surrogate_attention(q * 2, k, v, (re, im))

    args = q, k, v, a.real.clone(), a.imag.clone()
    one_graph = compiled(function, compiler)
    assert_equal(*(values_and_gradients(f, args) for f in (one_graph, function)))


def test_bad_input_is_named() -> None:
    q, k, v, a = make_loop(2)[:4]
    with pytest.raises(ValueError, match=r"surrogate_attention: keys must have shape .*\(2, 20, 3, 3\)"):
        surrogate_attention(q, k[:, 1:], v, a)
    with pytest.raises(ValueError, match="surrogate_attention: gates must have shape"):
        surrogate_attention(q, k, v, a[..., 0])
