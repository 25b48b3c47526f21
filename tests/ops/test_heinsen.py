"""Laws of the log-space scan."""

from __future__ import annotations

import pytest
import torch
from cases import (
    LENGTHS,
    assert_equal,
    check_operator,
    compiled,
    make_scan,
    naive_linear_scan,
    nan_filled_memory,
    rms_ratio,
    values_and_gradients,
)
from torch import Tensor

from gateloop_transformer.ops import heinsen_scan, linear_scan
from gateloop_transformer.ops.pairs import Pair
from gateloop_transformer.ops.recurrences import LinearScan


def arguments(T: int = 21) -> tuple[Tensor, Tensor, Tensor]:
    """Gates in [0, 1], some 0; inputs of both signs, some 0."""
    a, x, h = make_scan(T=T, kinds="rrr")
    return a.abs(), torch.where(torch.rand_like(x) < 0.2, 0.0, x), h


@pytest.mark.parametrize("T", LENGTHS)
def test_is_the_linear_scan_in_value_and_gradient(T: int) -> None:
    args = arguments(T)
    assert_equal(*(values_and_gradients(scan, args) for scan in (heinsen_scan, linear_scan)))


def test_is_exact_where_inputs_and_gates_are_zero() -> None:
    a, x, h = arguments()
    zero = torch.zeros_like(x)
    assert not heinsen_scan(a, zero).any()
    assert_equal([heinsen_scan(zero, x, h)], [x], 1e-14)
    for args in ([a, zero, h], [zero, x, h], [zero, zero, h], [a, zero, torch.zeros_like(h)]):
        assert_equal(*(values_and_gradients(scan, args) for scan in (heinsen_scan, linear_scan)))


def test_gates_of_one_are_a_cumulative_sum() -> None:
    a, x, _ = arguments()
    assert_equal([heinsen_scan(torch.ones_like(a), x)], [x.cumsum(1)])


def test_gradcheck() -> None:
    a, x, h = (x[:, :9] if x.ndim == 3 else x for x in arguments())
    args = a.clamp(0.05, 0.95).requires_grad_(), x.requires_grad_(), h.requires_grad_()
    assert torch.autograd.gradcheck(heinsen_scan, args)


def test_opcheck() -> None:
    a, x, h = arguments(9)
    check_operator("heinsen_scan", LinearScan(Pair(a), Pair(x), Pair(h)))


def test_survives_products_below_the_smallest_float() -> None:
    gates = torch.full((1, 400, 1), 1e-300, dtype=torch.float64)
    states = heinsen_scan(gates, torch.full_like(gates, 1e-300), torch.full((1, 1), 1e300, dtype=torch.float64))
    assert states.isfinite().all()
    assert states[0, 0, 0].item() == pytest.approx(1.0)


def test_float32_keeps_its_digits() -> None:
    args = [x.float() for x in arguments(500)]
    exact = values_and_gradients(linear_scan, [x.double() for x in args])
    for x, reference in zip(values_and_gradients(heinsen_scan, args), exact, strict=True):
        assert x.dtype == torch.float32
        assert rms_ratio(x, reference) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_errs_at_most_twice_as_much_as_the_formula_in_it(dtype: torch.dtype) -> None:
    args = [x.to(dtype) for x in arguments(63)]
    exact = values_and_gradients(linear_scan, [x.double() for x in args])
    rough = values_and_gradients(naive_linear_scan, args)
    for x, near, reference in zip(values_and_gradients(heinsen_scan, args), rough, exact, strict=True):
        assert x.dtype == dtype
        assert rms_ratio(x, reference) <= 2 * rms_ratio(near, reference) + torch.finfo(dtype).eps


def test_states_are_carried_and_batch_rows_independent() -> None:
    a, x, h = arguments()
    whole = heinsen_scan(a, x, h)
    first = heinsen_scan(a[:, :8], x[:, :8], h)
    assert_equal([torch.cat([first, heinsen_scan(a[:, 8:], x[:, 8:], first[:, -1])], 1)], [whole])
    assert_equal([heinsen_scan(a[1:], x[1:], h[1:])], [whole[1:]])


@pytest.mark.parametrize(("B", "T"), [(2, 0), (0, 5)])
def test_nothing_in_is_nothing_out(B: int, T: int) -> None:
    x, h = torch.ones(B, T, 3, requires_grad=True), torch.ones(B, 3, requires_grad=True)
    states = heinsen_scan(x, x, h)
    states.sum().backward()
    assert states.shape == (B, T, 3)
    assert not x.grad.any()
    assert not h.grad.any()


def test_strides_and_uninitialised_memory_do_not_matter() -> None:
    args = arguments()
    expected = values_and_gradients(heinsen_scan, args)

    def strided(*args: Tensor) -> Tensor:
        return heinsen_scan(*(x.transpose(0, -1).contiguous().transpose(0, -1) for x in args))

    with nan_filled_memory():
        assert_equal(values_and_gradients(strided, args), expected, 1e-14)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiles_into_one_graph(compiler: str) -> None:
    args = arguments()
    one_graph = compiled(heinsen_scan, compiler)
    assert_equal(*(values_and_gradients(scan, args) for scan in (one_graph, heinsen_scan)))


def test_bad_input_is_named() -> None:
    a, x, h = arguments()
    bad = {
        r"gates must have shape .*\(2, 21, 5\), not \(2, 20, 5\)": (a[:, 1:], x, h),
        r"initial must have shape .*\(2, 5\), not \(5,\)": (a, x, h[0]),
        r"gates must be real, not torch.complex128": (a.to(torch.complex128), x, h),
        r"inputs must be a floating-point tensor, not torch.int64": (a, x.long(), h),
        r"one device": (a, x.to("meta"), h),
    }
    for message, args in bad.items():
        with pytest.raises(ValueError, match=f"heinsen_scan: .*{message}"):
            heinsen_scan(*args)
