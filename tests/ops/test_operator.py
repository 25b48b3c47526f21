"""Operators give the same through torch's dispatcher and past it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_equal
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gateloop_transformer.ops.channel_loop import channel_gate_loop, simple_gate_loop
from gateloop_transformer.ops.gate_loop import gate_loop
from gateloop_transformer.ops.head_gates import head_gates
from gateloop_transformer.ops.heinsen import heinsen_scan
from gateloop_transformer.ops.linear_scan import linear_scan
from gateloop_transformer.ops.rms_norm import rms_norm
from gateloop_transformer.ops.short_convolution import short_convolution
from gateloop_transformer.ops.surrogate_attention import surrogate_attention


class Watched(TorchDispatchMode):
    """Writes down what passes the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def loop(qkv: torch.Tensor, z: torch.Tensor, s: torch.Tensor, re: torch.Tensor, im: torch.Tensor) -> Any:
    y, final = channel_gate_loop(qkv, z, (re, im), gate="polar", swish=s)
    return y, *final


def gates(z: torch.Tensor, logit: torch.Tensor, phase: torch.Tensor) -> Any:
    return head_gates(z, gate="ring", bias=(logit, phase))


def matrices(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, re: torch.Tensor, im: torch.Tensor) -> Any:
    y, final = gate_loop(q, k, v, (re.sigmoid(), im.sigmoid()))
    return y, *final


OPERATORS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "rms_norm": (rms_norm, [(2, 5, 19), (19,)]),
    "short_convolution": (lambda x, w: short_convolution(x, w, True), [(2, 8, 19), (19, 4)]),
    "linear_scan": (lambda a, x: linear_scan(a.sigmoid(), x), [(2, 5, 19)] * 2),
    "channel_loop": (loop, [(2, 5, 57), (2, 5, 38), (2, 5, 19), (2, 19), (2, 19)]),
    "head_gates": (gates, [(2, 5, 38), (19,), (19,)]),
    "gate_loop": (matrices, [(2, 5, 3, 4)] * 3 + [(2, 5, 3)] * 2),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("unused", [False, True], ids=["all outputs", "the first output"])
def test_the_way_past_the_dispatcher_gives_the_same(name: str, unused: bool) -> None:
    function, shapes = OPERATORS[name]
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator) for shape in shapes]

    def run() -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in given]
        outputs = function(*leaves)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        some = outputs[:1] if unused else outputs
        torch.autograd.backward([(x * x).sum() for x in some])
        return [*(x.detach() for x in outputs), *(x.grad if x.grad is not None else torch.ones(1) for x in leaves)]

    past = run()
    with Watched() as watched:
        through = run()
    assert {f"gateloop.{name}.default", f"gateloop.{name}_backward.default"} <= watched.names
    assert_equal(past, through, 0)


def test_modes_see_an_operator_with_and_without_gradients() -> None:
    class Functions(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    x, seen = torch.randn(3, 8), []
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), Functions():
            rms_norm(x, torch.ones(8))
        assert torch.ops.gateloop.rms_norm.default in seen
        seen.clear()


def test_leaves_without_gradient_get_none() -> None:
    x, gamma = torch.randn(3, 8), torch.randn(8, requires_grad=True)
    rms_norm(x, gamma).sum().backward()
    assert x.grad is None
    assert gamma.grad is not None
    assert not rms_norm(x, gamma.detach()).requires_grad


def scanned(a: Tensor, x: Tensor, h: Tensor) -> Tensor:
    return linear_scan(a.sigmoid(), x, h)


def again(a: Tensor, x: Tensor, h: Tensor) -> Tensor:
    resets = torch.arange(a.shape[1])[None].expand(a.shape[0], -1) % 3 == 2
    return linear_scan(a.sigmoid(), x, h, reverse=True, resets=resets)


def packed(q: Tensor, k: Tensor, v: Tensor, re: Tensor) -> Any:
    return gate_loop(q, k, v, re.sigmoid(), cu_seqlens=torch.tensor([0, 2, 2, 5]))


def heads(gate: str, reverse: bool) -> Callable[..., Any]:
    def run(qkv: Tensor, z: Tensor, s: Tensor, logit: Tensor, phase: Tensor) -> Any:
        bias = (logit, phase) if gate == "ring" else None
        y, final = channel_gate_loop(qkv, z, (phase[None], logit[None]), gate=gate, bias=bias, swish=s, reverse=reverse)
        return y, *final

    return run


def weighed(*inputs: Tensor) -> Tensor:
    q, k, v, gates = (x if x.ndim == 4 else x.sigmoid() for x in inputs)
    return surrogate_attention(q, k, v, gates)


