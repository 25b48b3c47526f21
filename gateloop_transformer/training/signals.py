"""Signals that ask a run to stop: noted, and obeyed between two steps."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

# A launcher passes on what a terminal has sent to all processes already.
_REPEATED = 1.0


class Signals:
    """While entered, the first SIGINT or SIGTERM is only noted; another one, a second later, interrupts at once.

    `received` is the name of the signal, None before. In other threads than the main one nothing is noted: Python
    delivers signals to that one alone.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.since = 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self.since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self.since > _REPEATED:
            raise KeyboardInterrupt("at once; continue with --resume")
