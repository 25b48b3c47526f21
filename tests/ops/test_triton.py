"""Triton's elementwise kernels: in the interpreter against `eager` in float64, and compiled for GPUs.

Matrix states: test_triton_matrix.py. The laws of every backend are in the operators' own tests.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import processes
import pytest
import torch
from cases import assert_equal, make_scan, nan_filled_memory, needs, rms_ratio, values_and_gradients
from torch import Tensor

from gateloop_transformer.ops import linear_scan
from gateloop_transformer.ops.backends import triton_gpu, triton_tuning
from gateloop_transformer.ops.backends.triton_launch import written_down
from gateloop_transformer.ops.channel_loop import channel_gate_loop, simple_gate_loop
from gateloop_transformer.ops.channels import ChannelLoop
from gateloop_transformer.ops.dispatch import choose
from gateloop_transformer.ops.gates import GATES
from gateloop_transformer.ops.head_gates import head_gates
from gateloop_transformer.ops.layout import Layout
from gateloop_transformer.ops.pairs import Pair
from gateloop_transformer.ops.recurrences import LinearScan
from gateloop_transformer.ops.rms_norm import rms_norm
from gateloop_transformer.ops.short_convolution import short_convolution

ROOT = Path(__file__).parent.parent.parent
# Documents that begin and end inside tiles, at their borders, and without steps.
BOUNDS = torch.tensor([0, 0, 3, 8, 8, 40, 75, 75])

Function = Callable[..., Any]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many tiles that states are handed on inside groups and from group to group."""
    monkeypatch.setattr(triton_gpu, "_FORWARD", 8)
    monkeypatch.setattr(triton_gpu, "_BACKWARD", 4)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def compare(function: Function, arguments: list[Tensor]) -> None:
    """`function` of a backend's name and arguments gives what it does on eager, and so do its gradients."""
    results = [values_and_gradients(lambda *x, b=name: function(b, *x), arguments) for name in ("triton", "eager")]
    assert_equal(*results, 1e-12)


def loop(gate: str, swish: bool, **options: Any) -> tuple[Function, Callable[[int, int, int, int], list[Tensor]]]:
    """The fused loop, and its arguments for (B, T, D) and so many states."""

    def call(backend: str, qkv: Tensor, z: Tensor, re: Tensor, im: Tensor, *rest: Tensor) -> Any:
        bias = (rest[-2], rest[-1]) if gate == "ring" else None
        more: dict[str, Any] = {"gate": gate, "bias": bias, "swish": rest[0] if swish else None, "fraction": 0.7}
        return channel_gate_loop(qkv, z, (re, im), **more, **options, backend=backend)

    def arguments(B: int, T: int, D: int, N: int) -> list[Tensor]:
        first = [normal(B, T, 3 * D), 3 * normal(B, T, 2 * D), normal(N, D), normal(N, D)]
        biases = [2 + normal(D), normal(D)] if gate == "ring" else []
        return [*first, *([normal(B, T, D)] if swish else []), *biases]

    return call, arguments


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("T", "D", "reverse"),
    [(1, 1, False), (9, 5, True), (37, 17, False), pytest.param(75, 3, True, marks=pytest.mark.slow)],
)
def test_triton_loop_equals_eager(gate: str, T: int, D: int, reverse: bool) -> None:
    call, arguments = loop(gate, T != 9, reverse=reverse)
    compare(call, arguments(2 if T < 37 else 1, T, D, 2 if T < 37 else 1))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("reverse", [False, True])
def test_triton_loop_of_documents_equals_eager(gate: str, reverse: bool) -> None:
    call, arguments = loop(gate, True, reverse=reverse, resets=torch.rand(1, 75) < 0.1, cu_seqlens=BOUNDS)
    compare(call, arguments(1, 75, 3, len(BOUNDS) - 1))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kinds", ["rrr", "ccc", "rcr", "crc"])
@pytest.mark.parametrize("reverse", [False, True])
def test_triton_scan_of_documents_equals_eager(kinds: str, reverse: bool) -> None:
    gates, inputs, _ = make_scan(1, 75, 5, kinds=kinds)
    initial = normal(len(BOUNDS) - 1, 5, dtype=torch.complex128 if kinds[2] == "c" else torch.float64)
    marks = {"reverse": reverse, "resets": torch.rand(1, 75) < 0.1, "cu_seqlens": BOUNDS}
    # Half of the cases start without a state: the interpreter takes seconds for each call.
    tensors = [gates, inputs] if kinds in ("rcr", "ccc") else [gates, inputs, initial]
    compare(lambda backend, *x: linear_scan(*x, **marks, backend=backend), tensors)


@pytest.mark.parametrize(("T", "reverse"), [(1, False), (150, True)])
def test_triton_simple_loop_equals_eager(T: int, reverse: bool) -> None:
    compare(lambda b, *x: simple_gate_loop(*x, reverse=reverse, backend=b), [normal(1, T, 15), normal(1, 5)])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("real", [False, True])
