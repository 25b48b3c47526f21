"""Processes that tests start. Each ends with its test, with all that it started, and none is judged by a clock.

Tests start processes and wait for them through this file alone; test_suite.py sees to it.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Seconds to wait for anything, against hanging alone: a busy machine may take as long as it needs.
LIMIT = 1200.0
# What a process starts inherits its environment, so this finds it whatever group, session or parent it has by then.
MARK = f"GATELOOP_TESTS_OF={secrets.token_hex(8)}"
# What serves this process as long as it lives.
SERVANTS = ("multiprocessing.resource_tracker",)

_started: list[subprocess.Popen[str]] = []


def mark() -> None:
    """From here on this process starts marked ones, also those that the library starts."""
    name, value = MARK.split("=")
    os.environ[name] = value


def start(command: list[str] | str, **options: Any) -> subprocess.Popen[str]:
    """Start a process; a string is a command line of a shell. Options are those of `subprocess.Popen`."""
    process = subprocess.Popen(
        command, shell=isinstance(command, str), encoding="utf-8", start_new_session=True, **options
    )
    _started.append(process)
    return process


def finish(process: subprocess.Popen[str], given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Give a process the last of its input, and wait until it ended."""
    said, errors = process.communicate(given, timeout=LIMIT)
    return subprocess.CompletedProcess(process.args, process.returncode, said, errors)


def run(command: list[str] | str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a process to its end, however it ends, and keep what it says."""
    return finish(start(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options))


def python(*arguments: str, **options: Any) -> str:
    """What Python says with these arguments; it must end well."""
    done = run([sys.executable, *arguments], **options)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def together(count: int, body: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Call `body(number, *arguments)` in as many new processes, which all end once one fails; their exit codes."""
    spawn = multiprocessing.get_context("spawn")
    codes, given = spawn.Pipe(duplex=False)
    parent = spawn.Process(target=_fork, args=(given, count, body, arguments))
    parent.start()
    given.close()
    assert codes.poll(LIMIT), "the processes do not end"
    found: list[int | None] = codes.recv()
    parent.join()
    return found


def _fork(codes: Any, count: int, body: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """In a process that has imported once what all need, and has no threads yet that a fork would lose."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=body, args=(number, *arguments)) for number in range(count)]
    for process in processes:
        process.start()
    left = {process.sentinel: process for process in processes}
    while left:
        for sentinel in multiprocessing.connection.wait(list(left)):
            left.pop(sentinel).join()
        if any(process.exitcode for process in processes):
            for process in left.values():
                process.kill()
    codes.send([process.exitcode for process in processes])


def until(happened: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Wait for what a process does, which then goes on."""
    deadline = time.monotonic() + LIMIT
    while not happened():
        assert process is None or process.poll() is None, "the process ended before that"
        assert time.monotonic() < deadline, "that does not happen"
        time.sleep(0.01)


def pause(seconds: float) -> None:
    """Let processes go on for a while where no moment is the right one; no result may depend on it."""
    time.sleep(seconds)


def running() -> dict[int, str]:
    """Processes that this one started, or those did, by number: their command lines. Empty where there is no /proc."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            marked = MARK.encode() in (folder / "environ").read_bytes().split(b"\0")
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if (marked or int(parent) == os.getpid()) and state != "Z" and not any(name in line for name in SERVANTS):
                found[int(folder.name)] = line
    found.pop(os.getpid(), None)
    return found


def started() -> bool:
    """Whether any process was started since the last end."""
    return bool(_started)


def end() -> dict[int, str]:
    """End what is still running, whoever started it, and say what it was."""
    ended: dict[int, str] = {}
    for process in _started:
        if process.poll() is None:
            ended[process.pid] = str(process.args)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    # What is ended here may have started more in the meantime.
    while found := running():
        ended |= found
        for number in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        multiprocessing.active_children()
    for process in _started:
        with process:
            pass
    _started.clear()
    return ended
