"""Messages and progress bars on standard error while a command is at work."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

from gateloop_transformer import waiting
from gateloop_transformer.waiting import LOGGER, Milestones


def say(text: str, stream: TextIO) -> None:
    """Print lines above the progress bars that are shown."""
    # A timer may get here while the main thread is importing tqdm.
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if bars is None:
        print(text, file=stream)
    else:
        bars.write(text, file=stream)
    stream.flush()


class _Lines(logging.Handler):
    """Prints log messages on standard error under the command's name."""

    def __init__(self, command: str) -> None:
        super().__init__(logging.INFO)
        self._command = command

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        # The reader may have gone away; that is reported where a result is printed.
        with contextlib.suppress(OSError, ValueError):
            say(f"gateloop {self._command}: {record.getMessage()}", sys.stderr)


@contextlib.contextmanager
def heard(command: str) -> Iterator[None]:
    """Print the library's messages under this command's name; of several processes only the main one prints them."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    handler, level = _Lines(command), LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.setLevel(level)
        LOGGER.removeHandler(handler)


def importing(what: str) -> contextlib.AbstractContextManager[None]:
    """Announce imports that take seconds, as they may where the disk's cache is cold."""
    return waiting.waiting(f"importing {what}")


@contextlib.contextmanager
def bar(what: str, total: int | None = None, unit: str = "byte", initial: int = 0) -> Iterator[Milestones | Bar]:
    """Show how far a command is: by a bar where standard error is a terminal and tqdm is installed, else by lines.

    Args:
        what: the task.
        total: number of units; None: unknown.
        unit: a word whose plural ends in s.
        initial: number of units that are done already.
    """
    kind = _bars()
    if kind is None:
        yield Milestones(what, total, unit, initial)
        return
    shown = Bar(kind, total, unit, initial)
    try:
        yield shown
    finally:
        shown.close()


def _bars() -> Any:
    """The class of progress bars; None: show none."""
    if not (LOGGER.isEnabledFor(logging.INFO) and sys.stderr.isatty()):
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm


class Bar:
    """A progress bar that appears once the work has taken `waiting.PATIENCE` seconds.

    tqdm's own `delay` would not do: it ends as soon as anything else is written.
    """

    def __init__(self, kind: Any, total: int | None, unit: str, initial: int) -> None:
        scaled = {"unit": "B", "unit_scale": True} if unit == "byte" else {"unit": unit}
        self._make = functools.partial(kind, total=total, dynamic_ncols=True, **scaled)
        self._done, self._bar = initial, None
        self._due = time.monotonic() + waiting.PATIENCE

    def update(self, count: int) -> None:
        """Count further units as done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() >= self._due:
            self._bar = self._make(initial=self._done)

    def set_postfix(self, values: dict[str, str], refresh: bool = True) -> None:
        """Set the values shown behind the bar."""
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=refresh)

    def close(self) -> None:
        """End the bar; it stays visible."""
        if self._bar is not None:
            self._bar.close()
