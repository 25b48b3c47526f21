"""Laws of the generic scan."""

from __future__ import annotations

import pytest
import torch
from cases import LENGTHS, assert_equal, compiled, make_scan, values_and_gradients
from torch import Tensor

from gateloop_transformer.ops import associative_scan, linear_scan

Elements = tuple[Tensor, ...]


def recurrence(left: Elements, right: Elements) -> Elements:
    return left[0] * right[0], right[0] * left[1] + right[1]


@pytest.mark.parametrize("T", [*LENGTHS, 3, 4, 5, 64])
@pytest.mark.parametrize("kinds", ["rrr", "ccc"])
def test_of_the_recurrence_is_the_linear_scan(T: int, kinds: str) -> None:
    a, x, _ = make_scan(T=T, kinds=kinds)

    def scan(a: Tensor, x: Tensor) -> Tensor:
        return associative_scan(recurrence, (a, x))[1]

    assert_equal(*(values_and_gradients(function, (a, x)) for function in (scan, linear_scan)))


@pytest.mark.parametrize("T", [1, 2, 7, 64, 65])
def test_an_operator_that_does_not_commute_keeps_its_order(T: int) -> None:
    matrices = torch.linalg.qr(torch.randn(2, T, 3, 3, dtype=torch.float64))[0]
    (products,) = associative_scan(lambda left, right: (left[0] @ right[0],), (matrices,))
    expected = matrices[:, 0]
    for t in range(T):
        expected = matrices[:, 0] if t == 0 else expected @ matrices[:, t]
        assert_equal([products[:, t]], [expected])


def test_gradcheck() -> None:
    a, x, _ = make_scan(1, 6, 2)
    args = a.requires_grad_(), x.requires_grad_()
    assert torch.autograd.gradcheck(lambda *elems: associative_scan(recurrence, elems), args)


def test_takes_linear_work_in_logarithmic_rounds() -> None:
    sizes: list[int] = []

    def add(left: Elements, right: Elements) -> Elements:
        sizes.append(right[0].shape[1])
        return (left[0] + right[0],)

    associative_scan(add, (torch.ones(1, 1000),))
    assert sum(sizes) < 2 * 1000
    assert len(sizes) <= 2 * 10


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 5, 3)])
def test_nothing_in_is_nothing_out(shape: tuple[int, ...]) -> None:
    assert associative_scan(recurrence, (torch.ones(shape), torch.ones(shape)))[1].shape == shape


def test_integers_and_lists_are_fine() -> None:
    (largest,) = associative_scan(
        lambda left, right: (torch.maximum(left[0], right[0]),), [torch.tensor([[3, 1, 4, 1, 5]])]
    )
    assert largest.tolist() == [[3, 3, 4, 4, 5]]


def test_compiles_into_one_graph() -> None:
    a, x, _ = make_scan(T=13, kinds="rrr")

    def scan(a: Tensor, x: Tensor) -> Elements:
        return associative_scan(recurrence, (a, x))

    one_graph = compiled(scan)
    assert_equal(*(values_and_gradients(function, (a, x)) for function in (one_graph, scan)))


def test_bad_input_is_named() -> None:
    x = torch.ones(2, 5)
    with pytest.raises(ValueError, match="one or more tensors"):
        associative_scan(recurrence, ())
    with pytest.raises(ValueError, match=r"shape \(B, T"):
        associative_scan(recurrence, (torch.ones(3),))
    with pytest.raises(ValueError, match=r"length of axis 1.*\(2, 5\), \(2, 4\)"):
        associative_scan(recurrence, (x, x[:, 1:]))
    with pytest.raises(ValueError, match="returned 1 tensors for 2"):
        associative_scan(lambda left, right: (left[0],), (x, x))
