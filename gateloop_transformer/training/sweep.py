"""Many runs that differ in a few settings: one process each, in turn, to be continued after whatever stops them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gateloop_transformer.configuration import TransformerConfig
from gateloop_transformer.data.sources import absolute, is_standard_input, open_source
from gateloop_transformer.files import make_folder, write_text
from gateloop_transformer.nearest import did_you_mean
from gateloop_transformer.runs.config import TrainingConfig, resolve, value_types
from gateloop_transformer.runs.curves import read_curve
from gateloop_transformer.runs.folder import LOCK, locked, new_model
from gateloop_transformer.runs.plot import draw_curves, draw_rates
from gateloop_transformer.runs.weights import CONFIG
from gateloop_transformer.stored import DamageError, parse_json, read_json
from gateloop_transformer.waiting import waiting

SWEEP, RESULTS, CURVES, RATES = "sweep.json", "results.json", "curves.png", "lr.png"
# Seconds that an interrupted run may take to save itself.
_PATIENCE = 120.0

Row = dict[str, Any]


def _fields() -> dict[str, tuple[dataclasses.Field[Any], tuple[type, ...]]]:
    """What a grid may be made of: every field of a configuration, and its types."""
    kinds = (TrainingConfig, TransformerConfig)
    return {item.name: (item, value_types(kind)[item.name]) for kind in kinds for item in dataclasses.fields(kind)}


def _value(name: str, text: str, flag: str) -> Any:
    item, kinds = _fields()[name]
    choices = item.metadata["choices"]
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            with contextlib.suppress(ValueError):
                return kind(text)
    if str in kinds and text and (choices is None or text in choices):
        return text
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    expected = ", ".join(choices) if choices else " or ".join(names[kind] for kind in kinds if kind in names)
    raise ValueError(f"{flag}: expected {expected}, not {text!r}")


def parse_grid(texts: Sequence[str], seeds: str | None = None) -> dict[str, list[Any]]:
    """Settings and their values from texts like "lr=1e-3,3e-3"; `seeds`, like "0,1,2", are those of the seed.

    Raises:
        ValueError: no such setting, a value that it does not take, or one named twice.

    >>> parse_grid(["lr=1e-3,3e-3", "gate=ring"], "0,1")
    {'lr': [0.001, 0.003], 'gate': ['ring'], 'seed': [0, 1]}
    """
    grid: dict[str, list[Any]] = {}
    given = [(f"--grid {text}", text) for text in texts]
    if seeds is not None:
        given.append(("--seeds", f"seed={seeds}"))
    for flag, text in given:
        name, _, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if name not in _fields():
            near = did_you_mean(name, _fields()) or "; 'gateloop sweep --help-all' names them"
            raise ValueError(f"{flag}: there is no setting {name!r}{near}")
        if not values:
            takes = "N,N,..." if flag == "--seeds" else "NAME=VALUE,VALUE,..."
            raise ValueError(f"{flag}: no values; it takes {takes}")
        if name in grid:
            raise ValueError(f"{flag}: {name!r} is given twice")
        grid[name] = [_value(name, value.strip(), flag) for value in values.split(",")]
        if len(set(grid[name])) < len(grid[name]):
            raise ValueError(f"{flag}: a value is given twice in {values!r}")
    return grid


def _differences(stored: Any, now: dict[str, Any]) -> list[str]:
    """What a stored sweep has otherwise, in words."""
    if not isinstance(stored, dict):
        return ["its sweep.json is damaged"]
    said = []
    for part in ("data", "settings", "grid"):
        old, new = stored.get(part), now[part]
        if isinstance(old, dict) and isinstance(new, dict):
            names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
            said += [f"{name} is {old.get(name)!r}, not {new.get(name)!r}" for name in names]
        elif old != new:
            said.append(f"{part} is {old!r}, not {new!r}")
    return said or ([] if stored == now else ["it is of another version"])


@dataclass(frozen=True)
class Sweep:
    """Every combination of a grid's values, with settings common to all.

    folder: has a folder and a log for each run. data: as for `gateloop train`. settings: the flags common to all runs,
    by name: fields of the configurations, the preset, and whatever else `gateloop train` takes. grid: values by field.
    """

    folder: Path
    data: str | None
    settings: dict[str, Any]
    grid: dict[str, list[Any]]

    def combinations(self) -> list[dict[str, Any]]:
        """The grid's settings of each run."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]

    def check(self) -> None:
        """Every combination makes sense, and the folder holds nothing but this sweep.

        Raises:
            ValueError: one does not, or another sweep or something else is there.
        """
        both = sorted(self.grid.keys() & self.settings.keys())
        if not self.grid or both:
            what = f"{both[0]} is both in the grid and a flag" if both else "a sweep needs a --grid or --seeds"
            raise ValueError(what)
        for values in self.combinations():
            settings = {name: value for name, value in {**self.settings, **values}.items() if name in _fields()}
            try:
                config = resolve(self.settings.get("preset", "tiny"), settings, self.data)
                with torch.device("meta"):
                    new_model(config.model)
            except ValueError as error:
                raise ValueError(f"{name_of(values)}: {error}") from error
        self._check_folder()
        # Before anything is written; what is in the files is for the first run to say.
        open_source(self.data, field=self.settings.get("field"))

    def _check_folder(self) -> None:
        where = repr(str(self.folder))
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{where} is a file, not a folder")
        if (self.folder / SWEEP).is_file():
            other = _differences(read_json(self.folder / SWEEP), parse_json(json.dumps(self._described()), "the sweep"))
            if other:
                raise ValueError(f"{where} holds a sweep with other settings: {'; '.join(other)}")
        elif self.folder.exists() and any(path.name != LOCK for path in self.folder.iterdir()):
            raise ValueError(f"{where} is not empty and holds no sweep: choose another folder")

    def _described(self) -> dict[str, Any]:
        return {"format": 1, "data": self.data, "settings": self.settings, "grid": self.grid}

    def command(self, values: dict[str, Any]) -> list[str]:
        """That of a run; to go on with one that has begun."""
        target = self.folder / name_of(values)
        command = [sys.executable, "-m", "gateloop_transformer", "train", "--json", f"--out={target}"]
        command += [] if self.data is None else [self.data]
        command += [_flag(name, value) for name, value in {**self.settings, **values}.items()]
        return command + ["--resume"] * (target / CONFIG).exists()


