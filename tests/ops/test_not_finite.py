"""What is not finite at a step touches only what depends on that step, on every backend, as on `eager`.

A NaN, an infinity or a product that overflows is put at one step of one argument. Outputs and gradients that are
finite on `eager` must be finite, and the same, on every backend. A reset and a document's start forget everything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from cases import INTERPRETED, KINDS, make_loop, make_scan
from torch import Tensor

from gateloop_transformer import GateLoopedAttention
from gateloop_transformer.layers.state import GateLoopState
from gateloop_transformer.ops import gate_loop, heinsen_scan, linear_scan, surrogate_attention
from gateloop_transformer.ops.channel_loop import channel_gate_loop, simple_gate_loop
from gateloop_transformer.ops.dispatch import TABLE
from gateloop_transformer.ops.gates import GATES
from gateloop_transformer.ops.head_gates import head_gates

T, AT = 40, 21
# One head, many small heads, several chunks of matrices, head size 1.
SIZES = {"K3V5": {"K": 3, "V": 5}, "H9K3V5": {"H": 9}, "K16V16": {"K": 16, "V": 16}, "K1V1": {"K": 1, "V": 1}}
VALUES = (math.nan, math.inf)

Outputs = list[Tensor]


# Those for GPUs do not keep this law yet (docs/gpu.md).
BACKENDS = [name for name in TABLE if name not in INTERPRETED]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that keeps the law."""
    name: str = request.param
    return name


def spoiled(tensors: list[Tensor], at: int) -> Iterator[list[Tensor]]:
    """Each tensor (B, T, ...) in turn with a number that is not finite at one step, in one row."""
    for n, value in itertools.product(range(len(tensors)), VALUES):
        copies = [x.clone() for x in tensors]
        copies[n][0, at].view(-1)[-1:].fill_(value)
        yield copies


