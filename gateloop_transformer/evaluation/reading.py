"""Reading a text of any length into a state, in bounded memory, and keeping that state in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from gateloop_transformer.data.files import blocks, open_file, open_standard_input
from gateloop_transformer.data.tokenizer import ByteTokenizer, Tokenizer, encode_blocks
from gateloop_transformer.evaluation.bits import in_blocks
from gateloop_transformer.files import digest
from gateloop_transformer.generation import evaluating
from gateloop_transformer.layers.state import TransformerState, describe_state, load_state, save_state
from gateloop_transformer.model import Transformer
from gateloop_transformer.runs.weights import weight_files
from gateloop_transformer.stored import DamageError
from gateloop_transformer.waiting import waiting

# Tokens for which activations exist at a time.
_BLOCK = 2048


class Reading(NamedTuple):
    """How far a text was read.

    state: of the model after all tokens but the last; None where there is but one. last: that token, from which
    whoever continues begins. position: how many bytes there were, those of `last` included.
    """

    state: TransformerState | None
    last: int
    position: int


def text_blocks(name: str) -> Iterator[bytes]:
    """A file's bytes in blocks, decompressed if it ends in .gz, .xz or .zst; "-" is standard input.

    Raises:
        ValueError: it cannot be read or decompressed.
    """
    path = Path(name)
    if name == "-":
        return blocks(open_standard_input())
    if path.is_dir():
        raise ValueError(f"{name!r} is a folder; read one file at a time")
    return blocks(open_file(path))


@torch.no_grad()
def read(
    model: Transformer,
    text: Iterable[bytes],
    start: Reading | None = None,
    report: Callable[[int], object] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Reading:
    """Read a text to its end.

    Args:
        model: is put in evaluation mode meanwhile.
        text: the bytes, in blocks.
        start: what was read before.
        report: called after each block of tokens with the number of bytes in it.
        tokenizer: of the model; None: its tokens are bytes.

    Raises:
        ValueError: there are no bytes, here or before.
    """
    tokenizer = tokenizer or ByteTokenizer()
    device = next(model.parameters()).device
    state, position = (None, 0) if start is None else (start.state, start.position)
    held = np.array([] if start is None else [start.last], dtype=np.int64)
    with evaluating(model):
        for block in in_blocks(encode_blocks(tokenizer, text), _BLOCK):
            ids = np.concatenate([held, block])
            fed, held = ids[:-1], ids[-1:]
            if len(fed):
                _, state = model(torch.from_numpy(fed)[None].to(device), state=state, return_state=True)
            size = int(tokenizer.lengths[block].sum())
            position += size
            if report is not None:
                report(size)
    if not len(held):
        raise ValueError("the text is empty: there is nothing to read")
    return Reading(state, int(held[0]), position)


def model_digest(weights: Path, dtype: str) -> str:
    """What tells a model from others: SHA-256 of its weights' file, or of those of all, and the type they are used in.

    Raises:
        ValueError: what is given for an index is none.
    """
    with waiting("computing the checksum of the weights"):
        found = [digest(file) for file in weight_files(weights)]
    whole = found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()
    return f"{whole} {dtype}"


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
    try:
        (was, dtype), last, position = about["model"].split(), int(about["last"]), int(about["position"])
    except ValueError as error:
        raise DamageError(f"{str(path)!r} is damaged: it does not say how far it has read ({error})") from error
    now, wanted = digest.split()
    if was != now:
        raise ValueError(f"{str(path)!r} is the state of another model (or of this one before further training)")
    if dtype != wanted:
        raise ValueError(f"{str(path)!r} was read with --dtype {dtype}, not {wanted}")
    return Reading(state if state.layers else None, last, position)
