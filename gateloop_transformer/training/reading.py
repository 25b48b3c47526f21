"""Reading a text of any length into a state, in bounded memory, and keeping that state in a file."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from gateloop_transformer.generation import evaluating
from gateloop_transformer.layers.state import TransformerState, describe_state, load_state, save_state
from gateloop_transformer.model import Transformer
from gateloop_transformer.training.checkpoint import MODEL
from gateloop_transformer.training.data import open_file

# Bytes for which activations exist at a time.
_BLOCK = 2048


class Reading(NamedTuple):
    """How far a text was read.

    state: of the model after all bytes but the last; None where there is but one. last: that byte, from which whoever
    continues begins. position: how many bytes there were, `last` included.
    """

    state: TransformerState | None
    last: int
    position: int


@contextlib.contextmanager
def open_text(name: str) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed if it ends in .gz or .xz; "-" is standard input.

    Raises:
        ValueError: it cannot be read or decompressed.
    """
    path = Path(name)
    if name == "-":
        yield sys.stdin.buffer
        return
    if path.is_dir():
        raise ValueError(f"{name!r} is a folder; read one file at a time")
    with open_file(path) as file:
        yield file


@torch.no_grad()
def read(
    model: Transformer, text: BinaryIO, start: Reading | None = None, report: Callable[[int], object] | None = None
) -> Reading:
    """Read a text to its end.

    Args:
        model: is put in evaluation mode meanwhile.
        text: the bytes, taken in blocks.
        start: what was read before.
        report: called after each block with the number of bytes in it.

    Raises:
        ValueError: there are no bytes, here or before.
    """
    device = next(model.parameters()).device
    state, position = (None, 0) if start is None else (start.state, start.position)
    held = b"" if start is None else bytes([start.last])
    with evaluating(model):
        while block := text.read(_BLOCK):
            fed, held = (held + block)[:-1], block[-1:]
            if fed:
                _, state = model(torch.tensor([list(fed)], device=device), state=state, return_state=True)
            position += len(block)
            if report is not None:
                report(len(block))
    if not held:
        raise ValueError("the text is empty: there is nothing to read")
    return Reading(state, held[0], position)


def model_digest(folder: Path, dtype: str) -> str:
    """What tells the model of a run from others: SHA-256 of its weights' file, and the type they are used in."""
    digest = hashlib.sha256()
    with (folder / MODEL).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"{digest.hexdigest()} {dtype}"


def save_reading(reading: Reading, path: Path, digest: str) -> None:
    """Write a state file that says how far it has read, with which model.

    Raises:
        OSError: it cannot be written.
    """
    state = TransformerState(()) if reading.state is None else reading.state
    about = {"model": digest, "position": str(reading.position), "last": str(reading.last)}
    save_state(state, path, about)


def load_reading(path: Path, digest: str) -> Reading:
    """Read a state file.

    Raises:
        ValueError: there is none, it is damaged, or it was written with another model.
    """
    try:
        about, state = describe_state(path), load_state(path)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    if not isinstance(state, TransformerState) or not {"model", "position", "last"} <= about.keys():
        raise ValueError(f"{str(path)!r} was not written by 'gateloop read': it holds the state of something else")
    was, dtype = about["model"].split()
    now, wanted = digest.split()
    if was != now:
        raise ValueError(f"{str(path)!r} is the state of another model (or of this one before further training)")
    if dtype != wanted:
        raise ValueError(f"{str(path)!r} was read with --dtype {dtype}, not {wanted}")
    return Reading(state if state.layers else None, int(about["last"]), int(about["position"]))
