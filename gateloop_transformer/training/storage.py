"""Files that appear whole or not at all, and are read with one clear error. No pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from gateloop_transformer.data.writing import sync, write_bytes

if TYPE_CHECKING:
    from torch import Tensor


class DamageError(ValueError):
    """A file of a run is missing or cannot be read."""


def remove(path: Path) -> None:
    """Delete a file or a folder with all that is in it; it need not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text`, whole or not at all."""
    write_bytes(path, text.encode())


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Replace a safetensors file, whole or not at all.

    Raises:
        OSError: it cannot be written; what was there still is.
    """
    from safetensors.torch import save_file

    aside = path.with_name(path.name + ".partial")
    aside.unlink(missing_ok=True)
    aside.touch()
    mode = aside.stat().st_mode
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, aside, metadata)
    except SafetensorError as error:
        aside.unlink(missing_ok=True)
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(f"cannot write {str(path)!r}: {error}") from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    _sort_metadata(aside)
    # safetensors makes files that only their owner may read; this one is to be as readable as the others.
    aside.chmod(mode)
    sync(aside)
    os.replace(aside, path)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order: safetensors writes it in another each time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if len(metadata := header.get("__metadata__", {})) < 2:
            return
        header["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size
        file.seek(8)
        file.write(text)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata.

    Raises:
        DamageError: there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise DamageError(f"{str(path)!r} is missing")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DamageError(f"{str(path)!r} is damaged: {error}") from error


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        DamageError: there is no such file, or it cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DamageError(f"{str(path)!r} is missing") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DamageError(f"{str(path)!r} is damaged: {error}") from error


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
