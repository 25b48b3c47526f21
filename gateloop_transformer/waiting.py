"""Says what is going on where it takes long: on the logger "gateloop_transformer", which the command line shows."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

LOGGER = logging.getLogger("gateloop_transformer")
# Seconds in silence, and between lines about the same work.
PATIENCE, EVERY = 2.0, 30.0


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say `what` once it has taken more than `PATIENCE` seconds. Where nobody listens nothing is done."""
    if not LOGGER.isEnabledFor(logging.INFO):
        yield
        return
    timer = threading.Timer(PATIENCE, LOGGER.info, [f"{what} ..."])
    timer.daemon = True
    # Where no thread can be had nothing is said.
    with contextlib.suppress(RuntimeError):
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Milestones:
    """Says how far a work of many parts has come: once it has taken `PATIENCE` seconds, then every `EVERY` seconds.

    It is used as a tqdm bar is.

    Args:
        what: is done.
        total: parts; None: nobody knows.
        unit: a part, in a word whose plural ends in s.
        initial: parts that are done already.
    """

    def __init__(self, what: str, total: int | None = None, unit: str = "byte", initial: int = 0) -> None:
        self._what, self._total, self._unit, self._done = what, total, unit, initial
        self._more = ""
        self._due = time.monotonic() + PATIENCE

    def set_postfix(self, values: dict[str, str], refresh: bool = True) -> None:
        """What else there is to say with the next line."""
        del refresh
        self._more = "".join(f", {name} {value}" for name, value in values.items())

    def update(self, count: int) -> None:
        """So many parts more are done."""
        self._done += count
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + EVERY
            of = "" if self._total is None else f" of {self._total:,}"
            LOGGER.info(f"{self._what}: {self._done:,}{of} {self._unit}s{self._more}")
