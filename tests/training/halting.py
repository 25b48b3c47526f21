"""A run in a process of its own that stands still after a step, until its input ends."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

import processes

CODE = """
import pathlib, sys
from gateloop_transformer.cli import main
from gateloop_transformer.training.watching import Log

write = Log.write

def halt(log, record):
    write(log, record)
    if "loss" in record and record["step"] == int(sys.argv[1]):
        pathlib.Path(sys.argv[2]).touch()
        sys.stdin.read()

Log.write = halt
sys.exit(main(["train", *sys.argv[3:]]))
"""


def halted(step: int, out: Path, *arguments: str) -> Popen[str]:
    """A run that has written down a step and does nothing more; what it says on standard error is kept."""
    mark = out.with_name(f"{out.name} halted")
    command = [sys.executable, "-c", CODE, str(step), str(mark), *arguments, "--out", str(out)]
    process = processes.start(command, stdin=PIPE, stdout=DEVNULL, stderr=PIPE)
    processes.until(mark.exists, process)
    return process
