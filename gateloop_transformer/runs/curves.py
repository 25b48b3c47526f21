"""What metrics.jsonl says of runs, as curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateloop_transformer.stored import DamageError, parse_json

AGAINST = ("tokens", "time", "steps")
# What a record may say that is read here.
_NUMBERS = {"step", "tokens", "seconds", "loss", "train_bits_per_byte", "bits_per_byte"}


@dataclass(frozen=True)
class Points:
    """Bits against each of `AGAINST`."""

    tokens: list[float] = field(default_factory=list)
    time: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)

    def against(self, what: str) -> list[float]:
        """The horizontal axis of that name."""
        values: list[float] = getattr(self, what)
        return values


@dataclass(frozen=True)
class Curve:
    """What a run's metrics.jsonl says: its name, losses in training and validations, both in bits per byte."""

    name: str
    train: Points = field(default_factory=Points)
    valid: Points = field(default_factory=Points)


def read_records(metrics: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; half a line, as a killed or a running process leaves, is passed over.

    Raises:
        ValueError: what curves are drawn of is no number.
    """
    records = []
    for number, line in enumerate(metrics.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        place = f"{str(metrics)!r}, line {number}"
        try:
            record = parse_json(line, place)
        except DamageError:
            continue
        if not isinstance(record, dict) or "step" not in record:
            continue
        for name in _NUMBERS & record.keys():
            if not _is_number(record[name], whole=name == "step"):
                raise DamageError(f"{place} is damaged: {name!r} must be a number, not {record[name]!r}")
        records.append(record)
    return records


def _is_number(value: Any, whole: bool) -> bool:
    """Whether this is a number that a float can hold."""
    return (type(value) is int and abs(value) < 1 << 63) or (type(value) is float and not whole)


def read_curve(folder: Path, name: str | None = None) -> Curve:
    """The curve of the run in a folder, finished or not.

    Args:
        folder: of a run.
        name: what the curve is called; None: as the folder.

    Raises:
        ValueError: no such folder, or its metrics.jsonl is missing or has no losses yet.
    """
    metrics = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise ValueError(f"no folder {str(folder)!r}")
    if not metrics.is_file():
        raise ValueError(f"{str(folder)!r} has no metrics.jsonl: it holds no run that has begun")
    name = folder.resolve().name if name is None else name
    curve = curve_of(read_records(metrics), name)
    if not curve.train.steps and not curve.valid.steps:
        raise ValueError(f"{str(metrics)!r} holds no losses yet")
    return curve


def read_curves(folders: Sequence[Path]) -> list[Curve]:
    """The curves of several runs, called by their folders' names, or by paths where two have the same name.

    Raises:
        ValueError: as `read_curve`, or a folder is named twice.
    """
    names = [folder.resolve().name for folder in folders]
    names = [str(folder) if names.count(name) > 1 else name for folder, name in zip(folders, names, strict=True)]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("the same run is named twice")
    return [read_curve(folder, name) for folder, name in zip(folders, names, strict=True)]


def summary(curve: Curve) -> dict[str, Any]:
    """How far a run has come: steps, tokens, seconds, its last loss, last and best validation, in bits per byte."""
    train, valid = curve.train, curve.valid
    ends = {what: max((value for value in values_of([curve], what)), default=None) for what in AGAINST}
    return {
        "run": curve.name,
        "steps": ends["steps"],
        "tokens": ends["tokens"],
        "seconds": ends["time"],
        "train_bits_per_byte": train.bits[-1] if train.bits else None,
        "bits_per_byte": valid.bits[-1] if valid.bits else None,
        "best_bits_per_byte": min(valid.bits, default=None),
    }


def curve_of(records: Sequence[dict[str, Any]], name: str) -> Curve:
    """Training and validation points; tokens and seconds of a validation are those of the training at its step."""
    curve = Curve(name)
    places: dict[int, tuple[float, float]] = {}
    for record in records:
        step = record["step"]
        tokens, seconds = places.get(step, (math.nan, math.nan))
        places[step] = float(record.get("tokens", tokens)), float(record.get("seconds", seconds))
        # With bytes as tokens the loss says the same in nats, and nothing else is written.
        loss = ("train_bits_per_byte", 1.0) if "train_bits_per_byte" in record else ("loss", math.log(2))
        for (key, unit), points in ((loss, curve.train), (("bits_per_byte", 1.0), curve.valid)):
            if key in record:
                points.tokens.append(places[step][0])
                points.time.append(places[step][1])
                points.steps.append(step)
                points.bits.append(record[key] / unit)
    return curve


def values_of(curves: Sequence[Curve], what: str) -> list[float]:
    """All places of some curves on an axis, as far as they are known."""
    points = [point for curve in curves for point in (curve.train, curve.valid)]
    return [value for each in points for value in each.against(what) if math.isfinite(value)]
