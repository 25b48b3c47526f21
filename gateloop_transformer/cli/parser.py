"""The parser of the command line: it adds a command's flags when they are needed, and suggests the nearest word."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from gateloop_transformer.cli.errors import let_main_speak
from gateloop_transformer.nearest import did_you_mean, nearest


class Rare(str):
    """The help of a flag that --help leaves out and --help-all shows."""

    __slots__ = ()


def _is_rare(action: argparse.Action) -> bool:
    return isinstance(action.help, Rare)


class _Short(argparse.HelpFormatter):
    """A help formatter that leaves out rare flags."""

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[Any],
        prefix: str | None = None,
    ) -> None:
        super().add_usage(usage, [action for action in actions if not _is_rare(action)], groups, prefix)

    def add_argument(self, action: argparse.Action) -> None:
        if not _is_rare(action):
            super().add_argument(action)


class _HelpAll(argparse.Action):
    """The action of --help-all: help with rare flags."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_values: object) -> None:
        parser.formatter_class = argparse.HelpFormatter
        parser.print_help()
        parser.exit()


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, with exit code 2.

    Args:
        fill: adds the arguments; it is called when the parser is used.
        options: options of `ArgumentParser`.
    """

    def __init__(self, *, fill: Callable[[Parser], None] | None = None, **options: Any) -> None:
        super().__init__(formatter_class=_Short, **options)
        # Later Pythons have hints of their own.
        self.suggest_on_error = False
        self._all = self.add_argument("--help-all", action=_HelpAll, help=argparse.SUPPRESS)
        self._fill = fill
        self._given: list[str] = []

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as argparse does, but refuse unknown arguments; without the command that is needed, show help."""
        self._complete()
        self._given = list(sys.argv[1:] if args is None else args)
        if not self._given and any(action.required for action in self._commands()):
            self.print_help()
            self.exit()
        found, unknown = super().parse_known_args(self._given, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Print an error in one line and exit with code 2."""
        let_main_speak()
        near = " and ".join(self._near())
        hint = f"; did you mean {near}?" if near else ""
        self.exit(2, f"{self.prog}: error: {message}{hint} (see {self.prog} --help)\n")

    def _complete(self) -> None:
        """Add the arguments; --help names --help-all where some are rare."""
        fill, self._fill = self._fill, None
        if fill is None:
            return
        fill(self)
        rare = sum(map(_is_rare, self._actions))
        if rare:
            self._all.help = f"show {rare} more options and exit"

    def _commands(self) -> list[argparse.Action]:
        """The argument that is a command, if there is one."""
        return [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]

    def _near(self) -> Iterator[str]:
        """The known flags nearest to each unknown one that was given."""
        given: Iterable[str] = self._given
        if self._commands():
            # Flags after a command belong to the command.
            given = itertools.takewhile(lambda word: word.startswith("-"), given)
        for word in itertools.takewhile(lambda word: word != "--", given):
            name = word.partition("=")[0]
            if name.startswith("--") and not any(flag.startswith(name) for flag in self._option_string_actions):
                flag = nearest(name, self._option_string_actions)
                if flag is not None:
                    yield flag

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            flags = self._option_string_actions if action in self._commands() else ()
            error.message += did_you_mean(value, [*(action.choices or ()), *flags])
            raise
