"""What the Numba kernels promise beyond numbers: any threads, any process, the same bits."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from cases import values_and_gradients
from torch import Tensor

from gateloop_transformer.ops import gate_loop, linear_scan
from gateloop_transformer.ops.backends import numba_launch
from gateloop_transformer.ops.channel_loop import channel_gate_loop

CALLS: dict[str, Any] = {
    "scan": lambda q, z: linear_scan(torch.sigmoid(z[..., :64]), q[..., :64], backend="numba"),
    "channels": lambda q, z: channel_gate_loop(q, z, backend="numba"),
    "heads": lambda q, z: gate_loop(
        *(x.unflatten(-1, (4, 16)) for x in q.chunk(3, -1)), torch.sigmoid(z[..., :4]), backend="numba"
    ),
}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def arguments() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 100, 64 * n, generator=generator) for n in (3, 2)]


@pytest.mark.parametrize("name", CALLS)
def test_the_number_of_threads_changes_no_bit(name: str, threads: None) -> None:
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(values_and_gradients(CALLS[name], arguments()))
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize("openmp", [True, False])
def test_several_threads_may_call_at_once(openmp: bool, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if not openmp:
        monkeypatch.setattr(numba_launch, "_openmp", lambda: None)
    torch.set_num_threads(2)
    expected = {name: values_and_gradients(call, arguments()) for name, call in CALLS.items()}
    wrong: list[str] = []

    def work() -> None:
        for _ in range(5):
            for name, call in CALLS.items():
                result = values_and_gradients(call, arguments())
                if not all(torch.equal(x, y) for x, y in zip(result, expected[name], strict=True)):
                    wrong.append(name)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for _ in range(4)]:
            done.result()
    assert not wrong


def test_few_numbers_wake_no_thread_however_many_rows(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    woken: list[bool] = []
    monkeypatch.setattr(numba_launch, "_openmp", lambda: woken.append(True))
    torch.set_num_threads(2)
    with torch.no_grad():
        for name, call in CALLS.items():
            for T, wakes in ((1, False), (100, True)):
                woken.clear()
                call(*(torch.randn(4, T, 64 * n) for n in (3, 2)))
                assert bool(woken) == wakes, (name, T)


FORKED = """
import os, torch
from gateloop_transformer.ops import linear_scan
torch.set_num_threads(2)
a, x = torch.rand(4, 50, 32), torch.randn(4, 50, 32)
expected = linear_scan(a, x, backend="numba")
child = os.fork()
same = torch.equal(linear_scan(a, x, backend="numba"), expected)
if child == 0:
    os._exit(0 if same else 3)
assert same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_kernels_run_after_a_fork() -> None:
    processes.python("-c", FORKED)


CACHED = """
import torch
from gateloop_transformer.ops import linear_scan
for dtype in (torch.float32, torch.float64):
    for D in (3, 40):
        a, x = torch.rand(2, 20, D, dtype=dtype), torch.randn(2, 20, D, dtype=dtype)
        y, expected = (linear_scan(a, x, backend=name) for name in ("numba", "eager"))
        assert torch.allclose(y, expected, atol=1e-5), (dtype, D)
"""


@pytest.mark.slow
def test_processes_share_the_cache_of_compiled_kernels(tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CACHED]
    running = [processes.start(command, env=environment) for _ in range(3)]
    assert [processes.finish(process).returncode for process in running] == [0, 0, 0]
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.kernel")}
    assert kept
    assert processes.run(command, env=environment).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.kernel")} == kept


@pytest.mark.parametrize("grad", [False, True])
def test_lazy_conjugation_and_negation_are_seen(grad: bool) -> None:
    a = torch.randn(2, 9, 3, dtype=torch.complex64).conj()
    x = torch.randn(2, 9, 3, dtype=torch.complex64).conj().imag
    assert a.is_conj()
    assert x.is_neg()
    with torch.set_grad_enabled(grad):
        y, expected = (linear_scan(a, x, backend=name) for name in ("numba", "eager"))
        assert torch.allclose(y, linear_scan(a.resolve_conj(), x.resolve_neg(), backend="eager"), atol=1e-5)
        q = x.unsqueeze(-1)
        y, expected = (gate_loop(q, q, q, a, backend=name)[0] for name in ("numba", "eager"))
        assert torch.allclose(y, expected, atol=1e-4)


def test_a_trace_without_gradients_holds_the_operator() -> None:
    class Scan(torch.nn.Module):
        def forward(self, a: Tensor, x: Tensor) -> Tensor:
            return linear_scan(a, x, backend="numba")

    a, x = torch.rand(1, 5, 2), torch.randn(1, 5, 2)
    with torch.no_grad():
        exported = torch.export.export(Scan(), (a, x)).module()
        assert torch.equal(exported(x, a), linear_scan(x, a, backend="numba"))
