"""Resets and packed documents in every operator: nothing crosses a border, and nothing else changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from cases import assert_equal, check_operator, compiled, rms_ratio, values_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gateloop_transformer.ops import gate_loop, heinsen_scan, linear_scan, surrogate_attention
from gateloop_transformer.ops.channel_loop import channel_gate_loop, simple_gate_loop
from gateloop_transformer.ops.layout import Layout
from gateloop_transformer.ops.pairs import Pair
from gateloop_transformer.ops.recurrences import GateLoop

Call = Callable[..., Any]


class Operator(NamedTuple):
    """Sizes after (B, T) of what it reads at every step, sizes after B of its states, and how it is called."""

    inputs: tuple[tuple[int, ...], ...]
    states: tuple[tuple[int, ...], ...]
    call: Call
    # The first `gates` of the inputs are squashed to (0, 1).
    gates: int = 0
    backends: tuple[str, ...] = ("numba", "chunkwise", "eager")
    both_ways: bool = True
    # The same bits whatever stands beside a document.
    exact: bool = False


def _scan(a: Tensor, x: Tensor, h: Tensor, **options: Any) -> Any:
    return linear_scan(a, x, h, **options)


def _complex_scan(re: Tensor, im: Tensor, x: Tensor, h: Tensor, g: Tensor, **options: Any) -> Any:
    return linear_scan(torch.complex(re, im - 0.5), x, torch.complex(h, g), **options)


def _loop(re: Tensor, im: Tensor, q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor, **options: Any) -> Any:
    return gate_loop(q, k, v, (re, im - 0.5), (s, z), **options)


def _real_loop(a: Tensor, q: Tensor, k: Tensor, v: Tensor, s: Tensor, **options: Any) -> Any:
    return gate_loop(q, k, v, a, s, **options)


def _channels(gate: str) -> Call:
    def call(qkv: Tensor, z: Tensor, swish: Tensor, re: Tensor, im: Tensor, **options: Any) -> Any:
        bias = (re.new_full((18,), 0.3), re.new_full((18,), -0.2)) if gate == "ring" else None
        return channel_gate_loop(qkv, z, (re, im), gate=gate, bias=bias, swish=swish, fraction=0.7, **options)

    return call


def _heinsen(a: Tensor, x: Tensor, h: Tensor, *, backend: str, reverse: bool, **options: Any) -> Any:
    return heinsen_scan(a, x, h, **options)


def _surrogate(
    re: Tensor, im: Tensor, q: Tensor, k: Tensor, v: Tensor, *, backend: str, reverse: bool, **options: Any
) -> Any:
    return surrogate_attention(q, k, v, (re, im - 0.5), **options)


def _loop_sizes(H: int, K: int, V: int, per_channel: bool = False) -> tuple[tuple[int, ...], ...]:
    gate = (H, K) if per_channel else (H,)
    return gate, gate, (H, K), (H, K), (H, V)


OPERATORS = {
    "linear_scan": Operator(((5,), (5,)), ((5,),), _scan, 1, exact=True),
    "linear_scan, 37 channels": Operator(((37,), (37,)), ((37,),), _scan, 1, exact=True),
    "linear_scan, complex": Operator(((19,), (19,), (19,)), ((19,), (19,)), _complex_scan, 2),
    "gate_loop, head size 1": Operator(_loop_sizes(18, 1, 1), ((18, 1, 1),) * 2, _loop, 2, exact=True),
    "gate_loop, heads": Operator(_loop_sizes(2, 3, 5), ((2, 3, 5),) * 2, _loop, 2),
    "gate_loop, many heads": Operator(_loop_sizes(18, 3, 5), ((18, 3, 5),) * 2, _loop, 2),
    "gate_loop, wide heads": Operator(_loop_sizes(1, 20, 16), ((1, 20, 16),) * 2, _loop, 2),
    "gate_loop, real": Operator(((2,), (2, 4), (2, 4), (2, 4)), ((2, 4, 4),), _real_loop, 1),
    "gate_loop, per channel": Operator(_loop_sizes(2, 3, 4, True), ((2, 3, 4),) * 2, _loop, 2),
    "channels, polar": Operator(((54,), (36,), (18,)), ((18,),) * 2, _channels("polar"), exact=True),
    "channels, paper": Operator(((54,), (36,), (18,)), ((18,),) * 2, _channels("paper"), exact=True),
    "channels, ring": Operator(((54,), (36,), (18,)), ((18,),) * 2, _channels("ring"), exact=True),
    "simple_gate_loop": Operator(((54,),), ((18,),), simple_gate_loop, exact=True),
    "heinsen_scan": Operator(((5,), (5,)), ((5,),), _heinsen, 1, ("auto",), both_ways=False),
    "surrogate_attention": Operator(_loop_sizes(2, 3, 4), (), _surrogate, 2, ("auto",), both_ways=False),
}
CASES = [(name, backend) for name, operator in OPERATORS.items() for backend in operator.backends]
LENGTHS = [0, 5, 1, 40, 0, 17, 64, 1, 0]


def make(operator: Operator, B: int, T: int, states: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(B + T)
    shapes = [(B, T, *size) for size in operator.inputs] + [(states, *size) for size in operator.states]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [(x.sigmoid() if n < operator.gates else x).to(dtype) for n, x in enumerate(tensors)]


def bounds_of(lengths: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def alone(operator: Operator, lengths: Sequence[int], **options: Any) -> Call:
    """Every document by itself, results put together."""
    count = len(operator.inputs)

    def function(*tensors: Tensor) -> Any:
        outputs, finals = [], []
        for n, (a, b) in enumerate(itertools.pairwise(bounds_of(lengths))):
            inputs = [x[:, a:b] for x in tensors[:count]]
            result = operator.call(*inputs, *(x[n : n + 1] for x in tensors[count:]), **options)
            y, *final = result if isinstance(result, tuple) else (result,)
            outputs.append(y)
            finals.append(final[0] if final and isinstance(final[0], tuple) else final)
        return torch.cat(outputs, 1), *(torch.cat(part) for part in zip(*finals, strict=True))

    return function


def packed(operator: Operator, lengths: Sequence[int], **options: Any) -> Call:
    def function(*tensors: Tensor) -> Any:
        return operator.call(*tensors, cu_seqlens=torch.tensor(bounds_of(lengths)), **options)

    return function


def reference(operator: Operator) -> str:
    return "auto" if operator.backends == ("auto",) else "eager"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_a_packed_document_gives_what_it_gives_alone(name: str, backend: str, reverse: bool) -> None:
    operator = OPERATORS[name]
    if reverse and not operator.both_ways:
        pytest.skip("runs forward only")
    tensors = make(operator, 1, sum(LENGTHS), len(LENGTHS))
    options = {"backend": backend, "reverse": reverse}
    results = values_and_gradients(packed(operator, LENGTHS, **options), tensors)
    options["backend"] = reference(operator)
    assert_equal(results, values_and_gradients(alone(operator, LENGTHS, **options), tensors))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    name=st.sampled_from(sorted(OPERATORS)),
    choice=st.integers(0, 2),
    reverse=st.booleans(),
)
def test_any_packing(lengths: list[int], name: str, choice: int, reverse: bool) -> None:
    operator = OPERATORS[name]
    reverse = reverse and operator.both_ways
    tensors = make(operator, 1, sum(lengths), len(lengths))
    backend = operator.backends[choice % len(operator.backends)]
    results = values_and_gradients(packed(operator, lengths, backend=backend, reverse=reverse), tensors)
    expected = alone(operator, lengths, backend=reference(operator), reverse=reverse)
    assert_equal(results, values_and_gradients(expected, tensors))
    narrow = packed(operator, lengths, backend=backend, reverse=reverse)(*(x.float() for x in tensors))
    wide = expected(*tensors)
    for x, y in zip(_flat(narrow), _flat(wide), strict=True):
        assert not y.numel() or rms_ratio(_real(x), _real(y)) < 1e-5


def _flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for item in result for x in _flat(item)]


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


# What is carried from chunk to chunk is as wide whatever the inputs are: one narrow type, where the most is computed.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float64) for name, operator in OPERATORS.items() if operator.exact),
        ("channels, ring", torch.bfloat16),
        *(
            pytest.param(name, dtype, marks=pytest.mark.slow)
            for name, operator in OPERATORS.items()
            for dtype in (torch.float32, torch.bfloat16)
            if operator.exact and (name, dtype) != ("channels, ring", torch.bfloat16)
        ),
    ],
)
def test_elementwise_operators_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    operator = OPERATORS[name]
    tensors = make(operator, 1, sum(LENGTHS), len(LENGTHS), dtype)
    for reverse in (False, True):
        options = {"backend": "numba", "reverse": reverse}
        results = values_and_gradients(packed(operator, LENGTHS, **options), tensors)
        expected = values_and_gradients(alone(operator, LENGTHS, **options), tensors)
        assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if operator.exact])
def test_nothing_leaks_not_even_what_is_no_number(name: str) -> None:
    operator = OPERATORS[name]
    lengths = [20, 3, 30]
    tensors = make(operator, 1, 53, 3)
    expected = _flat(packed(operator, lengths, backend="numba", reverse=False)(*tensors))[0]
    for x in tensors[: len(operator.inputs)]:
        x[:, 20:23] = torch.nan
    y = _flat(packed(operator, lengths, backend="numba", reverse=False)(*tensors))[0]
    assert y[:, 20:23].isnan().all()
    assert torch.equal(y[:, :20], expected[:, :20])
    assert torch.equal(y[:, 23:], expected[:, 23:])
    resets = torch.zeros(1, 53, dtype=torch.bool)
    resets[0, [20, 23]] = True
    again = _flat(
        operator.call(
            *tensors[: len(operator.inputs)],
            *(x[:1] for x in tensors[len(operator.inputs) :]),
            resets=resets,
            backend="numba",
            reverse=False,
        )
    )[0]
    assert not again[:, 23:].isnan().any()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_a_reset_begins_anew(name: str, backend: str, reverse: bool) -> None:
    """Rows cut at their resets and computed piece by piece, only the first piece from the initial state."""
    operator = OPERATORS[name]
    if reverse and not operator.both_ways:
        pytest.skip("runs forward only")
    B, T = 2, 70
    generator = torch.Generator().manual_seed(3)
    resets = torch.rand(B, T, generator=generator) < 0.1
    resets[0, [0, -1]] = True
    count = len(operator.inputs)
    options = {"backend": reference(operator), "reverse": reverse}

    def pieces(*tensors: Tensor) -> Any:
        rows, finals = [], []
        for b in range(B):
            marks = [t + reverse for t in range(T) if resets[b, t]]
            edges = sorted({0, T, *marks})
            outputs, last = [], []
            for a, c in itertools.pairwise(edges):
                first = c == T and not resets[b, -1] if reverse else a == 0 and not resets[b, 0]
                states = [x[b : b + 1] * (1 if first else 0) for x in tensors[count:]]
                result = operator.call(*(x[b : b + 1, a:c] for x in tensors[:count]), *states, **options)
                y, *final = result if isinstance(result, tuple) else (result,)
                outputs.append(y)
                if a == 0 or not reverse:
                    last = final[0] if final and isinstance(final[0], tuple) else final
            rows.append(torch.cat(outputs, 1))
            finals.append(last)
        return torch.cat(rows), *(torch.cat(part) for part in zip(*finals, strict=True))

    def marked(*tensors: Tensor) -> Any:
        return operator.call(*tensors, resets=resets, backend=backend, reverse=reverse)

    tensors = make(operator, B, T, B)
    assert_equal(values_and_gradients(marked, tensors), values_and_gradients(pieces, tensors))


@pytest.mark.parametrize("name", ["linear_scan", "gate_loop, heads", "channels, ring"])
def test_documents_may_have_resets(name: str) -> None:
    operator = OPERATORS[name]
    count = len(operator.inputs)
    resets = torch.rand(1, sum(LENGTHS), generator=torch.Generator().manual_seed(1)) < 0.2
    edges = list(itertools.pairwise(bounds_of(LENGTHS)))
    for backend in operator.backends:

        def separate(*tensors: Tensor) -> Any:
            parts = [
                _flat(
                    operator.call(
                        *(x[:, a:b] for x in tensors[:count]),
                        *(x[n : n + 1] for x in tensors[count:]),
                        resets=resets[:, a:b],
                        backend="eager",
                    )
                )
                for n, (a, b) in enumerate(edges)
            ]
            y, *final = zip(*parts, strict=True)
            return torch.cat(y, 1), *(torch.cat(part) for part in final)

        tensors = make(operator, 1, sum(LENGTHS), len(LENGTHS))
        together = packed(operator, LENGTHS, backend=backend, resets=resets)
        assert_equal(values_and_gradients(together, tensors), values_and_gradients(separate, tensors))


def test_the_jax_backend_packs() -> None:
    operator, lengths = OPERATORS["gate_loop, heads"], [3, 0, 2]
    pytest.importorskip("jax")
    tensors = make(operator, 1, 5, 3)
    assert_equal(
        values_and_gradients(packed(operator, lengths, backend="jax"), tensors),
        values_and_gradients(alone(operator, lengths, backend="eager"), tensors),
    )


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("lengths", [[0], [0, 0], []])
def test_nothing_in_is_nothing_out_and_states_stay(name: str, lengths: list[int]) -> None:
    operator = OPERATORS[name]
    for backend in operator.backends:
        tensors = make(operator, 1, 0, len(lengths))
        result = packed(operator, lengths, backend=backend, reverse=False)(*tensors)
        y, *final = _flat(result)
        assert y.shape[1] == 0
        states = tensors[len(operator.inputs) :]
        assert all(torch.equal(x, s) for x, s in zip(final, states, strict=False))


@pytest.mark.parametrize("name", ["linear_scan", "gate_loop, heads", "channels, ring", "simple_gate_loop"])
def test_compiles_into_one_graph(name: str) -> None:
    operator, lengths = OPERATORS[name], [5, 0, 9]
    tensors = make(operator, 1, 14, 3)
    marks = torch.tensor(bounds_of(lengths)), torch.arange(14)[None] % 4 == 3

    def function(*tensors: Tensor) -> Any:
        *tensors, bounds, resets = tensors
        return operator.call(*tensors, cu_seqlens=bounds, resets=resets, backend="numba")

    assert_equal(
        values_and_gradients(lambda *x: compiled(function)(*x, *marks), tensors),
        values_and_gradients(lambda *x: function(*x, *marks), tensors),
    )


def test_opcheck() -> None:
    re, im, *inputs = make(OPERATORS["gate_loop, heads"], 1, 14, 3)
    q, k, v, s, z = inputs
    bounds, resets = torch.tensor([0, 5, 5, 14]), torch.arange(14)[None] % 4 == 3
    record = GateLoop(q, k, v, Pair(re, im), Pair(s, z), False, "numba", Layout(resets, bounds))
    check_operator("gate_loop", record)


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 3])}, r"cu_seqlens must ascend from 0 to T = 5, not \[0, 3\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 5])}, r"cu_seqlens must ascend"),
        ({"cu_seqlens": torch.tensor([1, 5])}, r"cu_seqlens must ascend"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, r"cu_seqlens must be integers of shape \(N \+ 1,\)"),
        ({"cu_seqlens": torch.tensor([[0, 5]])}, r"cu_seqlens must be integers of shape \(N \+ 1,\)"),
        ({"cu_seqlens": [0, 5]}, r"cu_seqlens must be a torch tensor, not list"),
        ({"resets": torch.zeros(1, 4, dtype=torch.bool)}, r"resets must be booleans of shape \(B, T\) = \(1, 5\)"),
        ({"resets": torch.zeros(1, 5)}, r"resets must be booleans"),
    ],
)
@pytest.mark.parametrize("name", OPERATORS)
def test_wrong_marks_are_refused(name: str, marks: dict[str, Any], message: str) -> None:
    operator = OPERATORS[name]
    with pytest.raises(ValueError, match=message):
        operator.call(*make(operator, 1, 5, 1), **marks, backend="auto", reverse=False)


@pytest.mark.parametrize("name", OPERATORS)
def test_documents_share_one_row_and_have_a_state_each(name: str) -> None:
    operator = OPERATORS[name]
    options: dict[str, Any] = {"cu_seqlens": torch.tensor([0, 2, 5]), "backend": "auto", "reverse": False}
    with pytest.raises(ValueError, match=r"packed in one row, not in B = 2"):
        operator.call(*make(operator, 2, 5, 2), **options)
    if operator.states:
        with pytest.raises(ValueError, match=r"initial must have shape \(N, "):
            operator.call(*make(operator, 1, 5, 3), **options)


@pytest.mark.parametrize("name", ["linear_scan", "gate_loop, heads", "channels, ring", "simple_gate_loop"])
def test_marks_that_change_before_the_gradient_are_noticed(name: str) -> None:
    operator = OPERATORS[name]
    for mark in ("cu_seqlens", "resets"):
        tensors = [x.requires_grad_() for x in make(operator, 1, 9, 2 if mark == "cu_seqlens" else 1)]
        marks = torch.tensor([0, 4, 9]) if mark == "cu_seqlens" else torch.zeros(1, 9, dtype=torch.bool)
        y = _flat(operator.call(*tensors, **{mark: marks}, backend="numba", reverse=False))[0]
        marks[..., 1] = 5
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("name", OPERATORS)
def test_marks_on_another_device_are_refused(name: str) -> None:
    operator = OPERATORS[name]
    resets = torch.zeros(1, 5, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match="device"):
        operator.call(*make(operator, 1, 5, 1), resets=resets, backend="auto", reverse=False)


@pytest.mark.parametrize("bounds", [[0, 50, 14], [0, 2**40, 14], [0, -7, 14], [0, 3, 9]])
@pytest.mark.parametrize("name", ["linear_scan", "gate_loop, heads", "channels, ring"])
def test_documents_that_are_none_are_refused_in_compiled_code_too(name: str, bounds: list[int]) -> None:
    operator = OPERATORS[name]
    *tensors, good = *make(operator, 1, 14, 2), torch.tensor([0, 5, 14])

    def function(*tensors: Tensor) -> Any:
        return operator.call(*tensors[:-1], cu_seqlens=tensors[-1], backend="numba")

    call = compiled(function)
    call(*tensors, good)
    with pytest.raises((ValueError, RuntimeError), match="cu_seqlens must ascend"):
        call(*tensors, torch.tensor(bounds))
