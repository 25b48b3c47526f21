"""The Triton kernels for matrix states, run as Python: values and all gradients against `eager` in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    Loop,
    assert_equal,
    cast,
    make_loop,
    nan_filled_memory,
    real_parts,
    rms_ratio,
    values_and_gradients,
    weights,
)
from torch import Tensor

from gateloop_transformer.ops import gate_loop
from gateloop_transformer.ops.backends import eager, triton_matrix
from gateloop_transformer.ops.backends.triton_launch import written_down
from gateloop_transformer.ops.layout import PLAIN, Layout
from gateloop_transformer.ops.pairs import Pair, split
from gateloop_transformer.ops.recurrences import GateLoop


def triton_loop(loop: Loop, reverse: bool = False, layout: Layout = PLAIN, start: bool = True) -> list[Tensor]:
    """y, the last state, and the gradients of everything through both, in the order of `eager_loop`."""
    q, k, v, a, initial = loop
    record = GateLoop(q, k, v, split(a), split(initial) if start else None, reverse, layout=layout)
    with nan_filled_memory():
        y, final = triton_matrix.forward(record)
        cotangent = weights(real_parts(final.complex())).to(final.re.dtype)
        grad_final = Pair(*cotangent.unbind(-1)) if final.im is not None else Pair(cotangent)
        dy = weights(y).to(y.dtype)
        *inputs, da, d_initial = triton_matrix.backward(record, dy, grad_final)
    results = [y, real_parts(final.complex()), *inputs, real_parts(da.complex())]
    return [*results, real_parts(d_initial.complex())] if start else results


def eager_loop(loop: Loop, reverse: bool = False, layout: Layout = PLAIN, start: bool = True) -> list[Tensor]:
    """The same by the definition, in float64."""
    tensors = [x.to(torch.complex128 if x.is_complex() else torch.float64) for x in loop[: 5 if start else 4]]

    def run(*arguments: Tensor) -> Any:
        marks = {"resets": layout.resets, "cu_seqlens": layout.cu_seqlens}
        return gate_loop(*arguments, reverse=reverse, backend="eager", **marks)

    return values_and_gradients(run, tensors)


def with_states(loop: Loop, count: int) -> Loop:
    """The loop with initial states for so many documents."""
    many = make_loop(count, 1, *loop.initial.shape[1:], is_complex=loop.initial.is_complex(), seed=7)
    return loop._replace(initial=many.initial)


@pytest.mark.parametrize(
    ("is_complex", "per_channel", "reverse"),
    [(False, False, True), (False, True, False), (True, False, True), (True, True, True)],
)
def test_triton_is_eager(is_complex: bool, per_channel: bool, reverse: bool) -> None:
    # Three chunks of 16, the last of 5; heads with long memories, with gates of 1, with gates of 0.
    loop = make_loop(1, 37, 3, 3, 5, is_complex=is_complex, per_channel=per_channel)
    assert_equal(triton_loop(loop, reverse), eager_loop(loop, reverse), 1e-12)


def test_triton_rows_of_one_step_without_initial_state() -> None:
    loop = make_loop(2, 1, is_complex=True)
    assert_equal(triton_loop(loop, start=False), eager_loop(loop, start=False), 1e-12)


@pytest.mark.parametrize("per_channel", [False, True])
def test_triton_goes_through_blocks_of_keys_and_values(per_channel: bool) -> None:
    # Real gates per channel: the interpreter multiplies complex ones one by one.
    loop = make_loop(1, 17, 1, 40, 35, is_complex=not per_channel, per_channel=per_channel, seed=1)
    assert_equal(triton_loop(loop), eager_loop(loop), 1e-12)


@pytest.mark.parametrize("per_channel", [False, True])
def test_triton_heads_may_have_one_key(per_channel: bool) -> None:
    loop = make_loop(1, 18, 2, 1, 3, is_complex=True, per_channel=per_channel)
    assert_equal(triton_loop(loop), eager_loop(loop), 1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_triton_begins_anew_at_resets(reverse: bool) -> None:
    loop = make_loop(2, 35, 1, is_complex=True)
    resets = torch.zeros(2, 35, dtype=torch.bool)
    resets[0, [15, 16, 32]] = resets[1, [0, 1, 17, 18, 34]] = True
    layout = Layout(resets)
    assert_equal(triton_loop(loop, reverse, layout), eager_loop(loop, reverse, layout), 1e-12)


@pytest.mark.parametrize(("per_channel", "reverse"), [(False, False), (False, True), (True, True)])
def test_triton_keeps_packed_documents_apart(per_channel: bool, reverse: bool) -> None:
    bounds = torch.tensor([0, 0, 5, 22, 22, 38, 40, 40])
    resets = torch.zeros(1, 40, dtype=torch.bool)
    resets[0, [3, 21, 39]] = True
    loop = with_states(make_loop(1, 40, 1, 3, 2, is_complex=True, per_channel=per_channel), 7)
    layout = Layout(resets, bounds)
    assert_equal(triton_loop(loop, reverse, layout), eager_loop(loop, reverse, layout), 1e-12)


def test_triton_documents_do_not_see_their_neighbours() -> None:
    loop = with_states(make_loop(1, 23, 1, is_complex=True), 2)
    alone = Loop(*(x[:, 6:] for x in loop[:4]), loop.initial[1:])
    together = triton_loop(loop, layout=Layout(cu_seqlens=torch.tensor([0, 6, 23])))
    assert torch.equal(together[0][:, 6:], triton_loop(alone)[0])


def test_triton_takes_real_gates_with_a_complex_state() -> None:
    loop = make_loop(1, 20, 1, is_complex=True)
    loop = loop._replace(gates=loop.gates.real)
    complex_gates = loop._replace(gates=torch.complex(loop.gates, torch.zeros_like(loop.gates)))
    assert_equal(triton_loop(loop), eager_loop(complex_gates), 1e-12)


def test_triton_gates_may_grow_and_hold_their_phase() -> None:
    loop = make_loop(1, 40, 1, 2, 2, is_complex=True)
    phase = 2.5 * torch.arange(40, dtype=torch.float64).reshape(1, 40, 1)
    loop = loop._replace(gates=torch.polar(torch.full_like(phase, 1.05), phase))
    assert_equal(triton_loop(loop), eager_loop(loop), 1e-12)


def test_triton_reads_any_strides() -> None:
    loop = make_loop(2, 3, 2, 4, 4, is_complex=True)
    packed = torch.cat(loop[:3], -1).transpose(0, 1).contiguous().transpose(0, 1)
    q, k, _ = packed.chunk(3, -1)
    values = loop.values.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not q.is_contiguous()
    assert_equal(triton_loop(Loop(q, k, values, *loop[3:])), triton_loop(loop), 0.0)


@pytest.mark.parametrize("is_complex", [False, True])
def test_triton_keeps_the_digits_of_float32_in_long_chunks(is_complex: bool) -> None:
    loop = Loop(*cast(make_loop(1, 70, 1, 3, 5, is_complex=is_complex), torch.float32))
    for x, expected in zip(triton_loop(loop), eager_loop(loop), strict=True):
        assert x.dtype == torch.float32
        assert rms_ratio(x, expected) < 1e-6


@pytest.mark.parametrize("per_channel", [False, True])
def test_triton_rounds_bfloat16_where_it_multiplies(per_channel: bool) -> None:
    T, K, V = (20, 3, 5) if per_channel else (70, 17, 20)
    q, k, v, a, start = make_loop(1, T, 1, K, V, is_complex=True, per_channel=per_channel)
    rounded = [x.to(torch.bfloat16) for x in (q, k, v)]
    loop = Loop(*rounded, *cast((a, start), torch.float32))
    results, expected = triton_loop(loop), eager_loop(loop)
    for n, (x, reference) in enumerate(zip(results, expected, strict=True)):
        assert x.dtype == (torch.bfloat16 if n in (0, 2, 3, 4) else torch.float32)
        assert rms_ratio(x, reference) < 0.01, n


def test_triton_states_may_exceed_the_range_of_float16() -> None:
    loop = make_loop(1, 20, 1, is_complex=True)
    large = [torch.full_like(x, 200).half() for x in loop[:3]]
    ones = torch.ones_like(loop.gates).to(torch.complex64)
    y, final = triton_matrix.forward(GateLoop(large[0] / 1e6, *large[1:], split(ones)))
    assert final.re.max() == 20 * 200 * 200
    assert y.isfinite().all()


@pytest.mark.parametrize("per_channel", [False, True], ids=["per head", "per channel"])
@pytest.mark.parametrize("kinds", ["rr", "cc", "rc", "cr"])
def test_triton_one_step_equals_eager(kinds: str, per_channel: bool) -> None:
    q, k, v, a, _ = make_loop(3, 1, 2, 5, 7, is_complex=kinds[0] == "c", per_channel=per_channel)
    start = make_loop(3, 1, 2, 5, 7, is_complex=kinds[1] == "c", seed=1).initial
    for initial in (split(start), None):
        for resets in (None, torch.tensor([[True], [False], [True]])):
            loop = GateLoop(q, k, v, split(a), initial, layout=Layout(resets))
            results = triton_matrix.forward(loop)
            expected = eager.gate_loop_forward(loop)
            assert_equal([results[0], *results[1].parts()], [expected[0], *expected[1].parts()], 1e-14)


def test_a_triton_decoding_step_is_one_launch_for_matrix_states() -> None:
    x, a, state = (torch.empty(shape, device="meta") for shape in ((2, 1, 3, 8), (2, 1, 3), (2, 3, 8, 8)))
    with written_down() as listed:
        triton_matrix.forward(GateLoop(x, x, x, Pair(a, a), Pair(state, state)))
    assert [launch.kernel.__name__ for launch in listed] == ["step"]
