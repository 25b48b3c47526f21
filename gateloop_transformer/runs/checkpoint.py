"""Checkpoints: what a run goes on from. Whole or not there; checked when read; the last few and the best are kept."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from gateloop_transformer.files import PARTIAL, aside, digest, remove, replacing, sync, write_text
from gateloop_transformer.layers.state import TransformerState, load_state, save_state
from gateloop_transformer.runs.config import RunConfig, value_types
from gateloop_transformer.runs.folder import CHECKPOINTS, publish, published_in, read_weights, steps
from gateloop_transformer.runs.weights import MODEL, describe
from gateloop_transformer.stored import DamageError, read_json, read_tensors, write_tensors

OPTIMIZER, AVERAGE, CARRIED, PROGRESS, CHECKSUMS = (
    "optimizer.safetensors",
    "average.safetensors",
    "carried.safetensors",
    "progress.json",
    "checksums.json",
)


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    step: done so far, and thereby the place in the data. seconds: of training, but for the first step of each process.
    tokens: trained on. skipped: batches passed over because something in them was not finite. bits_per_byte: of a
    validation after this very step.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    skipped: int = 0
    bits_per_byte: float | None = None


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds: whole tensors on the CPU, the same for any number of processes.

    optimizer: "parameter|kind" to its tensor. average: of the weights, empty without one. carried: the states that the
    next windows begin with, of all micro-batches in a row; None where windows do not follow each other.
    """

    progress: Progress
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    average: dict[str, Tensor]
    carried: TransformerState | None = None


def write(folder: Path, snapshot: Snapshot, config: RunConfig) -> None:
    """Write checkpoints/step-N and the run's model.safetensors; forget all but the last few checkpoints and the best.

    A checkpoint appears under its name only when all of it is on disk.

    Raises:
        OSError: something cannot be written. Earlier checkpoints are as they were.
    """
    target = folder / CHECKPOINTS / f"step-{snapshot.progress.step:09d}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as other:
        other.mkdir()
        _fill(other, snapshot, config)
    sync(target.parent)
    publish(folder, snapshot.average or snapshot.model, config)
    _forget(folder, config.training.keep)


def _fill(target: Path, snapshot: Snapshot, config: RunConfig) -> None:
    write_tensors(target / MODEL, snapshot.model, {"model": describe(config.model), "format": "pt"})
    write_tensors(target / OPTIMIZER, snapshot.optimizer)
    if snapshot.average:
        write_tensors(target / AVERAGE, snapshot.average)
    if snapshot.carried is not None:
        save_state(snapshot.carried, target / CARRIED)
    write_text(target / PROGRESS, json.dumps(asdict(snapshot.progress)))
    checksums = {path.name: digest(path) for path in sorted(target.iterdir())}
    write_text(target / CHECKSUMS, json.dumps(checksums, indent=2))


def _forget(folder: Path, keep: int) -> None:
    """Delete all checkpoints but the last few and the best."""
    found = steps(folder)
    best = best_checkpoint(folder)
    for old in found[:-keep]:
        if old != best:
            # Half a checkpoint must not stand under a whole one's name.
            with aside(old) as gone:
                os.replace(old, gone)
                remove(gone)


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the fewest bits per byte on validation data; None where none was validated."""
    validated = [path for path in steps(folder) if score(path) < math.inf]
    return min(validated, key=score) if validated else None


def weights_file(folder: Path, which: str) -> Path:
    """The weights that a checkpoint would publish.

    Args:
        folder: of the run.
        which: "last", what the folder has published, which may be an index of files; "best" on validation data; or the
            number of a step.

    Raises:
        ValueError: there is no such checkpoint, or nothing is published.
    """
    if which == "last":
        return published_in(folder)
    found = {str(int(path.name.removeprefix("step-"))): path for path in steps(folder)}
    path = best_checkpoint(folder) if which == "best" else found.get(which)
    if path is None:
        there = ", ".join(["last", *(["best"] if best_checkpoint(folder) else []), *found])
        raise ValueError(f"{str(folder)!r} has no checkpoint {which!r}; there are {there}")
    verify(path)
    return path / AVERAGE if (path / AVERAGE).exists() else path / MODEL


def score(path: Path) -> float:
    """Bits per byte on validation data after a checkpoint's very step; infinity where none were measured."""
    try:
        found = _read_progress(path / PROGRESS).bits_per_byte
    except DamageError:
        return math.inf
    return math.inf if found is None else found


