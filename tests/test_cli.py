"""The `gateloop` command as a process: its environment, its streams, how it is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateloop_transformer.cli import main
from gateloop_transformer.cli.errors import message
from gateloop_transformer.cli.flags import typed


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


def gateloop(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command line of a shell, so that streams can be closed."""
    line = f"{sys.executable} -m gateloop_transformer {command}"
    return subprocess.run(line, shell=True, cwd=cwd, capture_output=True, text=True, timeout=120)


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


def test_a_backend_that_is_not_installed_keeps_nobody_from_drawing(tmp_path: Path) -> None:
    # As where a notebook sets it for all that it starts. No torch: what draws is imported alone.
    code = (
        "from pathlib import Path; from gateloop_transformer.pictures import empty_figure, save_png; import os; "
        "save_png(empty_figure(1, 1), Path('a.png')); print(os.environ['MPLBACKEND']); "
        "import matplotlib; print(matplotlib.rcParams['backend'])"
    )
    for backend, kept in (("not_installed_anywhere", None), ("svg", "svg")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "MPLBACKEND": backend},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        said = done.stdout.splitlines()
        assert said[0] == backend
        assert kept in (None, said[1])
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_texts_of_the_command_line_are_utf8_in_every_locale() -> None:
    # As Python gives what is typed: in UTF-8, in Latin-1, and where the locale has no letters beyond ASCII.
    assert typed("ü") == typed("\udcc3\udcbc") == b"\xc3\xbc"
    assert typed("\udcff") == b"\xff"


def test_long_and_untold_messages_are_one_line() -> None:
    assert message(ValueError("a" * 5000 + "\nb")) == "a" * 2000 + " ..."
    assert message(UnicodeEncodeError("ascii", "aä", 1, 2, "")) == (
        "'ä' has no place in the encoding ascii: set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
    )
