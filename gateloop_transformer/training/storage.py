"""Texts and tensors in files that appear whole or not at all, and are read with one clear error. No pickle."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from gateloop_transformer.data.writing import sync, write_bytes
from gateloop_transformer.stored import CHECKSUM, UNSEALED, DamageError, as_text, check_seal, seal

if TYPE_CHECKING:
    from torch import Tensor


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text`, whole or not at all."""
    write_bytes(path, text.encode())


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Replace a safetensors file, whole or not at all; sealed (see `stored`) where it says something of itself.

    Args:
        path: of the file.
        tensors: by name.
        metadata: what the file says of itself.

    Raises:
        OSError: it cannot be written; what was there still is.
    """
    from safetensors.torch import save_file

    aside = path.with_name(path.name + ".partial")
    aside.unlink(missing_ok=True)
    aside.touch()
    mode = aside.stat().st_mode
    try:
        whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(whole, aside, None if metadata is None else {**metadata, **UNSEALED})
    except SafetensorError as error:
        aside.unlink(missing_ok=True)
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(f"cannot write {str(path)!r}: {error}") from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    if metadata is not None:
        with aside.open("r+b") as file:
            seal(file)
    # safetensors makes files that only their owner may read; this one is to be as readable as the others.
    aside.chmod(mode)
    sync(aside)
    os.replace(aside, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata, the checksum left out.

    Raises:
        DamageError: there is no such file, it cannot be read, or it is sealed and has changed since.
    """
    with opened_tensors(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    metadata.pop(CHECKSUM, None)
    with path.open("rb") as content:
        check_seal(content, repr(str(path)))
    return tensors, metadata


@contextlib.contextmanager
def opened_tensors(path: Path, framework: str) -> Iterator[Any]:
    """A safetensors file, of which nothing but the header is read yet, as `safe_open` gives it.

    Raises:
        DamageError: there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise DamageError(f"{str(path)!r} is missing")
    name = str(path)
    try:
        with path.open("rb") as content:
            if as_text(name) != name:
                # safetensors takes no name that is not UTF-8.
                name = f"/dev/fd/{content.fileno()}"
            with safe_open(name, framework) as file:
                yield file
    except (SafetensorError, OSError) as error:
        raise DamageError(f"{str(path)!r} is damaged or no safetensors file: {error}") from error


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
