"""A run's folder: what is in it, written whole or not at all, and read with one clear error. No pickle."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gateloop_transformer.layers.state import TransformerState, load_state, save_state
from gateloop_transformer.model import Transformer
from gateloop_transformer.training.config import ModelConfig, RunConfig, with_later_fields

CONFIG, MODEL, METRICS, CURVE, CHECKPOINTS = (
    "config.json",
    "model.safetensors",
    "metrics.jsonl",
    "loss.png",
    "checkpoints",
)
LOCK = ".lock"


class DamageError(ValueError):
    """A file of a run is missing or cannot be read."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands: steps done, seconds of training so far."""

    step: int
    seconds: float


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training in the folder; the system lets go when this one ends, however it does.

    The file `.lock` stays: once it were deleted, two processes could each lock a file of that name. Where Python has
    no fcntl (Windows) nothing is locked.

    Raises:
        ValueError: another process is training there.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another process is training in {str(folder)!r}") from error
    except OSError as error:
        warnings.warn(
            f"{str(folder)!r} cannot be locked: let one process at a time train there ({error})", stacklevel=4
        )


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """The flags allow training in the folder, as far as can be said before it is locked. Nothing in it is touched.

    Raises:
        ValueError: they do not, another process is training there, or what is there is not a run's.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file, not a folder")
    if (folder / LOCK).exists():
        with locked(folder):
            pass
    check_contents(folder, resume, overwrite)


def check_contents(folder: Path, resume: bool, overwrite: bool) -> None:
    """The flags allow training with what is in the folder.

    Raises:
        ValueError: they do not, or what is there is not a run's.
    """
    where = repr(str(folder))
    _check_kinds(folder)
    saved = newest_step(folder) is not None
    if resume and not saved and (folder / MODEL).exists():
        raise ValueError(
            f"{where} has {MODEL} but no checkpoint to continue from: use the model as it is, or --overwrite it"
        )
    present = [name for name in (CONFIG, MODEL, METRICS, CURVE, CHECKPOINTS) if (folder / name).exists()]
    if resume or not present:
        return
    try:
        read_config(folder)
    except ValueError as error:
        raise ValueError(
            f"{where} holds {present[0]}, but not a run's; nothing was deleted, choose another folder ({error})"
        ) from error
    if not overwrite and not saved and MODEL not in present:
        raise ValueError(f"{where} holds a run that ended before its first checkpoint: replace it with --overwrite")
    if not overwrite:
        raise ValueError(f"{where} already holds a run: continue it with --resume or replace it with --overwrite")


def _check_kinds(folder: Path) -> None:
    for name in (CONFIG, MODEL, METRICS, CURVE, LOCK):
        if (folder / name).is_dir():
            raise ValueError(f"{str(folder / name)!r} is a folder, not a file: choose another folder for the run")
    if (folder / CHECKPOINTS).exists() and not (folder / CHECKPOINTS).is_dir():
        raise ValueError(f"{str(folder / CHECKPOINTS)!r} is a file, not a folder: choose another folder for the run")


def clear_run(folder: Path) -> None:
    """Delete a run's files, and nothing else, from a folder."""
    for name in (CONFIG, MODEL, METRICS, CURVE):
        (folder / name).unlink(missing_ok=True)
    checkpoints = folder / CHECKPOINTS
    for old in checkpoints.glob("step-*"):
        shutil.rmtree(old)
    if checkpoints.is_dir() and not any(checkpoints.iterdir()):
        checkpoints.rmdir()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text`, whole or not at all."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text)
    _sync(aside)
    os.replace(aside, path)


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    aside = path.with_name(path.name + ".partial")
    aside.unlink(missing_ok=True)
    aside.touch()
    mode = aside.stat().st_mode
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, aside, metadata)
    except SafetensorError as error:
        aside.unlink(missing_ok=True)
        raise OSError(f"cannot write {str(path)!r}: {error}") from error
    # safetensors makes files that only their owner may read; this one is to be as readable as the others.
    aside.chmod(mode)
    _sync(aside)
    os.replace(aside, path)


def _read_tensors(path: Path, config: RunConfig | None = None) -> dict[str, Tensor]:
    """The tensors of a file; with `config`, refused if they were written for another model."""
    if not path.is_file():
        raise DamageError(f"{str(path)!r} is missing")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DamageError(f"{str(path)!r} is damaged: {error}") from error
    if config is not None and "model" in metadata and _described(metadata["model"]) != vars(config.model):
        raise ValueError(f"{str(path)!r} does not fit {CONFIG}: it was written for {metadata['model']}")
    return tensors


def _describe(config: RunConfig) -> str:
    """The model's configuration, kept with its weights: other models may have the same shapes."""
    return json.dumps(vars(config.model), sort_keys=True)


def _described(text: str) -> Any:
    """The inverse of `_describe`, of this format or of an earlier one."""
    with contextlib.suppress(json.JSONDecodeError, TypeError):
        return with_later_fields(ModelConfig, json.loads(text), 1)
    return None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DamageError(f"{str(path)!r} is missing") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DamageError(f"{str(path)!r} is damaged: {error}") from error


def write_config(folder: Path, config: RunConfig) -> None:
    """Write config.json."""
    write_text(folder / CONFIG, json.dumps(config.to_json(), indent=2) + "\n")


def read_config(folder: Path) -> RunConfig:
    """Read config.json.

    Raises:
        ValueError: the folder holds no run, or the file is damaged or of a newer format.
    """
    if folder.is_file():
        raise ValueError(f"{str(folder)!r} is a file, not the folder of a run")
    if not folder.is_dir():
        raise ValueError(f"no folder {str(folder)!r}")
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{str(folder)!r} holds no run: it has no {CONFIG}")
    return RunConfig.from_json(_read_json(folder / CONFIG), repr(str(folder / CONFIG)))


def new_model(config: ModelConfig, source: Path | None = None) -> Transformer:
    """A model with fresh weights, on the CPU.

    Args:
        config: its arguments.
        source: the file that they were read from, for the error.

    Raises:
        ValueError: a value without a meaning, or sizes that no memory holds.
    """
    try:
        return Transformer(**config.arguments())
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        # torch says the same in all of these, depending on how far beyond the memory a size is.
        detail = "" if isinstance(error, TypeError) else f": {str(error).splitlines()[0]}"
        problem = f"a model of these sizes does not fit into memory{detail}"
        raise ValueError(problem if source is None else f"{str(source)!r}: {problem}") from error
    except ValueError as error:
        if source is None:
            raise
        raise ValueError(f"{str(source)!r}: {error}") from error


def load_weights(model: Transformer, tensors: dict[str, Tensor], where: Path) -> None:
    """Copy tensors into a model, all of them and no others.

    Raises:
        ValueError: names or shapes are not the model's.
    """
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    wrong = [
        f"{name} is {tuple(tensors[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    problems = [f"missing {name}" for name in missing] + [f"unknown {name}" for name in unknown] + wrong
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ValueError(f"{str(where)!r} does not fit {CONFIG}: {problems[0]}{more}")
    model.load_state_dict(tensors)


def load_model(folder: str | os.PathLike[str]) -> Transformer:
    """The model of a run, in evaluation mode, on the CPU.

    Args:
        folder: holds config.json and model.safetensors, as `gateloop train` writes them.

    Raises:
        ValueError: the folder holds no run, has no weights yet, or a file is damaged or does not fit.
    """
    path = Path(folder)
    config = read_config(path)
    model = new_model(config.model, path / CONFIG)
    if not (path / MODEL).is_file():
        raise ValueError(f"{str(path)!r} has no {MODEL} yet: its run stopped before the first checkpoint")
    load_weights(model, _read_tensors(path / MODEL, config), path / MODEL)
    return model.eval()


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ValueError: the device is not to be had.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not to be had: {str(error).splitlines()[0]}") from error
    return device


def _optimizer_tensors(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}|{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _load_optimizer(
    model: Transformer, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], where: Path
) -> None:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    kinds = ("exp_avg", "exp_avg_sq", "step")
    expected = {f"{name}|{kind}": parameters[name].shape for name in parameters for kind in kinds}
    expected.update({f"{name}|step": torch.Size([]) for name in parameters})
    if {key: value.shape for key, value in tensors.items()} != expected:
        raise DamageError(
            f"{str(where)!r} is damaged or does not fit {CONFIG}: it is not the optimizer state of its model"
        )
    for name, parameter in parameters.items():
        for kind in kinds:
            optimizer.state[parameter][kind] = tensors[f"{name}|{kind}"].to(parameter.device)


def _steps(folder: Path) -> list[Path]:
    return sorted((folder / CHECKPOINTS).glob("step-*[0-9]"))


def newest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint."""
    steps = _steps(folder)
    return int(steps[-1].name.removeprefix("step-")) if steps else None


def publish(folder: Path, model: Transformer, config: RunConfig) -> None:
    """Write the run's model.safetensors."""
    _write_tensors(folder / MODEL, model.state_dict(), {"model": _describe(config)})


def save_checkpoint(
    folder: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    config: RunConfig,
    carried: list[TransformerState | None],
) -> None:
    """Write checkpoints/step-N and the run's model.safetensors; forget all but the last few checkpoints.

    A checkpoint appears under its name only when all of it is on disk.
    """
    target = folder / CHECKPOINTS / f"step-{progress.step:09d}"
    aside = target.with_name(target.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    _write_tensors(aside / MODEL, model.state_dict(), {"model": _describe(config)})
    _write_tensors(aside / "optimizer.safetensors", _optimizer_tensors(model, optimizer))
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    _write_tensors(aside / "random.safetensors", random)
    for n, state in enumerate(carried):
        if state is not None:
            save_state(state, aside / f"carried-{n}.safetensors")
    write_text(aside / "progress.json", json.dumps(vars(progress)))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)
    _sync(target.parent)
    publish(folder, model, config)
    for old in _steps(folder)[: -config.training.keep]:
        shutil.rmtree(old)


def _load_carried(path: Path, model: Transformer) -> TransformerState:
    try:
        state = load_state(path)
    except FileNotFoundError as error:
        raise DamageError(f"{str(path)!r} is missing") from error
    except ValueError as error:
        raise DamageError(str(error)) from error
    if not isinstance(state, TransformerState):
        raise DamageError(f"{str(path)!r} is damaged: it holds no state of a model")
    return state.to(next(model.parameters()).device)


def load_checkpoint(
    folder: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    carried: list[TransformerState | None],
) -> Progress | None:
    """Restore model, optimizer, random state and carried states from the newest checkpoint; None where there is none.

    Raises:
        ValueError: the checkpoint is damaged or of another configuration.
    """
    steps = _steps(folder)
    if not steps:
        return None
    try:
        return _load_checkpoint(steps[-1], model, optimizer, config, carried)
    except DamageError as error:
        hint = "it is the only checkpoint: start again with --overwrite"
        if len(steps) > 1:
            hint = f"delete {str(steps[-1])!r} to go back to {steps[-2].name}"
        raise ValueError(f"{error}; {hint}") from error


def _load_checkpoint(
    newest: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    carried: list[TransformerState | None],
) -> Progress:
    values = _read_json(newest / "progress.json")
    if not isinstance(values, dict) or [type(values.get(key)) for key in ("step", "seconds")] != [int, float]:
        raise DamageError(f"{str(newest / 'progress.json')!r} is damaged: it holds no step and seconds")
    progress = Progress(values["step"], values["seconds"])
    load_weights(model, _read_tensors(newest / MODEL, config), newest / MODEL)
    where = newest / "optimizer.safetensors"
    _load_optimizer(model, optimizer, _read_tensors(where), where)
    random = _read_tensors(newest / "random.safetensors")
    if "cpu" not in random:
        raise DamageError(f"{str(newest / 'random.safetensors')!r} is damaged: it holds no random state")
    if config.training.carry_state:
        carried[:] = [_load_carried(newest / f"carried-{n}.safetensors", model) for n in range(len(carried))]
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    return progress
