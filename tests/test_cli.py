"""The `gateloop` command as a process: its environment, its streams, how it is started."""

from __future__ import annotations

import os

import pytest

from gateloop_transformer.cli import main


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["nothing set", "spin count set", "wait policy set"],
)
def test_threads_wait_quietly_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], spins: str | None
) -> None:
    with monkeypatch.context() as patch:
        environment = dict(given)
        patch.setattr(os, "environ", environment)
        with pytest.raises(SystemExit):
            main(["--version"])
    assert environment.get("GOMP_SPINCOUNT") == spins
