"""Operators give the same through torch's dispatcher and past it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_equal
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gateloop_transformer.ops.channel_loop import channel_gate_loop
from gateloop_transformer.ops.gate_loop import gate_loop
from gateloop_transformer.ops.head_gates import head_gates
from gateloop_transformer.ops.linear_scan import linear_scan
from gateloop_transformer.ops.rms_norm import rms_norm
from gateloop_transformer.ops.short_convolution import short_convolution


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


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    (first,) = torch.autograd.grad(rms_norm(x, torch.ones(8)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="rms_norm_backward"):
        first.sum().backward()


@pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning", "ignore:.*jit.script.*:FutureWarning")
@pytest.mark.parametrize("enabled", [True, False])
def test_tangents_are_refused_and_not_dropped(enabled: bool) -> None:
    x = torch.randn(3, 8)
    with forward_ad.dual_level(), torch.set_grad_enabled(enabled):
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="rms_norm has no forward-mode derivative, only gradients"):
            rms_norm(dual, torch.ones(8))
        rms_norm(x, torch.ones(8))


def test_profiles_name_the_operator() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    with torch.profiler.profile() as profile:
        rms_norm(x, torch.ones(8)).sum().backward()
    assert {"rms_norm", "rms_normBackward"} <= {event.key for event in profile.key_averages()}
