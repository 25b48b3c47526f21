"""The `gateloop` command: one file for each command, flags from dataclasses, one line for an error."""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        let_main_speak()
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gateloop", description="Train, run and evaluate GateLoop language models.")
    parser.add_argument("--version", action="version", version=f"gateloop {gateloop_transformer.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for command in _COMMANDS.values():
        command.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 (it failed) or 2 (something wrong was passed)."""
    # See docs/decisions/0005: read when torch is first imported, and whoever has set either decides.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(errors="replace")
    if sys.stderr is None:
        # Closed by the caller: nothing can be said to it, and it must not go to standard output instead.
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        arguments, unknown = _parser().parse_known_args(argv)
    except KeyboardInterrupt:
        print("\ngateloop: interrupted", file=sys.stderr)
        return 1
    if unknown:
        # The parser itself would name the command that all have in common.
        _Parser(prog=f"gateloop {arguments.command}").error(f"unrecognized arguments: {' '.join(unknown)}")
    if sys.stdout is None:
        print(f"gateloop {arguments.command}: error: standard output is closed; send it to /dev/null", file=sys.stderr)
        return 2
    try:
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
            # The reader went away; nothing more can be said to it, not even at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"gateloop {arguments.command}: failed: {message(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        hint = "; ".join(["interrupted", *interrupt.args])
        print(f"\ngateloop {arguments.command}: {hint}", file=sys.stderr)
        return 1
    return 0