def test_triton_head_gates_equal_eager(gate: str, real: bool) -> None:
    def call(backend: str, z: Tensor, *bias: Tensor) -> list[Tensor]:
        both = (bias[0], bias[1]) if bias else None
        results = head_gates(z, gate=gate, bias=both, fraction=0.3, real=real, backend=backend)
        return [x for x in results if x is not None]

    for shape in ((3, 2), (2, 7, 10), (20, 140)):
        heads = shape[-1] // 2
        compare(call, [3 * normal(*shape), *([normal(heads), normal(heads)] if gate == "ring" else [])])


@needs("triton", "3.8", "its interpreter rounds the numbers in kernels to float32 before")
def test_triton_norm_and_convolution_equal_eager() -> None:
    for shape, gains in (((2, 3, 5), (5,)), ((7, 4, 33), (4, 33)), ((1, 1), (1,)), ((300, 16), (16,))):
        x = normal(*shape)
        x[0] *= 1e-14  # where the norm's limit counts
        compare(lambda backend, *y: rms_norm(*y, backend=backend), [x, normal(*gains)])
    for B, L, D, taps, silu in ((2, 7, 5, 4, True), (1, 70, 33, 4, False), (2, 3, 4, 3, True), (1, 5, 8, 1, True)):
        compare(lambda b, *y, s=silu: short_convolution(*y, s, backend=b), [normal(B, L, D), normal(D, taps)])


@pytest.mark.parametrize("gate", GATES)
def test_triton_in_bfloat16_loses_no_more_than_its_rounding(gate: str) -> None:
    call, arguments = loop(gate, True)
    args = [x.bfloat16() for x in arguments(1, 130, 4, 1)]
    exact = values_and_gradients(lambda *x: call("eager", *x), [x.double() for x in args])
    ours, plain = (values_and_gradients(lambda *x, b=name: call(b, *x), args) for name in ("triton", "eager"))
    for value, reference, other in zip(ours, exact, plain, strict=True):
        # Triton's interpreter cuts digits off where a GPU rounds.
        cut = (reference.float().view(torch.int32) & -65536).view(torch.float32)
        lost = rms_ratio(cut if value.dtype == torch.bfloat16 else other, reference)
        assert rms_ratio(value, reference) <= max(2 * lost, 1e-6)


@pytest.mark.usefixtures("small_tiles")
def test_triton_reads_no_memory_that_it_has_not_written() -> None:
    call, arguments = loop("ring", True, resets=torch.rand(2, 21) < 0.2)
    args = arguments(2, 21, 5, 2)
    expected = values_and_gradients(lambda *x: call("triton", *x), args)
    with nan_filled_memory():
        assert_equal(values_and_gradients(lambda *x: call("triton", *x), args), expected, 0)


def test_triton_gates_far_out_keep_their_gradients_finite() -> None:
    call, arguments = loop("polar", False)
    args = [x.float() for x in arguments(1, 6, 4, 1)]
    args[1] *= torch.tensor([0.0, 1e-30, 1e-10, 1e3, 1e10, 1e30]).view(1, 6, 1)
    values = [values_and_gradients(lambda *x, b=name: call(b, *x), args) for name in ("triton", "eager")]
    assert_equal(*values, 1e-5)


def test_triton_is_taken_on_gpus_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        assert choose("auto", torch.device("cuda"), dtype) == "triton"
        assert choose("auto", torch.device("cpu"), dtype) == "numba"
    assert choose("auto", torch.device("mps"), torch.float32) == "chunkwise"
    assert choose("triton", torch.device("cpu"), torch.float32) == "triton"  # in the interpreter


def test_triton_on_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(NotImplementedError, match="CUDA and ROCm GPUs; on the CPU only in Triton's interpreter"):
        linear_scan(torch.ones(1, 2, 1), torch.ones(1, 2, 1), backend="triton")


def test_a_triton_decoding_step_is_one_launch() -> None:
    x = torch.empty(2, 1, 8, device="meta")
    state = Pair(torch.empty(2, 8, device="meta"), torch.empty(2, 8, device="meta"))
    z = torch.empty(2, 1, 16, device="meta")
    with written_down() as listed:
        triton_gpu.loop_forward(ChannelLoop(x, x, x, Pair(z), x, None, "polar", 1.0, False), state)
    assert [launch.kernel.__name__ for launch in listed] == ["loop_forward"]
    assert listed[0].arguments["flags"] is None


def test_triton_takes_the_bounds_of_documents_from_another_device() -> None:
    x = Pair(torch.empty(1, 75, 8, device="meta"))
    with written_down() as listed:
        triton_gpu.linear_scan_forward(LinearScan(x, x, layout=Layout(cu_seqlens=BOUNDS)))
    assert listed[0].arguments["begins"].device == x.re.device


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of scripts, whose modules can be imported."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return ROOT / "benchmarks"