def name_of(values: dict[str, Any]) -> str:
    """The name of a combination, and of its folder.

    >>> name_of({"lr": 1e-3, "layer_pattern": "gate attention"})
    'lr=0.001,layer_pattern=gate-attention'
    """
    return ",".join(f"{name}={value}" for name, value in values.items()).replace(" ", "-").replace("/", "-")


def log_of(name: str) -> str:
    """The name of the file with what a run says on standard error."""
    return f"{name}.log"


def _flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool) and type(None) not in _fields()[name][1]:
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag}={value}"


def run(sweep: Sweep, report: Callable[[str], object]) -> list[Row]:
    """Run what has not finished, one after the other, and draw all of it.

    Args:
        sweep: checked here.
        report: called with a line for each run that begins, and one when it ends.

    Returns:
        A row for each run: name, settings, status ("finished" or "failed"), and its result, or the error's last line.

    Raises:
        ValueError: as `Sweep.check`, or another process is at work in the folder.
        KeyboardInterrupt: the run at work was stopped; the message says how to go on.
    """
    with waiting("checking the settings of all runs"):
        sweep.check()
    make_folder(sweep.folder)
    with locked(sweep.folder), _terminable():
        write_text(sweep.folder / SWEEP, json.dumps(sweep._described(), indent=2) + "\n")
        results = sweep.folder / RESULTS
        done = _finished(results) if results.exists() else {}
        rows: list[Row] = []
        combinations = sweep.combinations()
        for n, values in enumerate(combinations, 1):
            name = name_of(values)
            if name not in done:
                report(f"{n}/{len(combinations)} {name}: training, see {sweep.folder / log_of(name)}")
            row = done[name] if name in done else _run_one(sweep, values)
            rows.append(row)
            later = [done[name_of(each)] for each in combinations[n:] if name_of(each) in done]
            write_text(results, json.dumps({"rows": rows + later}, indent=2) + "\n")
            report(f"{n}/{len(combinations)} {_said(row)}" + (", as before" if name in done else ""))
        with waiting("drawing"):
            _draw(sweep, rows)
    return rows


