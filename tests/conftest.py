"""Fixtures for all tests."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Kernels for GPUs run on the CPU, as Python; Triton asks once, when it is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import processes
import pytest
import torch
from cases import DEAR, INTERPRETABLE, INTERPRETED
from small_runs import TEXT, train

from gateloop_transformer import waiting
from gateloop_transformer.ops.dispatch import TABLE

# XLA compiles each shape for seconds; most of that is optimisation, which no law depends on.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Its newer compiler of fused loops takes twice as long as the older one for programs as small as these.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
# Tensors here are small: a second thread only waits, and on a busy machine it waits spinning.
torch.set_num_threads(1)
# What takes long says so, on a busy machine also where a test looks at all that is said.
waiting.PATIENCE = waiting.EVERY = 1e6
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is judged by a clock: examples may take as long as a busy machine takes for them.
hypothesis.settings.register_profile("suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("suite")
processes.mark()


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is left in the user's cache; processes that tests start inherit this."""
    os.environ["GATELOOP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file to train on."""
    path = tmp_path / "data.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step; tests that change it copy it."""
    place = tmp_path_factory.mktemp("finished")
    (place / "data.txt").write_text(TEXT)
    assert train(place / "data.txt", place / "run", steps=1) == 0
    return place / "run"


@pytest.fixture(autouse=True)
def _processes_end_with_their_test() -> Iterator[None]:
    yield
    if processes.started():
        processes.end()


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    # Pools stay for the next call: the library's own, and those in which torch compiles.
    pools = "gateloop", "ThreadPoolExecutor"
    after = [thread for thread in threading.enumerate() if not thread.name.startswith(pools)]
    threads = [str(thread) for thread in after if thread not in before and not thread.daemon]
    left = [*processes.end().values(), *threads]
    assert not left, f"still running after the last test: {left}"


# What calls an operator very often: `make slow` runs it where kernels are interpreted, for seconds or minutes.
OFTEN = (
    "test_gradcheck",
    "test_gradcheck_with_a_complex_state_on_real_gates",
    "test_autocast_narrows_nothing_inside",
    "test_a_split_sequence_carries_its_gradient",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what calls an operator often where that takes seconds, and all but a selection of other cases."""
    dear: dict[Any, list[Any]] = {}
    for item in items:
        of_file = next((name for name in DEAR if name in item.path.name), None)
        case = getattr(item, "callspec", None)
        backend = of_file if case is None else case.params.get("backend", of_file)
        if backend in INTERPRETED:
            item.add_marker(INTERPRETABLE)
        if case is not None and backend in DEAR and item.get_closest_marker("slow") is None:
            if backend in INTERPRETED and item.originalname in OFTEN:
                item.add_marker(pytest.mark.slow)
            else:
                dear.setdefault((item.path, item.originalname, backend), []).append(item)
    for cases in dear.values():
        for item in beyond_every_option(cases):
            item.add_marker(pytest.mark.slow)


def beyond_every_option(cases: list[Any]) -> list[Any]:
    """Cases of a test that may be left out with all that its decorators list still in one of the others."""
    rest, options = list(cases), {case: options_of(case) for case in cases}
    unseen: set[tuple[int, ...]] = set().union(*options.values())
    while unseen:
        best = max(rest, key=lambda case: len(unseen & options[case]))
        rest.remove(best)
        unseen -= options[best]
    return rest


def options_of(case: Any) -> set[tuple[int, ...]]:
    """What each decorator gave to a case: the same objects to all cases of a test. All share that there is a case."""
    marks = case.iter_markers("parametrize")
    names = [mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0] for mark in marks]
    return {(), *((n, *(id(case.callspec.params[name.strip()]) for name in group)) for n, group in enumerate(names))}


@pytest.fixture(params=TABLE)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend in the dispatch table, by name. All run here: one that cannot is an error, not a skip."""
    name: str = request.param
    return name


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would be said if it took long is said, and each part of a work."""

    class AtOnce(threading.Timer):
        def start(self) -> None:
            self.function(*self.args, **self.kwargs)

    monkeypatch.setattr(waiting.threading, "Timer", AtOnce)
    monkeypatch.setattr(waiting, "PATIENCE", 0.0)
    monkeypatch.setattr(waiting, "EVERY", 0.0)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """The same random numbers in every test, whatever ran before."""
    torch.manual_seed(0)
