"""What is said on standard error while a command is at work."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from gateloop_transformer.waiting import LOGGER, Milestones, waiting


def say(text: str, stream: TextIO) -> None:
    """Print lines above the bars that are there."""
    # Timers speak while the main thread may be importing it.
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if bars is None:
        print(text, file=stream)
    else:
        bars.write(text, file=stream)
    stream.flush()


class _Lines(logging.Handler):
    """Says what is logged on standard error, as the command's."""

    def __init__(self, command: str) -> None:
        super().__init__(logging.INFO)
        self._command = command

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        # The reader may have gone away: that is seen where a result is printed.
        with contextlib.suppress(OSError, ValueError):
            say(f"gateloop {self._command}: {record.getMessage()}", sys.stderr)


@contextlib.contextmanager
def heard(command: str) -> Iterator[None]:
    """What the library says of its work is said by this command; of several processes by the main one."""
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
    """Around imports that may take seconds, the more where the disk has not been read yet."""
    return waiting(f"importing {what}")


@contextlib.contextmanager
def bar(what: str, total: int | None = None, unit: str = "byte", initial: int = 0, delay: float = 0.0) -> Iterator[Any]:
    """A progress bar where standard error is a terminal and tqdm is installed; elsewhere a line now and then.

    Args:
        what: is done.
        total: of units; None: nobody knows.
        unit: a word whose plural ends in s.
        initial: units that are done already.
        delay: seconds before there is a bar.
    """
    bars = _bars()
    if bars is None:
        yield Milestones(what, total, unit, initial)
        return
    options = {"unit": "B" if unit == "byte" else unit, "unit_scale": unit == "byte", "dynamic_ncols": True}
    with bars(total=total, initial=initial, delay=delay, **options) as shown:
        yield shown


def _bars() -> Any:
    """The class of bars; None: there are to be none."""
    if not (LOGGER.isEnabledFor(logging.INFO) and sys.stderr.isatty()):
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm
