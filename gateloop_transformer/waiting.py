"""Says what is going on when it takes long, on the logger "gateloop_transformer", which the command line shows."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

LOGGER = logging.getLogger("gateloop_transformer")
# Seconds before the first line about some work, and between further lines.
PATIENCE, EVERY = 2.0, 30.0


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say `what` once it has taken more than `PATIENCE` seconds, if anybody listens."""
    if not LOGGER.isEnabledFor(logging.INFO):
        yield
        return
    timer = threading.Timer(PATIENCE, LOGGER.info, [f"{what} ..."])
    timer.daemon = True
    # If no thread can be started, nothing is said.
    with contextlib.suppress(RuntimeError):
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Milestones:
    """Reports the progress of a long task: after `PATIENCE` seconds, then every `EVERY` seconds.

    It has the methods of a tqdm bar.

    Args:
        what: the task.
        total: number of units; None: unknown.
        unit: a word whose plural ends in s.
        initial: number of units that are done already.
    """

    def __init__(self, what: str, total: int | None = None, unit: str = "byte", initial: int = 0) -> None:
        self._what, self._total, self._unit, self._done = what, total, unit, initial
        self._more = ""
        self._due = time.monotonic() + PATIENCE

    def set_postfix(self, values: dict[str, str], refresh: bool = True) -> None:
        """Set what else the next line says."""
        del refresh
        self._more = "".join(f", {name} {value}" for name, value in values.items())

    def update(self, count: int) -> None:
        """Count further units as done."""
        self._done += count
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + EVERY
            of = "" if self._total is None else f" of {self._total:,}"
            LOGGER.info(f"{self._what}: {self._done:,}{of} {self._unit}s{self._more}")