def verify(path: Path) -> None:
    """Every file of a checkpoint has the content that it was written with.

    Raises:
        DamageError: one has not, or is missing.
    """
    checksums = read_json(path / CHECKSUMS)
    if not isinstance(checksums, dict) or not {MODEL, OPTIMIZER, PROGRESS} <= checksums.keys():
        raise DamageError(f"{str(path / CHECKSUMS)!r} is damaged: it lacks files of a checkpoint")
    for name, expected in checksums.items():
        if not (path / name).is_file():
            raise DamageError(f"{str(path / name)!r} is missing")
        if digest(path / name) != expected:
            raise DamageError(f"{str(path / name)!r} is damaged: it does not have the checksum it was written with")


def newest_whole(folder: Path, warn: Callable[[str], object]) -> Path | None:
    """The newest checkpoint that is whole; None where there is no checkpoint at all.

    Args:
        folder: of the run.
        warn: told of each damaged one.

    Raises:
        ValueError: there are checkpoints, but none is whole.
    """
    problems = []
    for path in reversed(steps(folder)):
        try:
            verify(path)
        except DamageError as error:
            problems.append(f"{error}")
            continue
        for problem in problems:
            warn(f"{problem}; going back to {path.name}")
        return path
    if problems:
        what = "it is the only checkpoint" if len(problems) == 1 else f"none of {len(problems)} checkpoints is whole"
        raise ValueError(f"{problems[0]}; {what}: start again with --overwrite")
    return None


def set_aside(folder: Path, step: int) -> None:
    """Rename the checkpoints after `step`, all of them damaged: they are not to be counted, nor to be lost."""
    for path in steps(folder):
        if int(path.name.removeprefix("step-")) > step:
            other = path.with_name(f"damaged-{path.name}")
            remove(other)
            os.replace(path, other)
    for partial in (folder / CHECKPOINTS).glob(f"step-*{PARTIAL}"):
        remove(partial)


def read(path: Path, config: RunConfig) -> Snapshot:
    """Read a checkpoint that `verify` has found whole.

    Raises:
        ValueError: it is of another configuration, or something in it is missing.
    """
    progress = _read_progress(path / PROGRESS)
    model = read_weights(path / MODEL, config.model)
    optimizer = read_tensors(path / OPTIMIZER)[0]
    average = read_tensors(path / AVERAGE)[0] if config.training.ema else {}
    carried = _read_carried(path / CARRIED) if config.training.carry_state else None
    return Snapshot(progress, model, optimizer, average, carried)


def _read_progress(path: Path) -> Progress:
    values, kinds = read_json(path), value_types(Progress)
    if not isinstance(values, dict) or values.keys() != kinds.keys():
        raise DamageError(f"{str(path)!r} is damaged: it must hold {', '.join(kinds)}, and nothing else")
    for name, value in values.items():
        if not (type(value) in kinds[name] or (float in kinds[name] and type(value) is int)):
            raise DamageError(f"{str(path)!r} is damaged: {name} cannot be {value!r}")
    return Progress(**values)


def _read_carried(path: Path) -> TransformerState:
    try:
        state = load_state(path)
    except FileNotFoundError as error:
        raise DamageError(f"{str(path)!r} is missing") from error
    except ValueError as error:
        raise DamageError(str(error)) from error
    if not isinstance(state, TransformerState):
        raise DamageError(f"{str(path)!r} is damaged: it holds no state of a model")
    return state
