"""Laws of the elementwise recurrence, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from cases import (
    INTERPRETED,
    LENGTHS,
    assert_equal,
    cast,
    check_operator,
    compiled,
    make_scan,
    naive_linear_scan,
    nan_filled_memory,
    pieces,
    rms_ratio,
    values_and_gradients,
)
from cases import SCAN_KINDS as KINDS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gateloop_transformer.ops import linear_scan
from gateloop_transformer.ops.pairs import split
from gateloop_transformer.ops.recurrences import LinearScan

# Real (r) or complex (c): gates, inputs, initial state.


def run(backend: str, reverse: bool = False) -> Callable[..., Any]:
    return partial(linear_scan, reverse=reverse, backend=backend)


def comparisons() -> list[Any]:
    """Everything with everything; for those that take seconds for each case, every option somewhere."""
    every = list(product(LENGTHS, (False, True), KINDS))
    chosen = [case for n, case in enumerate(every) if n % 8 == (n // 8 * 3) % 8]
    fast: list[Any] = [(name, *case) for name in ("numba", "chunkwise") for case in every]
    few: list[Any] = [("jax", *case) for case in chosen]
    few += [pytest.param("triton", *case, marks=[pytest.mark.slow] * (case[0] == LENGTHS[-1])) for case in chosen]
    return fast + few


@pytest.mark.parametrize(("backend", "T", "reverse", "kinds"), comparisons())
def test_backends_equal_eager(backend: str, T: int, reverse: bool, kinds: str) -> None:
    args = make_scan(T=T, kinds=kinds)
    assert_equal(*(values_and_gradients(run(name, reverse), args) for name in (backend, "eager")))


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_eager_is_the_formula_and_its_gradient_is_autograds(kinds: str, reverse: bool) -> None:
    args = make_scan(T=33, kinds=kinds)
    functions = run("eager", reverse), partial(naive_linear_scan, reverse=reverse)
    assert_equal(*(values_and_gradients(function, args) for function in functions), 1e-12)


@pytest.mark.parametrize("kinds", ["rrr", "ccc"])
def test_gradcheck(backend: str, kinds: str) -> None:
    args = make_scan(1, 7, 3, kinds=kinds)
    assert torch.autograd.gradcheck(run(backend), [x.requires_grad_() for x in args], fast_mode=backend in INTERPRETED)


@pytest.mark.parametrize("D", [1, 3])
def test_a_single_channel_of_a_single_row(backend: str, D: int) -> None:
    args = make_scan(1, 1, D)
    assert_equal(*(values_and_gradients(function, args) for function in (run(backend), naive_linear_scan)))


def test_no_initial_state_is_zero(backend: str) -> None:
    a, x, h = make_scan()
    none = values_and_gradients(run(backend), [a, x])
    assert_equal(none, values_and_gradients(run(backend), [a, x, torch.zeros_like(h)])[:-1])


@pytest.mark.parametrize("kinds", ["rrr", "crc", "rcr"])
def test_opcheck(kinds: str) -> None:
    for backend in ("eager", "chunkwise", "numba"):
        check_operator("linear_scan", LinearScan(*(split(x) for x in make_scan(T=9, kinds=kinds)), True, backend))


@pytest.mark.parametrize(("B", "T", "D"), [(2, 0, 3), (0, 5, 3), (2, 5, 0)])
def test_nothing_in_is_nothing_out(backend: str, B: int, T: int, D: int) -> None:
    args = [x.requires_grad_() for x in make_scan(B, T, D)]
    states = linear_scan(*args, backend=backend)
    assert states.shape == (B, T, D)
    assert states.dtype == torch.complex128
    states.real.sum().backward()
    assert not any(x.grad.any() for x in args)


@pytest.mark.parametrize("backend", ["eager", "chunkwise", "numba"])
@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(0, 70), max_size=5), reverse=st.booleans())
def test_a_split_sequence_carries_its_state(backend: str, cuts: list[int], reverse: bool) -> None:
    a, x, h = make_scan(T=70)
    expected = linear_scan(a, x, h, reverse=reverse, backend=backend)
    states = []
    for piece in list(zip(pieces(a, cuts), pieces(x, cuts), strict=True))[:: -1 if reverse else 1]:
        states.append(linear_scan(*piece, h, reverse=reverse, backend=backend))
        if states[-1].shape[1]:
            h = states[-1][:, 0 if reverse else -1]
    assert_equal([torch.cat(states[:: -1 if reverse else 1], 1)], [expected])


def test_the_future_does_not_reach_the_past(backend: str) -> None:
    args = [x.requires_grad_() for x in make_scan()]
    states = linear_scan(*args, backend=backend)[:, :13]
    changed = [torch.cat([x[:, :13], x[:, 13:] * 0.5 + 0.1], 1) for x in args[:2]]
    assert_equal([linear_scan(*changed, args[2], backend=backend)[:, :13]], [states], 1e-14)
    states.abs().sum().backward()
    assert all(not x.grad[:, 13:].any() and x.grad[:, :13].any() for x in args[:2])


def test_gates_of_one_are_a_cumulative_sum_and_of_zero_the_inputs(backend: str) -> None:
    a, x, _ = make_scan()
    assert_equal([linear_scan(torch.ones_like(a), x, backend=backend)], [x.cumsum(1)])
    assert_equal([linear_scan(torch.zeros_like(a), x, backend=backend)], [x])


def test_reverse_is_flip(backend: str) -> None:
    a, x, h = make_scan()
    flipped = linear_scan(a.flip(1), x.flip(1), h, backend=backend).flip(1)
    assert_equal([linear_scan(a, x, h, reverse=True, backend=backend)], [flipped])


def test_batch_rows_are_independent(backend: str) -> None:
    args = make_scan(B=2)
    whole = linear_scan(*args, backend=backend)
    alone = torch.cat([linear_scan(*(x[n : n + 1] for x in args), backend=backend) for n in range(2)])
    assert_equal([alone], [whole], 1e-13)


@pytest.mark.parametrize("kinds", ["rrr", "ccc"])
def test_float32_has_a_relative_error_of_1e_5(backend: str, kinds: str) -> None:
    args = cast(make_scan(T=70 if backend in INTERPRETED else 500, kinds=kinds), torch.float32)
    expected = values_and_gradients(run("eager"), cast(args, torch.float64))
    for x, reference in zip(values_and_gradients(run(backend), args), expected, strict=True):
        assert x.dtype == torch.float32
        assert rms_ratio(x, reference) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_errs_at_most_twice_as_much_as_the_formula_in_it(backend: str, dtype: torch.dtype) -> None:
    args = [x.to(dtype) for x in make_scan(T=63, kinds="rrr")]
    exact = values_and_gradients(naive_linear_scan, [x.double() for x in args])
    rough = values_and_gradients(naive_linear_scan, args)
    for x, near, reference in zip(values_and_gradients(run(backend), args), rough, exact, strict=True):
        assert x.dtype == dtype
        assert rms_ratio(x, reference) <= 2 * rms_ratio(near, reference) + torch.finfo(dtype).eps


def test_precisions_mix(backend: str) -> None:
    a, x, h = make_scan(kinds="crr")
    results = values_and_gradients(run(backend), [a, x.float(), h.bfloat16()])
    exact = values_and_gradients(run("eager"), [a, x, h])
    dtypes = [torch.float64, torch.float64, torch.float32, torch.bfloat16]
    assert [x.dtype for x in results] == dtypes
    assert all(rms_ratio(x, reference) < 0.01 for x, reference in zip(results, exact, strict=True))


def test_strides_do_not_matter(backend: str) -> None:
    args = make_scan()
    expected = values_and_gradients(run(backend), args)

    def strided(*args: Tensor) -> Tensor:
        return linear_scan(*(x.transpose(0, -1).contiguous().transpose(0, -1) for x in args), backend=backend)

    def expanded(*args: Tensor) -> Tensor:
        return linear_scan(*(x[:1].expand_as(x) for x in args), backend=backend)

    def repeated(*args: Tensor) -> Tensor:
        return linear_scan(*(torch.cat([x[:1], x[:1]]) for x in args), backend=backend)

    assert_equal(values_and_gradients(strided, args), expected, 1e-13)
    assert_equal(*(values_and_gradients(function, args) for function in (expanded, repeated)), 1e-13)


@pytest.mark.parametrize("reverse", [False, True])
def test_uninitialised_memory_is_never_read(backend: str, reverse: bool) -> None:
    args = make_scan()
    expected = values_and_gradients(run(backend, reverse), args)
    with nan_filled_memory():
        results = values_and_gradients(run(backend, reverse), args)
    assert_equal(results, expected, 0)


def test_arguments_are_not_modified(backend: str) -> None:
    args = [x.requires_grad_() for x in make_scan(kinds="rrr")]
    before = [x.detach().clone() for x in args]
    states = linear_scan(*args, backend=backend)
    states.backward(torch.ones_like(states))
    assert all(torch.equal(x, old) for x, old in zip(args, before, strict=True))


@pytest.mark.parametrize("kinds", ["rrr", "ccc"])
def test_compiles_into_one_graph(backend: str, kinds: str) -> None:
    args = make_scan(kinds=kinds)

    def function(a: Tensor, x: Tensor, h: Tensor) -> Tensor:
        return linear_scan(a.conj(), x * 2, h, backend=backend).sin()

    one_graph = compiled(function)
    assert_equal(*(values_and_gradients(f, args) for f in (one_graph, function)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiles_with_inductor() -> None:
    args = make_scan(kinds="rrr")
    one_graph = compiled(linear_scan, "inductor")
    assert_equal(*(values_and_gradients(f, args) for f in (one_graph, linear_scan)))


def test_bad_input_is_named() -> None:
    a, x, h = make_scan(2, 7, 3)
    bad = {
        r"inputs must have shape \(B, T, D\), not \(2, 7\)": (a, x[..., 0], h),
        r"gates must have shape .* = \(2, 7, 3\), not \(2, 6, 3\)": (a[:, 1:], x, h),
        r"initial must have shape \(B, D\) = \(2, 3\), not \(2, 1, 3\)": (a, x, h[:, None]),
        r"inputs must be a floating-point tensor, not torch.int64": (a, x.real.long(), h),
        r"gates must be a floating-point tensor, not torch.bool": (a.real > 0, x, h),
        r"inputs must be a torch tensor, not ndarray": (a, x.numpy(), h),
        r"gates must be a torch tensor, not NoneType": (None, x, h),
        r"initial must be a torch tensor, not list": (a, x, [0.0]),
        r"one device.*'gates': 'meta'": (a.to("meta"), x, h),
    }
    for message, arguments in bad.items():
        with pytest.raises(ValueError, match=f"linear_scan: {message}|linear_scan: .*{message}"):
            linear_scan(*arguments)
