"""A run's folder: what is in it, who may train there, its configuration and its model. No pickle."""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gateloop_transformer.configuration import TransformerConfig
from gateloop_transformer.data.bpe import load_tokenizer_file
from gateloop_transformer.data.tokenizer import TOKENIZER, TOKENIZER_CONFIG, ByteTokenizer, Tokenizer, holds_bytes
from gateloop_transformer.files import PARTIAL, check_removable, lock, remove, write_text
from gateloop_transformer.model import Transformer
from gateloop_transformer.runs.config import RunConfig, is_flat, read_flat
from gateloop_transformer.runs.weights import (
    CONFIG,
    MODEL,
    check_written_for,
    describe,
    misfit,
    published,
    read_headers,
    weight_files,
)
from gateloop_transformer.stored import DamageError, read_json, read_tensors, write_tensors

METRICS, CURVE, CHECKPOINTS = "metrics.jsonl", "loss.png", "checkpoints"
LOCK = ".lock"
# Of TensorBoard.
EVENTS = "tensorboard"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training in the folder; the system lets go when this one ends, however it does.

    Raises:
        ValueError: another process is training there.
    """
    with contextlib.ExitStack() as stack:
        try:
            trouble = stack.enter_context(lock(folder / LOCK))
        except BlockingIOError as error:
            raise ValueError(f"another process is training in {str(folder)!r}") from error
        if trouble is not None:
            warnings.warn(
                f"{str(folder)!r} cannot be locked: let one process at a time train there ({trouble})", stacklevel=3
            )
        yield


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
    present = [name for name in (CONFIG, MODEL, METRICS, CURVE, TOKENIZER) if (folder / name).exists()]
    # An empty folder, or a link to one, is a place for checkpoints and no run.
    present += [CHECKPOINTS] if any((folder / CHECKPOINTS).glob("*")) else []
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
    for name in (CONFIG, MODEL, METRICS, CURVE, LOCK, TOKENIZER, TOKENIZER_CONFIG):
        if (folder / name).is_dir():
            raise ValueError(f"{str(folder / name)!r} is a folder, not a file: choose another folder for the run")
    for name in (CHECKPOINTS, EVENTS):
        path = folder / name
        if path.is_symlink() and not path.exists():
            raise ValueError(
                f"{str(path)!r} is a link to {os.readlink(path)!r}, and nothing is there: make it a folder"
            )
        if path.exists() and not path.is_dir():
            raise ValueError(f"{str(path)!r} is a file, not a folder: choose another folder for the run")


def clear_run(folder: Path) -> None:
    """Delete a run's files, and nothing else, from a folder.

    The folders that they were in stay: one may be a link to another disk. Of a file that is a link, the link goes.

    Raises:
        ValueError: one cannot be deleted: none was.
    """
    checkpoints = folder / CHECKPOINTS
    old = [*steps(folder), *checkpoints.glob(f"step-*{PARTIAL}"), *checkpoints.glob("damaged-step-*")]
    old += (folder / EVENTS).glob("events.out.tfevents.*")
    # What tells that this is a run goes last: a kill meanwhile leaves something that can be replaced.
    old += [folder / name for name in (MODEL, METRICS, CURVE, TOKENIZER, TOKENIZER_CONFIG, CONFIG)]
    for path in old:
        check_removable(path)
    for path in old:
        remove(path)


def write_config(folder: Path, config: RunConfig) -> None:
    """Write config.json."""
    write_text(folder / CONFIG, json.dumps(config.to_json(), indent=2) + "\n")


def read_config(folder: Path) -> RunConfig:
    """Read the config.json of a run.

    Raises:
        ValueError: the folder holds no run, or the file is damaged or of another format.
    """
    return RunConfig.from_json(_config(folder), repr(str(folder / CONFIG)))


def _config(folder: Path) -> Any:
    if folder.is_file():
        raise ValueError(f"{str(folder)!r} is a file, not the folder of a run")
    if not folder.is_dir():
        raise ValueError(f"no folder {str(folder)!r}")
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{str(folder)!r} holds no run: it has no {CONFIG}")
    return read_json(folder / CONFIG)


def read_model_config(folder: Path) -> tuple[TransformerConfig, int]:
    """The model of a run, or that of a folder that transformers wrote, and the size of its vocabulary.

    Raises:
        ValueError: the folder holds neither, or a file is damaged or of another format.
    """
    values, where = _config(folder), repr(str(folder / CONFIG))
    if is_flat(values):
        return read_flat(values, where)
    run = RunConfig.from_json(values, where)
    return run.model, run.tokenizer.size


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a run, or of a folder that transformers wrote.

    Raises:
        ValueError: the folder holds neither, or its tokenizer.json is missing, damaged or another.
    """
    path = Path(folder)
    values = _config(path)
    if is_flat(values):
        return _tokenizer_of(path, read_flat(values, repr(str(path / CONFIG)))[1])
    config = RunConfig.from_json(values, repr(str(path / CONFIG))).tokenizer
    if config.kind == "bytes":
        return ByteTokenizer()
    tokenizer = load_tokenizer_file(path / TOKENIZER)
    if (tokenizer.sha256, tokenizer.size) != (config.sha256, config.size):
        raise ValueError(f"{str(path / TOKENIZER)!r} does not fit {CONFIG}: it is not the tokenizer of this run")
    return tokenizer