CHANNELS = [(1, 5, 9), (1, 5, 6), (1, 5, 3), (3,), (3,)]
# Functions of real tensors whose rows are computed alone, where they have a batch.
DIFFERENTIABLE: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "linear_scan": (scanned, [(2, 5, 3), (2, 5, 3), (2, 3)]),
    "linear_scan, resets": (again, [(2, 5, 3), (2, 5, 3), (2, 3)]),
    "gate_loop": (matrices, [(2, 5, 2, 3), (2, 5, 2, 3), (2, 5, 2, 4), (2, 5, 2), (2, 5, 2)]),
    "gate_loop, head size 1": (matrices, [(2, 5, 3, 1)] * 3 + [(2, 5, 3)] * 2),
    "gate_loop, documents": (packed, [(1, 5, 1, 2)] * 3 + [(1, 5, 1)]),
    "channels, polar": (heads("polar", False), CHANNELS),
    "channels, ring": (heads("ring", True), CHANNELS),
    "simple_gate_loop": (lambda x, h: simple_gate_loop(x, h), [(2, 5, 9), (2, 3)]),
    "head_gates, ring": (lambda *x: list(gates(*x)), [(2, 5, 4), (2,), (2,)]),
    "head_gates, paper": (lambda z: head_gates(z, gate="paper", fraction=1.0)[:2], [(2, 5, 4)]),
    "rms_norm": (rms_norm, [(2, 5, 3), (3,)]),
    "short_convolution": (lambda x, w: short_convolution(x, w, True), [(2, 7, 3), (3, 3)]),
    "heinsen_scan": (lambda a, x: heinsen_scan(a.sigmoid(), x), [(2, 5, 3)] * 2),
    "surrogate_attention": (weighed, [(2, 5, 2, 3)] * 3 + [(2, 5, 2)]),
}


@pytest.fixture(params=DIFFERENTIABLE)
def differentiable(request: pytest.FixtureRequest) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """A function of tensors with a tuple of tensors as its result, and arguments for it."""
    function, shapes = DIFFERENTIABLE[request.param]
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        result = function(*tensors)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    return run, given


# Of torch's own derivatives.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*jit.script.*:DeprecationWarning", "ignore:.*jit.script.*:FutureWarning"
)


def test_derivatives_of_both_orders_and_modes(differentiable: Any) -> None:
    function, given = differentiable
    leaves = [x.clone().requires_grad_() for x in given]
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_transformations_agree_with_loops(differentiable: Any) -> None:
    function, given = differentiable
    stacked = [torch.stack([x, 0.5 * x, -x]) for x in given]
    rows = [[x[n] for x in stacked] for n in range(3)]

    def loss(*tensors: Tensor) -> Tensor:
        return sum((y.sin().sum() for y in function(*tensors)), torch.zeros(()))

    def gradient(row: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in row]
        return torch.autograd.grad(loss(*leaves), leaves)

    every = tuple(range(len(given)))
    expected = [torch.stack(parts) for parts in zip(*(function(*row) for row in rows), strict=True)]
    assert_equal(torch.vmap(function)(*stacked), expected, 1e-12)
    slopes = [torch.stack(parts) for parts in zip(*(gradient(row) for row in rows), strict=True)]
    found = torch.vmap(torch.func.grad(loss, every))(*stacked)
    assert_equal(found, slopes, 1e-10)
    if len(given) > 1:
        # The last is the same for all rows: its gradients are still each row's own.
        shared = torch.vmap(torch.func.grad(loss, every), in_dims=(0,) * (len(given) - 1) + (None,))
        same = [gradient([*row[:-1], given[-1]]) for row in rows]
        assert_equal(shared(*stacked[:-1], given[-1]), [torch.stack(parts) for parts in zip(*same, strict=True)], 1e-10)
    # And a gradient through the rows that torch.vmap has made.
    leaves = [x.clone().requires_grad_() for x in stacked]
    through = torch.autograd.grad(torch.vmap(loss)(*leaves).sum(), leaves)
    assert_equal(through, slopes, 1e-10)


def test_jacobians_and_hessians_agree(differentiable: Any) -> None:
    function, given = differentiable

    def first(x: Tensor) -> Tensor:
        return function(x, *given[1:])[0]

    expected = torch.autograd.functional.jacobian(first, given[0])
    for found in (
        torch.autograd.functional.jacobian(first, given[0], vectorize=True),
        torch.func.jacrev(first)(given[0]),
        torch.func.jacfwd(first)(given[0]),
    ):
        assert_equal([found], [expected], 1e-10)
    curved = torch.func.hessian(lambda x: first(x).sin().sum())(given[0])
    assert_equal([curved], [torch.autograd.functional.hessian(lambda x: first(x).sin().sum(), given[0])], 1e-10)


def test_a_mapped_dimension_is_a_part_of_the_batch() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    with Watched() as watched:
        torch.vmap(linear_scan)(x[None].sigmoid(), x[None])
    assert "gateloop.linear_scan.default" in watched.names


def test_profiles_name_the_operator() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    with torch.profiler.profile() as profile:
        rms_norm(x, torch.ones(8)).sum().backward()
    assert {"rms_norm", "rms_normBackward"} <= {event.key for event in profile.key_averages()}
