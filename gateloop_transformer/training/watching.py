"""What is seen of a run while it goes on: where its time goes, its memory, its metrics in files and trackers."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from gateloop_transformer.runs.config import RunConfig, TrainingConfig
from gateloop_transformer.runs.folder import EVENTS
from gateloop_transformer.stored import as_text

PHASES = ("data", "forward", "backward", "optimizer", "communication")


class Clock:
    """Seconds of a step by phase. The device is waited for at the end of each.

    Args:
        device: on which the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start()

    def start(self) -> None:
        """A step begins."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.began = self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """What was done since the last call was this phase."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now

    def move(self, seconds: float, source: str, target: str) -> None:
        """So much of one phase was another."""
        seconds = min(max(seconds, 0.0), self.seconds[source])
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def elapsed(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self.began

    def shares(self) -> dict[str, float]:
        """The share of each phase in the time of all."""
        total = sum(self.seconds.values()) or 1.0
        return {phase: round(seconds / total, 4) for phase, seconds in self.seconds.items()}


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this process has held at a time, on the device or, on the CPU, in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def trackers(options: TrainingConfig, folder: Path) -> list[str]:
    """The trackers of Accelerate to use for a run in a folder.

    Raises:
        ValueError: the one asked for is not installed, or cannot write there.
    """
    name = "tensorboard" if options.track == "auto" else options.track
    if name == "none":
        return []
    if importlib.util.find_spec(name) is None:
        if options.track == "auto":
            return []
        raise ValueError(f"--track {name}: {name} is not installed; `pip install {name}`")
    if name == "tensorboard" and as_text(str(folder)) != str(folder):
        raise ValueError(
            f"TensorBoard takes no folder whose name is no text, as {str(folder)!r}: --track none, or another --out"
        )
    return [name]


class Log:
    """metrics.jsonl, one object a line, and the trackers.

    Args:
        path: of the file, which is appended to.
        accelerator: Accelerate's, which holds the trackers.
        config: of the run, for the trackers.
        step: from which the run goes on: what a tracker has seen of later ones is void.
    """

    def __init__(self, path: Path, accelerator: Any, config: RunConfig, step: int) -> None:
        self.accelerator = accelerator
        self.file: TextIO = path.open("a", encoding="utf-8")
        try:
            with self._tracking():
                self._start(path.parent, config, step)
        except OSError:
            # What was not started cannot be ended.
            self.accelerator.trackers = []
            self.close()
            raise

    def _start(self, folder: Path, config: RunConfig, step: int) -> None:
        accelerator = self.accelerator
        if "tensorboard" in map(str, accelerator.log_with):
            _hush_threads()
            accelerator.init_trackers(EVENTS, None, {"tensorboard": {"purge_step": step + 1}})
        elif accelerator.log_with:
            flat = {**vars(config.model), **vars(config.training), "data": config.data}
            named = {"wandb": {"name": folder.name, "dir": str(folder)}, "trackio": {"name": folder.name}}
            accelerator.init_trackers("gateloop", flat, named)

    @contextlib.contextmanager
    def _tracking(self) -> Iterator[None]:
        """A tracker is at work.

        Raises:
            OSError: it failed.
        """
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            # Each tracker has errors of its own, which are not to cost a run what it has not saved.
            name = ", ".join(map(str, self.accelerator.log_with))
            raise OSError(f"the tracker {name} failed: {str(error) or type(error).__name__}") from error

    def write(self, record: dict[str, Any]) -> None:
        """Add a record.

        Raises:
            OSError: it cannot be written.
        """
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        flat = dict(_numbers(record))
        with self._tracking():
            self.accelerator.log(flat, step=flat.pop("step"))

    def flush(self) -> None:
        """All that was written is on disk, as far as this process decides it.

        Raises:
            OSError: it is not.
        """
        self.file.flush()
        os.fsync(self.file.fileno())
        with self._tracking():
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    tracker.writer.flush()

    def close(self) -> None:
        """Nothing more will be written. What mattered was flushed before: there are no errors here."""
        trackers, self.accelerator.trackers = self.accelerator.trackers, []
        for tracker in trackers:
            with contextlib.suppress(OSError), self._tracking():
                tracker.finish()
        with contextlib.suppress(OSError):
            self.file.close()


def _hush_threads() -> None:
    """TensorBoard's thread tells the caller of what the system refuses it; it need not print a traceback as well."""
    before = threading.excepthook
    if getattr(before, "hushes", False):
        return

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__name__ == "_AsyncWriterThread"):
            before(args)

    hook.hushes = True  # type: ignore[attr-defined]
    threading.excepthook = hook


def _numbers(record: dict[str, Any]) -> list[tuple[str, Any]]:
    """The numbers in a record; those of a record within it as "outer/inner"."""
    found: list[tuple[str, Any]] = []
    for name, value in record.items():
        if isinstance(value, dict):
            found += [(f"{name}/{inner}", number) for inner, number in _numbers(value)]
        elif isinstance(value, int | float):
            found.append((name, value))
    return found
