"""Laws of the tests themselves: processes end with their test, and no test is judged by a clock."""

from __future__ import annotations

import ast
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import processes
import pytest

TESTS = Path(__file__).parent
# What starts something that can outlive its test, or asks or waits for a time of day.
FORBIDDEN = {
    *(f"subprocess.{name}" for name in ("run", "Popen", "call", "check_call", "check_output", "getoutput")),
    *(f"os.{name}" for name in ("fork", "popen", "system", "posix_spawn", "posix_spawnp")),
    *("threading.Thread", "threading.Timer", "time.sleep", "time.time", "time.monotonic", "time.perf_counter"),
}


def breaches(source: str) -> Iterator[str]:
    """Lines that start a process or a thread, or look at a clock, and so must not be in a test."""
    names: dict[str, str] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            called = names.get(called, called)
            if called in FORBIDDEN or called.startswith("multiprocessing."):
                yield f"line {node.lineno}: {called}"
            if any(item.arg == "timeout" and isinstance(item.value, ast.Constant) for item in node.keywords):
                yield f"line {node.lineno}: a limit of its own"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import subprocess\nsubprocess.run([])", ["line 2: subprocess.run"]),
        ("from subprocess import Popen as P\nP([])", ["line 2: subprocess.Popen"]),
        ("import multiprocessing\nmultiprocessing.get_context()", ["line 2: multiprocessing.get_context"]),
        ("from time import monotonic\nmonotonic()", ["line 2: time.monotonic"]),
        ("def f():\n    time.sleep(1)\n    threading.Thread()", ["line 2: time.sleep", "line 3: threading.Thread"]),
        ("process.communicate(timeout=60)", ["line 1: a limit of its own"]),
        ("from subprocess import PIPE, Popen\nx: Popen\nthreading.Event().wait(LIMIT)\nset(time, 'sleep')", []),
    ],
)
def test_breaches_are_found(source: str, found: list[str]) -> None:
    assert sorted(breaches(source)) == found


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_processes_are_started_and_waited_for_in_one_place(path: Path) -> None:
    assert path.name == "processes.py" or not list(breaches(path.read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="descendants in sessions of their own are found in /proc")
def test_what_a_process_started_ends_with_it() -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = [sys.executable, '-c', 'import time; time.sleep(1000)']\n"
        "subprocess.Popen(child, start_new_session=True)\n"
        "print('started', flush=True)\n"
        "{}\n"
    )
    for then in ("raise SystemExit", "time.sleep(1000)"):
        process = processes.start([sys.executable, "-c", code.format(then)], stdout=PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        if then == "raise SystemExit":
            process.wait(processes.LIMIT)
        assert len(processes.running()) == (1 if then == "raise SystemExit" else 2)
        processes.end()
        assert not processes.running()
        assert process.stdout.closed


def one_fails(number: int, folder: str) -> None:
    """The second of two fails once the first waits for what never comes."""
    waits = Path(folder, "waits")
    if number == 0:
        waits.touch()
        signal.pause()
    processes.until(waits.exists)
    raise SystemExit(3)


@pytest.mark.skipif(sys.platform == "win32", reason="this system does not fork")
def test_processes_that_work_together_end_when_one_fails(tmp_path: Path) -> None:
    assert processes.together(2, one_fails, str(tmp_path)) == [-signal.SIGKILL, 3]
    assert not processes.running()
