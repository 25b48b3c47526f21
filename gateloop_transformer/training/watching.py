"""What is seen of a run while it goes on: where its time goes, its memory, its metrics in files and a tracker."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

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


def tracker_of(options: TrainingConfig, folder: Path) -> str | None:
    """The name of the tracker to use for a run in a folder; None where there is none.

    Raises:
        ValueError: the one asked for is not installed, or cannot write there.
    """
    name = "tensorboard" if options.track == "auto" else options.track
    if name == "none":
        return None
    if importlib.util.find_spec(name) is None:
        if options.track == "auto":
            return None
        raise ValueError(f"--track {name}: {name} is not installed; `pip install {name}`")
    if name == "tensorboard" and as_text(str(folder)) != str(folder):
        raise ValueError(
            f"TensorBoard takes no folder whose name is no text, as {str(folder)!r}: --track none, or another --out"
        )
    return name


class Tracker(Protocol):
    """A place beside metrics.jsonl where metrics go."""

    def log(self, values: dict[str, Any], step: int) -> None:
        """Log numbers by name, all of one step."""

    def finish(self) -> None:
        """End the log: nothing more will come."""


class TensorBoard:
    """Event files in the folder of a run, on disk after each step.

    Args:
        folder: of the run.
        step: from which the run goes on: what the files hold of later ones is void.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _hush_threads()
        self._writer = SummaryWriter(str(folder / EVENTS), purge_step=step + 1)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Log numbers by name, all of one step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self) -> None:
        """End the log: nothing more will come."""
        self._writer.close()


def _start(name: str, folder: Path, config: RunConfig, step: int) -> Tracker:
    if name == "tensorboard":
        return TensorBoard(folder, step)
    # Weights & Biases, and trackio, which has the same functions: what they give has `log` and `finish`.
    settings = {**vars(config.model), **vars(config.training), "data": config.data}
    where = {"dir": str(folder)} if name == "wandb" else {}
    run: Tracker = importlib.import_module(name).init(project="gateloop", name=folder.name, config=settings, **where)
    return run


class Log:
    """metrics.jsonl, one object a line, and the tracker.

    Args:
        path: of the file, which is appended to.
        config: of the run, for the tracker.
        step: from which the run goes on.
    """

    def __init__(self, path: Path, config: RunConfig, step: int) -> None:
        self._name = tracker_of(config.training, path.parent)
        self._tracker: Tracker | None = None
        self.file: TextIO = path.open("a", encoding="utf-8")
        try:
            with self._tracking():
                if self._name is not None:
                    self._tracker = _start(self._name, path.parent, config, step)
        except OSError:
            self.close()
            raise

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
            raise OSError(f"the tracker {self._name} failed: {str(error) or type(error).__name__}") from error

    def write(self, record: dict[str, Any]) -> None:
        """Add a record.

        Raises:
            OSError: it cannot be written.
        """
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self._tracker is not None:
            flat = dict(_numbers(record))
            with self._tracking():
                self._tracker.log(flat, step=flat.pop("step"))

    def flush(self) -> None:
        """All that was written is on disk, as far as this process decides it.

        Raises:
            OSError: it is not.
        """
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Nothing more will be written. What mattered was flushed before: there are no errors here."""
        with contextlib.suppress(OSError), self._tracking():
            if self._tracker is not None:
                self._tracker.finish()
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
