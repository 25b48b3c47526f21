"""Fair timing: candidates run in turn, several times, and medians are compared with medians of the same rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Times(NamedTuple):
    """The seconds of one candidate: median, least and most, over `runs` runs."""

    median: float
    least: float
    most: float
    runs: int


def seconds(function: Callable[[], object]) -> Callable[[], float]:
    """Wrap `function` to return how long it took."""

    def run() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return run


def interleaved(candidates: Mapping[str, Callable[[], float]], budget: float = 4.0, most: int = 25) -> dict[str, Times]:
    """Run each candidate once to warm up, then all in turn, for at least 3 rounds and as many as `budget` allows.

    Args:
        candidates: functions by name that run once and return the seconds they took.
        budget: seconds for all of them together, warm-up not counted.
        most: largest number of rounds.
    """
    for run in candidates.values():
        run()
    results: dict[str, list[float]] = {name: [] for name in candidates}
    start = time.perf_counter()
    while len(next(iter(results.values()), [])) < most:
        rounds = len(next(iter(results.values()), []))
        if rounds >= 3 and time.perf_counter() - start > budget:
            break
        for name, run in candidates.items():
            results[name].append(run())
        if not candidates:
            break
    return {name: Times(statistics.median(all_), min(all_), max(all_), len(all_)) for name, all_ in results.items()}
