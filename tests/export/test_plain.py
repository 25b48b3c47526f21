"""The operators in plain torch give what the library's give, under every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import assert_equal, make_loop
from models import MODELS
from options import VOCABULARY, build
from torch import Tensor

from gateloop_transformer.export.plain import PlainOperators
from gateloop_transformer.ops.backends import eager
from gateloop_transformer.ops.pairs import Pair
from gateloop_transformer.ops.plain import any_length, plain_gate_loop
from gateloop_transformer.ops.recurrences import GateLoop


class Watched(PlainOperators):
    """Knows which of the library's operators were called, and which of them were not replaced."""

    def __init__(self, max_length: int | None) -> None:
        super().__init__(max_length)
        self.replaced: set[str] = set()
        self.missed: set[str] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(function, torch._ops.OpOverload) and function.namespace == "gateloop":
            (self.replaced if function in self.table else self.missed).add(str(function))
        return super().__torch_function__(function, types, args, kwargs)


def leaves(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [x for item in state for x in leaves(item)]


# Attention with its norm behind it is plain torch already.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "rotary after"])
def test_a_model_gives_the_same_in_plain_torch(name: str) -> None:
    model = build(name).double()
    for T, longest in ((1, None), (7, 100), (70, None)):
        ids = torch.randint(VOCABULARY, (2, T))
        with Watched(longest) as mode:
            plain = model(ids, return_state=True)
        assert mode.replaced
        assert not mode.missed
        expected = model(ids, return_state=True)
        assert_equal(leaves(plain), leaves(expected))
        state = expected[1].detach()
        with Watched(longest) as mode:
            plain = model(ids, state, return_state=True)
        assert not mode.missed
        assert_equal(leaves(plain), leaves(model(ids, state, return_state=True)))


@pytest.mark.parametrize("T", [1, 2, 64, 65, 200])
@pytest.mark.parametrize("per_channel", [False, True])
def test_extreme_gates_are_exact(T: int, per_channel: bool) -> None:
    loop = make_loop(2, T, 3, 3, 5, per_channel=per_channel)
    gates, start = (Pair(x.real.clone(), x.imag.clone()) for x in (loop.gates, loop.initial))
    for a, initial in ((gates, start), (gates, None), (Pair(gates.re), None)):
        record = GateLoop(*loop[:3], a, initial)
        expected, last = eager.gate_loop_forward(record)
        for longest in (None, 200):
            with any_length(longest):
                y, final = plain_gate_loop(record)
            assert_equal([y, *final.parts()], [expected, *last.parts()])


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("place", range(4))
def test_what_is_not_finite_reaches_no_earlier_step(place: int, per_channel: bool) -> None:
    loop = make_loop(1, 80, 3, 3, 5, per_channel=per_channel)
    inputs = [x.clone() for x in loop[:4]]
    inputs[place][:, 21] = torch.nan
    a = Pair(inputs[3].real.clone(), inputs[3].imag.clone())
    record = GateLoop(*inputs[:3], a)
    expected, _ = eager.gate_loop_forward(record)
    for longest in (None, 80):
        with any_length(longest):
            y, _ = plain_gate_loop(record)
        assert torch.equal(y.isfinite(), expected.isfinite())
        assert y[:, :21].isfinite().all()