def _finished(results: Path) -> dict[str, Row]:
    """The rows of runs that have finished, by their names.

    Raises:
        ValueError: the file is damaged.
    """
    values = read_json(results)
    rows = values.get("rows") if isinstance(values, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and _is_sound(row) for row in rows):
        raise DamageError(
            f"{str(results)!r} is damaged: it holds no rows of a sweep; without it all runs are run again"
        )
    return {row["name"]: row for row in rows if row["status"] == "finished"}


def _is_sound(row: Row) -> bool:
    numbers = (row.get(name) for name in ("bits_per_byte", "seconds", "steps"))
    return (
        isinstance(row.get("name"), str)
        and isinstance(row.get("settings"), dict)
        and "status" in row
        and (row["status"] != "finished" or all(type(number) in (int, float) for number in numbers))
    )


def _said(row: Row) -> str:
    if row["status"] == "failed":
        return f"{row['name']}: failed: {row['error']}"
    return f"{row['name']}: {row['bits_per_byte']:.4f} bits per byte, {row['seconds']:.0f} s"


def _run_one(sweep: Sweep, values: dict[str, Any]) -> Row:
    """Start or resume one run and wait for it."""
    name = name_of(values)
    row: Row = {"name": name, "settings": values}
    log = sweep.folder / log_of(name)
    with log.open("ab") as errors:
        # Of a session of its own, so that an interrupt at the keyboard reaches it once, from here.
        child = subprocess.Popen(
            sweep.command(values),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        try:
            output, _ = child.communicate()
        except KeyboardInterrupt as interrupt:
            _stop(child)
            raise KeyboardInterrupt(f"{name} was stopped; the same command continues the sweep") from interrupt
    if child.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
        error = lines[-1] if child.returncode > 0 else f"ended by signal {-child.returncode} (see {log.name})"
        return {**row, "status": "failed", "exit_code": child.returncode, "error": error}
    result = parse_json(output, f"what the run {name} has printed")
    return {**row, "status": "finished", **{key: value for key, value in result.items() if key != "out"}}


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ask a run to end, which it does with a checkpoint; after a while, or when interrupted again, insist."""
    child.send_signal(signal.SIGINT)
    try:
        child.wait(_PATIENCE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        child.kill()
        child.wait()
    finally:
        if child.stdout is not None:
            child.stdout.close()


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM does what an interrupt does: the run at work must not go on alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _draw(sweep: Sweep, rows: Sequence[Row]) -> None:
    """The curves of all runs that have some; where the learning rate is in the grid, validation against it."""
    curves = []
    for row in rows:
        # A run that failed at once has nothing to draw.
        with contextlib.suppress(ValueError):
            curves.append(read_curve(sweep.folder / row["name"], row["name"]))
    if curves:
        draw_curves(curves, sweep.folder / CURVES)
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "lr" in sweep.grid and row["status"] == "finished":
            alike = name_of({name: value for name, value in row["settings"].items() if name not in ("lr", "seed")})
            groups.setdefault(alike, []).append((row["settings"]["lr"], row["bits_per_byte"]))
    if groups:
        draw_rates(groups, sweep.folder / RATES)


def ranked(rows: Sequence[Row]) -> list[Row]:
    """The best validation first; what has failed last."""
    return sorted(rows, key=lambda row: (row["status"] == "failed", row.get("bits_per_byte", 0.0)))


def table(rows: Sequence[Row]) -> str:
    """Ranked rows as text in columns."""
    columns = [("run", "bits per byte", "steps", "seconds")]
    for row in ranked(rows):
        if row["status"] == "failed":
            columns.append((row["name"], "failed", "", ""))
        else:
            columns.append((row["name"], f"{row['bits_per_byte']:.4f}", f"{row['steps']:,}", f"{row['seconds']:.1f}"))
    widths = [max(len(line[n]) for line in columns) for n in range(4)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(line[n].rjust(widths[n]) for n in (1, 2, 3))]) for line in columns
    )


def data_of(data: str | None) -> str | None:
    """DATA as runs are given it: a path does not depend on where the command is run.

    Raises:
        ValueError: it is standard input, which the first run would take from the others.
    """
    if is_standard_input(data):
        raise ValueError("a sweep cannot train on standard input: name files")
    return absolute(data)
