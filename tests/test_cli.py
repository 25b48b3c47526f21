"""The `gateloop` command as a process: its environment, its streams, how it is started."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import processes
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


def gateloop(command: str, cwd: Path) -> Any:
    """A command line of a shell, so that streams can be closed."""
    return processes.run(f"{sys.executable} -m gateloop_transformer {command}", cwd=cwd)


def test_a_closed_standard_output_is_one_line(tmp_path: Path) -> None:
    done = gateloop("generate run --prompt a >&-", tmp_path)
    assert done.returncode == 2
    assert "standard output is closed" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_with_a_closed_standard_error_nothing_is_said_on_standard_output(tmp_path: Path) -> None:
    done = gateloop("generate run --prompt a 2>&-", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize(
    ("error", "message"), [(MemoryError(), "not enough memory"), (OverflowError("too big"), "too big")]
)
def test_too_little_memory_is_a_failure_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, message: str
) -> None:
    def fail(_arguments: object) -> None:
        raise error

    monkeypatch.setattr("gateloop_transformer.cli.generate.run", fail)
    assert main(["generate", "run", "--prompt", "a"]) == 1
    assert capsys.readouterr().err == f"gateloop generate: failed: {message}\n"


def test_a_name_too_long_is_one_line_without_an_error_number(tmp_path: Path) -> None:
    done = gateloop(f"generate {'x' * 300} --prompt a", tmp_path)
    assert done.returncode == 2
    assert "Errno" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_package_runs_as_the_command(tmp_path: Path) -> None:
    done = gateloop("--version", tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("gateloop ")
