"""Fixtures for all tests."""

from __future__ import annotations

import os

# Kernels for GPUs run on the CPU, as Python; Triton asks once, when it is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from cases import HERE, INTERPRETABLE, INTERPRETED

# XLA compiles each shape for seconds; most of that is optimisation, which no law depends on.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Tensors here are small: a second thread only waits, and on a busy machine it waits spinning.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is left in the user's cache; processes that tests start inherit this."""
    os.environ["GATELOOP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


# What calls an operator very often: `make slow` runs it where kernels are interpreted, for seconds or minutes.
OFTEN = (
    "test_gradcheck",
    "test_gradcheck_with_a_complex_state_on_real_gates",
    "test_autocast_narrows_nothing_inside",
    "test_a_split_sequence_carries_its_gradient",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is interpreted here, and what is slow where it is."""
    for item in items:
        case = getattr(item, "callspec", None)
        interpreted = case is not None and case.params.get("backend") in INTERPRETED
        if interpreted and item.originalname in OFTEN:
            item.add_marker(pytest.mark.slow)
        if interpreted or item.path.stem.startswith("test_triton"):
            item.add_marker(INTERPRETABLE)


@pytest.fixture(params=HERE)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend in the dispatch table, by name, but those `cases.AWAY` names. All run here: one that cannot is an
    error, not a skip.
    """
    name: str = request.param
    return name


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """The same random numbers in every test, whatever ran before."""
    torch.manual_seed(0)
