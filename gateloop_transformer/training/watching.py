"""What is seen of a run while it goes on: where its time goes, its memory, its metrics in files and trackers."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from gateloop_transformer.training.config import RunConfig, TrainingConfig

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


def trackers(options: TrainingConfig) -> list[str]:
    """The trackers of Accelerate to use.

    Raises:
        ValueError: the one asked for is not installed.
    """
    if options.track == "none":
        return []
    if options.track == "auto":
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    if importlib.util.find_spec(options.track) is None:
        raise ValueError(f"--track {options.track}: {options.track} is not installed; `pip install {options.track}`")
    return [options.track]


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
        if accelerator.log_with:
            self._start_trackers(path.parent, config, step)
        self.file: TextIO = path.open("a")

    def _start_trackers(self, folder: Path, config: RunConfig, step: int) -> None:
        """Let Accelerate start what was asked for.

        Raises:
            ValueError: it does not start.
        """
        names = [str(name) for name in self.accelerator.log_with]
        flat = {**vars(config.model), **vars(config.training), "data": config.data}
        named = {"wandb": {"name": folder.name, "dir": str(folder)}, "trackio": {"name": folder.name}}
        try:
            if "tensorboard" in names:
                self.accelerator.init_trackers("tensorboard", None, {"tensorboard": {"purge_step": step + 1}})
            else:
                self.accelerator.init_trackers("gateloop", flat, named)
        except (ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            # What has not started cannot be finished.
            self.accelerator.trackers.clear()
            raise ValueError(f"--track {names[0]}: it does not start: {error}") from error

    def write(self, record: dict[str, Any]) -> None:
        """Add a record.

        Raises:
            OSError: it cannot be written.
        """
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        flat = dict(_numbers(record))
        self.accelerator.log(flat, step=flat.pop("step"))

    def close(self) -> None:
        """Nothing more will be written."""
        self.file.close()


def _numbers(record: dict[str, Any]) -> list[tuple[str, Any]]:
    """The numbers in a record; those of a record within it as "outer/inner"."""
    found: list[tuple[str, Any]] = []
    for name, value in record.items():
        if isinstance(value, dict):
            found += [(f"{name}/{inner}", number) for inner, number in _numbers(value)]
        elif isinstance(value, int | float):
            found.append((name, value))
    return found