@pytest.mark.usefixtures("benchmarks")
def test_triton_moves_few_bytes_more_than_it_must() -> None:
    from gpu_traffic import measure

    # Of the dtype in which what tiles hand on, in float32, weighs most.
    for traffic in measure(torch.bfloat16, 512, ("polar",)):
        assert 1 <= traffic.ratio < 1.15, traffic


@pytest.mark.usefixtures("benchmarks")
def test_the_page_of_compiled_triton_kernels_is_of_these_kernels() -> None:
    import gpu_compile as module

    found = json.loads((ROOT / "docs" / "results" / "gpu-compile.json").read_text())
    assert found["sources"] == module.sources(), f"run `{module.COMMAND}`"
    limits = {"sm_80": 163, "sm_90": 227, "gfx942": 64}
    assert {row["chip"] for row in found["rows"]} == set(limits)
    assert module.problems(found["rows"], limits) == []
    assert module.table(found, limits) == (ROOT / "docs" / "results" / "gpu-compile.md").read_text()
    assert all(row["ratio"] <= 1.15 for row in found["traffic"])


@pytest.mark.slow
def test_triton_kernels_compile_for_a_gpu(tmp_path: Path, benchmarks: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(benchmarks)!r})"
    code += """
from gpu_builds import build
from gpu_launches import launches
import torch
wanted = {"loop_backward, bfloat16, polar", "scan_forward, bfloat16, complex, packed", "loop_forward, bfloat16, ring"}
wanted |= {"attend, bfloat16, 64 x 64, complex gates per head", "carry, bfloat16, 64 x 64, complex gates per head"}
for name, launch in launches("cuda", (torch.bfloat16,)):
    if name in wanted:
        wanted.remove(name)
        usage = build(launch, "sm_90")
        assert usage.spills == 0 and 16 < usage.registers < 256, (name, usage)
assert not wanted, wanted
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    processes.python("-c", code, env=environment, cwd=tmp_path)


def test_triton_times_each_choice_once_and_keeps_the_fastest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton_tuning, "_times", lambda _x: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a device")
    monkeypatch.setattr(triton_tuning, "_known", {})
    run: list[int] = []

    def milliseconds(call: Callable[[], None]) -> float:
        call()
        return abs(run[-1] - 2) + 1.0

    monkeypatch.setattr(triton_tuning, "_milliseconds", milliseconds)
    ask = partial(triton_tuning.fastest, "kernel", (1024, torch.float32), [1, 2, 3], run.append, torch.ones(1))
    assert (ask(), ask(), run) == (2, 2, [1, 2, 3])
    triton_tuning._known.clear()  # as in another process
    assert (ask(), run) == (2, [1, 2, 3])
    assert triton_tuning.fastest("kernel", (2048, torch.float32), [1, 2, 3], run.append, torch.ones(1)) == 2
    assert run == [1, 2, 3] * 2
    for path in tmp_path.rglob("choice.txt"):
        path.write_text("9")
    triton_tuning._known.clear()
    assert ask() == 2


def test_triton_tunes_on_gpus_alone_and_not_where_bits_must_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not triton_tuning._times(torch.ones(1))
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    assert triton_tuning._times(on_gpu)
    monkeypatch.setenv("GATELOOP_TRITON_TUNING", "off")
    assert not triton_tuning._times(on_gpu)
    monkeypatch.delenv("GATELOOP_TRITON_TUNING")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not triton_tuning._times(on_gpu)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("choice", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_triton_gives_the_same_whatever_the_choice(choice: int) -> None:
    call, arguments = loop("polar", True)
    args = arguments(1, 20, 40, 1)
    expected = values_and_gradients(lambda *x: call("triton", *x), args)
    with triton_tuning.forced(choice):
        assert_equal(values_and_gradients(lambda *x: call("triton", *x), args), expected, 1e-13)


@pytest.mark.parametrize("gate", GATES)
def test_triton_lets_no_nan_pass_unseen(gate: str) -> None:
    call, arguments = loop(gate, False)
    args = arguments(1, 5, 2, 1)
    args[1][0, 2] = math.nan
    y, final = call("triton", *args)
    assert y[0, :2].isfinite().all()
    assert y[0, 2:].isnan().all()
    assert final[0].isnan().all()


def test_triton_lengths_of_one_class_are_timed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton_tuning, "_times", lambda _x: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a device")
    monkeypatch.setattr(triton_tuning, "_known", {})
    timed: list[Callable[[], None]] = []
    monkeypatch.setattr(triton_tuning, "_milliseconds", lambda run: float(len(timed.append(run) or timed)))
    for T, classes in ((130, 1), (200, 1), (256, 1), (257, 2)):
        linear_scan(torch.ones(1, T, 16), torch.ones(1, T, 16), backend="triton")
        assert len(timed) == 2 * classes, T
