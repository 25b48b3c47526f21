"""The `gateloop` command: each command has a file, flags come from dataclasses, and an error is one line."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

import gateloop_transformer
from gateloop_transformer.cli import (
    bench,
    convert,
    evaluate,
    export,
    generate,
    inspect,
    plot,
    read,
    sweep,
    tasks,
    tokenizer,
    train,
)
from gateloop_transformer.cli.errors import let_main_speak, message
from gateloop_transformer.cli.parser import Parser
from gateloop_transformer.cli.progress import heard

_COMMANDS = {
    "train": train,
    "tokenizer": tokenizer,
    "generate": generate,
    "read": read,
    "eval": evaluate,
    "convert": convert,
    "inspect": inspect,
    "export": export,
    "plot": plot,
    "sweep": sweep,
    "tasks": tasks,
    "bench": bench,
}


def _parser() -> Parser:
    parser = Parser(prog="gateloop", description="Train, run and evaluate GateLoop language models.")
    parser.add_argument("--version", action="version", version=f"gateloop {gateloop_transformer.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        commands.add_parser(name, help=command.HELP, description=command.DESCRIPTION, fill=command.add_arguments)
    return parser


class _StandardOutput:
    """Standard output whose errors name it; without the name they would read as if the command's work had failed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._named():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._named():
            self._stream.flush()

    @staticmethod
    @contextlib.contextmanager
    def _named() -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from error


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 (it failed) or 2 (something wrong was passed)."""
    # See docs/decisions/0005. Both are read when torch is first imported; a value that the user has set stays.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            # Lines are flushed as they are written, so that the other end of a pipe sees them at once.
            output.reconfigure(errors="replace", line_buffering=True)
    if sys.stderr is None:
        # The caller closed standard error: what is said to it is dropped, and must not go to standard output.
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        arguments = _parser().parse_args(argv)
    except KeyboardInterrupt:
        print("\ngateloop: interrupted", file=sys.stderr)
        return 1
    if sys.stdout is None:
        print(f"gateloop {arguments.command}: error: standard output is closed; send it to /dev/null", file=sys.stderr)
        return 2
    try:
        output = cast(TextIO, _StandardOutput(sys.stdout))
        with heard(arguments.command), contextlib.redirect_stdout(output):
            _COMMANDS[arguments.command].run(arguments)
    except SystemExit:
        # Another process has failed.
        let_main_speak()
        raise
    except (ValueError, PermissionError, FileExistsError, NotADirectoryError) as error:
        let_main_speak()
        print(f"gateloop {arguments.command}: error: {message(error)}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError, MemoryError, OverflowError) as error:
        if isinstance(error, BrokenPipeError):
            # The reader went away: nothing more may be written, not even when Python flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"gateloop {arguments.command}: failed: {message(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        hint = "; ".join(["interrupted", *interrupt.args])
        print(f"\ngateloop {arguments.command}: {hint}", file=sys.stderr)
        return 1
    return 0
