"""The backend on flash-linear-attention: what surrounds its function, tested around a stand-in of the same contract."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Loop, assert_equal, cast, compiled, make_loop, rms_ratio, values_and_gradients
from torch import Tensor

from gateloop_transformer.ops import gate_loop, linear_scan
from gateloop_transformer.ops.backends import eager, fla_gpu
from gateloop_transformer.ops.dispatch import TABLE, choose
from gateloop_transformer.ops.pairs import Pair

GPU = torch.device("cuda")
KINDS = ["real gates", "complex gates", "real gates, complex state", "complex gates, real state", "no state"]


class _SimpleGLA(torch.autograd.Function):
    """The definition with gates exp(g): one autograd function, as the package's is."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, g, state)
        y, final = eager.gate_loop_forward(q, k, v, Pair(g.exp()), Pair(state), False)
        return y, final.re

    @staticmethod
    def backward(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Tensor, ...]:
        q, k, v, g, state = ctx.saved_tensors
        arguments = dy, Pair(d_final), q, k, v, Pair(g.exp()), Pair(state), False
        dq, dk, dv, d_gates, d_state = eager.gate_loop_backward(*arguments)
        return dq, dk, dv, d_gates.re * g.exp(), d_state.re


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor]:
    """As fla-core 0.6.0 documents it, in the arguments that are used."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    assert scale == 1.0
    assert output_final_state
    assert initial_state is not None
    assert k.shape == (B, T, H, K)
    assert v.shape == (B, T, H, V)
    assert g.shape == (B, T, H)
    assert initial_state.shape == (B, H, K, V)
    assert q.dtype == k.dtype == v.dtype
    assert g.dtype == initial_state.dtype
    assert all(x.is_contiguous() for x in (q, k, v, g, initial_state))
    return _SimpleGLA.apply(q, k, v, g, initial_state)  # type: ignore[no-any-return]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla_gpu, "_kernel", lambda: chunk_simple_gla)
    monkeypatch.setattr(fla_gpu, "unsupported", lambda device, dtype: None)


@pytest.fixture
def version() -> Iterator[None]:
    """Asked for anew in the test and after it."""
    fla_gpu._version.cache_clear()
    yield
    fla_gpu._version.cache_clear()


def arguments(kind: str, T: int = 21) -> list[Tensor]:
    """Of a gate loop whose gates are not 0: long memories, negative ones, turns by π."""
    loop = make_loop(2, T, is_complex="complex gates" in kind or kind == "no state")
    gates = torch.where(loop.gates == 0, 0.25, loop.gates)
    initial = loop.initial
    if kind.startswith("real") and "complex state" in kind:
        initial = torch.complex(initial, initial.flip(0))
    if "real state" in kind:
        initial = initial.real.clone()
    return list(loop._replace(gates=gates, initial=initial))[: 4 if kind == "no state" else 5]


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 21])
def test_values_and_all_gradients_are_those_of_eager(kind: str, reverse: bool, T: int) -> None:
    tensors = arguments(kind, T)

    def run(backend: str) -> list[Tensor]:
        return values_and_gradients(lambda *x: gate_loop(*x, reverse=reverse, backend=backend), tensors)

    assert_equal(run("fla"), run("eager"))
    with torch.no_grad():
        y, final = gate_loop(*tensors, reverse=reverse, backend="fla")
        assert_equal([y, final], gate_loop(*tensors, reverse=reverse, backend="eager"))


@pytest.mark.usefixtures("stand_in")
def test_phases_stay_exact_over_many_steps_in_float32() -> None:
    q, k, v, gates, initial = cast(arguments("complex gates", 2000), torch.float32)
    tensors = q, k, v, gates / gates.abs(), initial
    exact = gate_loop(*(x.to(torch.promote_types(x.dtype, torch.float64)) for x in tensors), backend="eager")[0]
    assert rms_ratio(gate_loop(*tensors, backend="fla")[0], exact) < 1e-5


@pytest.mark.usefixtures("stand_in")
def test_it_compiles_into_one_graph() -> None:
    def loop(*tensors: Tensor) -> Any:
        q, k, v, re, im = tensors
        return gate_loop(q, k, v, (re, im), backend="fla")

    *inputs, gates, _ = arguments("complex gates")
    tensors = [*inputs, gates.real.clone(), gates.imag.clone()]
    assert_equal(values_and_gradients(compiled(loop), tensors), values_and_gradients(loop, tensors))


@pytest.mark.usefixtures("stand_in")
def test_documents_are_as_if_alone() -> None:
    q, k, v, gates, _ = (x[:1] for x in arguments("complex gates"))
    bounds = torch.tensor([0, 5, 5, 21])
    results = [gate_loop(q, k, v, gates, cu_seqlens=bounds, backend=name) for name in ("fla", "eager")]
    assert_equal(*results)


@pytest.mark.usefixtures("stand_in")
def test_bfloat16_keeps_its_dtype_and_states_in_float32() -> None:
    q, k, v = (x.bfloat16() for x in arguments("real gates")[:3])
    y, final = gate_loop(q, k, v, arguments("real gates")[3].float(), backend="fla")
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("gradients", [False, True])
def test_a_gate_of_0_is_refused(gradients: bool) -> None:
    q, k, v, gates, _ = arguments("complex gates")
    gates[1, 7, 2] = 0
    with pytest.raises(
        ValueError, match=r"gate_loop: backend 'fla' .*logarithms.* is 0; it accepts gates other than 0"
    ):
        gate_loop(q.requires_grad_(gradients), k, v, gates, backend="fla")


@pytest.mark.usefixtures("stand_in")
def test_what_it_lacks_is_said_before_anything_runs() -> None:
    q, k, v, gates, _ = make_loop(2, is_complex=False, per_channel=True)
    with pytest.raises(NotImplementedError, match=r"backend 'fla' has no gates per key channel: .* one gate per head"):
        gate_loop(q, k, v, gates, backend="fla")
    with pytest.raises(NotImplementedError, match=r"backend 'fla' has no resets: .* cu_seqlens"):
        gate_loop(q, k, v, gates[..., 0], resets=torch.zeros(2, 21, dtype=torch.bool), backend="fla")
    with pytest.raises(NotImplementedError, match=r"backend 'fla' has no linear_scan: .*gate_loop"):
        linear_scan(gates[..., 0], gates[..., 0], backend="fla")
    with pytest.raises(
        NotImplementedError, match=r"computes in float32.* gates of torch.float64 .*accepted are float32"
    ):
        gate_loop(q.float(), k.float(), v.float(), gates[..., 0], backend="fla")


@pytest.mark.usefixtures("version")
def test_without_the_package_the_reason_is_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert "pip install flash-linear-attention" in str(fla_gpu.unsupported(GPU, torch.float32))
    with pytest.raises(NotImplementedError, match=r"backend 'fla' cannot run .* 0.6 or newer: pip install flash-lin"):
        choose("fla", GPU, torch.bfloat16)


@pytest.mark.usefixtures("version")
@pytest.mark.parametrize(("text", "runs"), [("0.5.9", False), ("0.6.0", True), ("0.10.1.dev3", True), ("1.0", True)])
def test_it_runs_with_the_versions_it_was_written_for(monkeypatch: pytest.MonkeyPatch, text: str, runs: bool) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: text)
    assert (fla_gpu.unsupported(GPU, torch.float32) is None) is runs
    assert fla_gpu.unsupported(torch.device("cpu"), torch.float32) == "runs on CUDA and ROCm GPUs only"
    assert "16 or 32 bits" in str(fla_gpu.unsupported(GPU, torch.float64))


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "xpu", "meta"])
def test_auto_never_takes_it(device: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert choose("fla", torch.device(device), dtype) == "fla"
        assert choose("auto", torch.device(device), dtype) != "fla"
    assert list(TABLE)[-2:] == ["eager", "fla"]


@pytest.mark.skipif(fla_gpu.unsupported(GPU, torch.float32) is not None, reason="flash-linear-attention is absent")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_package_itself_computes_the_gate_loop() -> None:
    tensors = [x.to(GPU) for x in Loop(*arguments("complex gates", 200))]
    expected, results = (
        values_and_gradients(lambda *x, name=name: gate_loop(*x, backend=name), given)
        for name, given in (("eager", tensors), ("fla", cast(tensors, torch.float32)))
    )
    assert max(rms_ratio(x, reference) for x, reference in zip(results, expected, strict=True)) < 1e-2