def with_gradients(function: Callable[..., Outputs], tensors: list[Tensor]) -> tuple[Outputs, Outputs]:
    """Results, and gradients of all tensors."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    results = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in results]
    return results, list(torch.autograd.grad(results, leaves, given))


def is_finite(x: Tensor) -> Tensor:
    return torch.view_as_real(x).isfinite().all(-1) if x.is_complex() else x.isfinite()


def assert_as(found: tuple[Outputs, Outputs], expected: tuple[Outputs, Outputs]) -> None:
    """What `expected` has finite is the same in `found`; and results that are not finite are not made finite."""
    for a, b in zip(found[0], expected[0], strict=True):
        assert torch.equal(is_finite(a), is_finite(b))
    for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        fine = is_finite(b)
        torch.testing.assert_close(a[fine], b[fine].to(a.dtype), rtol=1e-9, atol=1e-9)


def loop_on(backend: str, **options: object) -> Callable[..., Outputs]:
    return lambda *arguments: list(gate_loop(*arguments, backend=backend, **options))


# XLA compiles each of these for seconds, and tests/jax_side has more of its own.
FEW = {("K16V16", "complex-head"), ("K1V1", "real-head")}


@pytest.mark.parametrize(
    ("backend", "size", "kind"),
    [case for case in itertools.product(BACKENDS, SIZES, KINDS) if case[0] != "jax" or case[1:] in FEW],
)
def test_a_gate_loop_keeps_it_where_it_belongs(backend: str, size: str, kind: str) -> None:
    loop = make_loop(2, T, **SIZES[size], **KINDS[kind])
    for resets, reverse in ((None, False), (marks(2), False), (marks(2), True)):
        options = {"resets": resets, "reverse": reverse}
        for arguments in spoiled(list(loop[:4]), AT):
            arguments.append(loop.initial)
            expected = with_gradients(loop_on("eager", **options), arguments)
            assert_as(with_gradients(loop_on(backend, **options), arguments), expected)


def marks(rows: int) -> Tensor:
    """Resets, in each row at another step."""
    resets = torch.zeros(rows, T, dtype=torch.bool)
    resets[0, 30] = resets[-1, 5] = True
    return resets


@pytest.mark.parametrize("kinds", ["rrr", "crc", "ccc"])
def test_a_scan_keeps_it_where_it_belongs(backend: str, kinds: str) -> None:
    scan = make_scan(T=T, kinds=kinds)
    for resets, reverse in ((None, False), (marks(2), False), (marks(2), True)):
        for arguments in spoiled(list(scan[:2]), AT):
            arguments.append(scan.initial)

            def function(
                *tensors: Tensor, name: str, resets: Tensor | None = resets, reverse: bool = reverse
            ) -> Outputs:
                return [linear_scan(*tensors, resets=resets, reverse=reverse, backend=name)]

            expected = with_gradients(partial(function, name="eager"), arguments)
            assert_as(with_gradients(partial(function, name=backend), arguments), expected)


@pytest.mark.parametrize("gate", ["polar", "paper", "ring"])
def test_a_channel_loop_keeps_it_where_it_belongs(backend: str, gate: str) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv, z, s, re, im = (
        torch.randn(2, *shape, generator=generator).double() for shape in ((T, 9), (T, 6), (T, 3), (3,), (3,))
    )
    bias = (re[0], im[0]) if gate == "ring" else None

    def function(
        qkv: Tensor, z: Tensor, s: Tensor, re: Tensor, im: Tensor, *, name: str, resets: Tensor | None
    ) -> Outputs:
        options = {"gate": gate, "bias": bias, "swish": s, "resets": resets, "backend": name}
        y, (real, imaginary) = channel_gate_loop(qkv, z, (re, im), **options)
        return [y, real, imaginary]

    for resets in (None, marks(2)):
        for arguments in spoiled([qkv, z, s], AT):
            arguments += [re, im]
            expected = with_gradients(partial(function, name="eager", resets=resets), arguments)
            assert_as(with_gradients(partial(function, name=backend, resets=resets), arguments), expected)


@pytest.mark.parametrize("gate", ["paper", "ring"])
def test_an_infinite_logit_is_a_gate_of_0_or_1(backend: str, gate: str) -> None:
    z = torch.tensor([math.inf, 0.5, -math.inf, 0.5], dtype=torch.float64).expand(1, 3, 4)
    bias = (torch.zeros(2).double(), torch.zeros(2).double()) if gate == "ring" else None
    real, imaginary, _ = head_gates(z, gate=gate, bias=bias, fraction=0.5, backend=backend)
    expected = torch.tensor([math.cos(0.5), 0.0]), torch.tensor([math.sin(0.5), 0.0])
    for part, wanted in zip((real, imaginary), expected, strict=True):
        assert part is not None
        torch.testing.assert_close(part, wanted.double().expand_as(part), rtol=0, atol=1e-7)


def test_a_simple_loop_keeps_it_where_it_belongs(backend: str) -> None:
    qkva, initial = make_scan(T=T, D=9, kinds="rrr").inputs, torch.ones(2, 3, dtype=torch.float64)

    def function(qkva: Tensor, initial: Tensor, *, name: str, resets: Tensor | None) -> Outputs:
        return list(simple_gate_loop(qkva, initial, resets=resets, backend=name))

    for resets, channel in itertools.product((None, marks(2)), (0, 3, 6)):
        for value in VALUES:
            spoilt = qkva.clone()
            spoilt[0, AT, channel] = value
            expected = with_gradients(partial(function, name="eager", resets=resets), [spoilt, initial])
            assert_as(with_gradients(partial(function, name=backend, resets=resets), [spoilt, initial]), expected)


@pytest.mark.parametrize("resets", [None, marks(2)], ids=["plain", "resets"])
def test_a_heinsen_scan_keeps_it_where_it_belongs(resets: Tensor | None) -> None:
    scan = make_scan(T=T, kinds="rrr")
    for arguments in spoiled([scan.gates.abs(), scan.inputs], AT):
        arguments.append(scan.initial)
        expected = with_gradients(lambda *x: [linear_scan(*x, resets=resets, backend="eager")], arguments)
        assert_as(with_gradients(lambda *x: [heinsen_scan(*x, resets=resets)], arguments), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_surrogate_attention_keeps_it_where_it_belongs(kind: str) -> None:
    loop = make_loop(2, T, **KINDS[kind])
    for resets in (None, marks(2)):
        for arguments in spoiled(list(loop[:4]), AT):
            expected = with_gradients(lambda *x, r=resets: [gate_loop(*x, resets=r, backend="eager")[0]], arguments)
            assert_as(with_gradients(lambda *x, r=resets: [surrogate_attention(*x, resets=r)], arguments), expected)


@pytest.mark.parametrize("size", SIZES)
def test_products_that_overflow_reach_no_earlier_step(backend: str, size: str) -> None:
    q, k, v, a, _ = (x.float() for x in make_loop(2, T, **SIZES[size], **KINDS["real-head"]))
    k[0, AT] = 1e30
    y, _ = gate_loop(q * 1e10, k, v, a, backend=backend)
    assert y[0, :AT].isfinite().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("size", SIZES)
def test_a_document_knows_nothing_of_the_one_before(backend: str, size: str) -> None:
    loop = make_loop(B=1, T=T, **SIZES[size], **KINDS["complex-head"])
    bounds = torch.tensor([0, 7, 7, 25, T])
    for arguments in spoiled(list(loop[:4]), AT):
        y, states = gate_loop(*arguments, cu_seqlens=bounds, backend=backend)
        for n, (start, end) in enumerate(itertools.pairwise(bounds.tolist())):
            alone, last = gate_loop(*(x[:, start:end] for x in arguments), backend="eager")
            assert_as(([y[:, start:end], states[n : n + 1]], []), ([alone, last], []))


@pytest.mark.parametrize("heads", [16, 2])
def test_a_reset_forgets_a_state_that_is_given(backend: str, heads: int) -> None:
    layer = GateLoopedAttention(16, heads=heads, conv_size=3, backend=backend)
    x, resets = torch.randn(1, 5, 16), torch.tensor([[True, False, False, False, False]])
    _, state = layer(x, return_state=True)
    lost = GateLoopState(*(torch.full_like(part, math.nan) for part in state))
    torch.testing.assert_close(layer(x, lost, resets=resets), layer(x))


@pytest.mark.parametrize("size", SIZES)
def test_a_step_that_begins_anew_asks_its_gate_for_nothing(backend: str, size: str) -> None:
    loop = make_loop(2, T, **SIZES[size], **KINDS["complex-head"])
    resets = marks(2)
    resets[0, AT] = True
    loop.gates[0, AT] = math.nan
    function = partial(loop_on, resets=resets)
    expected = with_gradients(function("eager"), list(loop))
    assert all(is_finite(x).all() for x in itertools.chain(*expected))
    assert_as(with_gradients(function(backend), list(loop)), expected)


@pytest.mark.parametrize("gate", [*GATES, "sigmoid"])
def test_a_fused_step_that_begins_anew_asks_its_gate_for_nothing(backend: str, gate: str) -> None:
    qkv, z = torch.randn(1, T, 9).double(), torch.randn(1, T, 6).double()
    resets = torch.zeros(1, T, dtype=torch.bool)
    resets[0, AT] = True
    if gate == "sigmoid":
        qkv[0, AT, 6:] = math.nan
        y, last = simple_gate_loop(qkv, resets=resets, backend=backend)
    else:
        z[0, AT] = math.nan
        bias = (torch.ones(3).double(), torch.ones(3).double()) if gate == "ring" else None
        y, (last, _) = channel_gate_loop(qkv, z, gate=gate, bias=bias, resets=resets, backend=backend)
    # The gate of "ring" also scales what comes in.
    after = AT if gate == "ring" else T
    assert y[:, :after].isfinite().all()
    assert gate == "ring" or last.isfinite().all()


def test_one_step_takes_nothing_from_what_it_does_not_see(backend: str) -> None:
    loop = [torch.ones(1, 1, 1, 2).double() for _ in range(3)] + [torch.full((1, 1, 1, 2), 0.5).double()]
    loop[2][0, 0, 0, 0] = math.nan
    loop.append(torch.ones(1, 1, 2, 2).double())
    assert_as(with_gradients(loop_on(backend), loop), with_gradients(loop_on("eager"), loop))