def _tokenizer_of(folder: Path, size: int) -> Tokenizer:
    """The tokenizer in a folder of a model alone: bytes, where there is none and they fit."""
    path = folder / TOKENIZER
    bytes_there = path.exists() and holds_bytes(read_json(path))
    if size == ByteTokenizer.size and (bytes_there or not path.exists()):
        return ByteTokenizer()
    if not path.exists():
        raise ValueError(f"{str(folder)!r} has no {TOKENIZER}: its model's {size} tokens cannot be told from text")
    if bytes_there:
        raise ValueError(
            f"{str(path)!r} is one of bytes, but the model has {size} tokens: tokens beside bytes need BPE"
        )
    tokenizer = load_tokenizer_file(path)
    if tokenizer.size > size:
        raise ValueError(f"{str(path)!r} does not fit {CONFIG}: it has {tokenizer.size} tokens, the model {size}")
    # A vocabulary that was padded: the tokens beyond stand for nothing, but a model may write them.
    tokenizer.pieces.extend([b""] * (size - tokenizer.size))
    return tokenizer


def new_model(config: TransformerConfig, source: Path | None = None, num_tokens: int = 256) -> Transformer:
    """A model with fresh weights, on the CPU.

    Args:
        config: its arguments.
        source: the file that they were read from, for the error.
        num_tokens: size of the vocabulary.

    Raises:
        ValueError: a value without a meaning, or sizes that no memory holds.
    """
    try:
        return Transformer(**config.arguments(num_tokens))
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        # torch says the same in all of these, depending on how far beyond the memory a size is.
        asked = re.search(r"allocate (\d+) bytes", str(error))
        detail = "" if asked is None else f": one of its tensors alone takes {int(asked[1]) / 1e9:,.0f} GB"
        problem = f"a model of these sizes does not fit into memory{detail}"
        raise ValueError(problem if source is None else f"{str(source)!r}: {problem}") from error
    except ValueError as error:
        if source is None:
            raise
        raise ValueError(f"{str(source)!r}: {error}") from error


def published_in(folder: Path) -> Path:
    """`published`, of what is the folder of a model at all.

    Raises:
        ValueError: it is not, or nothing is published.
    """
    _config(folder)
    return published(folder)


def read_weights(path: Path, config: TransformerConfig) -> dict[str, Tensor]:
    """The tensors of a model's file, or of the files that an index names.

    Raises:
        ValueError: it is missing or damaged, or was written for another model.
    """
    found: dict[str, Tensor] = {}
    for part in weight_files(path):
        tensors, metadata = read_tensors(part)
        check_written_for(part, metadata, config)
        found |= tensors
    return found


def publish(folder: Path, weights: dict[str, Tensor], config: RunConfig) -> None:
    """Write the run's model.safetensors.

    Raises:
        OSError: it cannot be written.
    """
    # transformers takes files that say in what framework's layout they are.
    write_tensors(folder / MODEL, weights, {"model": describe(config.model), "format": "pt"})


def steps(folder: Path) -> list[Path]:
    """The checkpoints, the earliest first."""
    found = (folder / CHECKPOINTS).glob("step-*[0-9]")
    # What a user keeps beside them under names of his own is none.
    return sorted(path for path in found if path.name.removeprefix("step-").isdecimal())


def newest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint."""
    found = steps(folder)
    return int(found[-1].name.removeprefix("step-")) if found else None


def check_sizes(config: TransformerConfig, source: Path, size: int, weights: Path) -> None:
    """A model's sizes are those of its weights, by the header of their file: before anything is built of these sizes.

    Args:
        config: the model's arguments.
        source: the file that they were read from, for the error.
        size: of the vocabulary.
        weights: the file, or an index of several.

    Raises:
        ValueError: they are not, or a file is missing or damaged.
    """
    headers = read_headers(weights, config.depth)
    with torch.device("meta"):
        model = new_model(config, source, size)
    check_fit(model, headers, weights)


def check_sizes_in(folder: Path, config: RunConfig) -> None:
    """`check_sizes` of a run that is to go on, by any of its weights whose header can be read; there may be none yet.

    Raises:
        ValueError: the sizes are others.
    """
    for path in (folder / MODEL, *(step / MODEL for step in reversed(steps(folder)))):
        with contextlib.suppress(DamageError):
            check_sizes(config.model, folder / CONFIG, config.tokenizer.size, path)
            return


def check_fit(model: Transformer, tensors: Mapping[str, Any], where: Path) -> None:
    """Tensors have the names and shapes of a model's.

    Raises:
        ValueError: they have not.
    """
    if (problem := misfit(model.state_dict(), tensors)) is not None:
        raise ValueError(f"{str(where)!r} does not fit {CONFIG}: {problem}")


def load_weights(model: Transformer, tensors: dict[str, Tensor], where: Path) -> None:
    """Copy tensors into a model, all of them and no others.

    Raises:
        ValueError: names or shapes are not the model's.
    """
    check_fit(model, tensors, where)
    model.load_state_dict(tensors)


def load_model(folder: str | os.PathLike[str], weights: Path | None = None) -> Transformer:
    """The model of a run, or of a folder that transformers wrote, in evaluation mode, on the CPU.

    Args:
        folder: holds config.json and model.safetensors (or an index of such files), as `gateloop train`, or
            `save_pretrained` of GateLoopForCausalLM, writes them.
        weights: the file to take them from; None: model.safetensors.

    Raises:
        ValueError: the folder holds no model, has no weights yet, or a file is damaged or does not fit.
    """
    path = Path(folder)
    config, size = read_model_config(path)
    weights = published(path) if weights is None else weights
    check_sizes(config, path / CONFIG, size, weights)
    model = new_model(config, path / CONFIG, size)
    tensors = read_weights(weights, config)
    load_weights(model, tensors, weights)
    return model.eval()


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        # What is longer lists everything that torch could be built for.
        why = f": {reason}" if len(reason) <= 100 else ""
        others = [each for each in ("cuda", "xpu", "mps") if getattr(torch, each).is_available()]
        raise ValueError(
            f"device {name!r} cannot be used here{why}; this machine has {', '.join(['cpu', *others])}"
        ) from error
    return device
