"""Bytes from files, folders, globs and compressed files; their split; deterministic batches."""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import lzma
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes = npt.NDArray[np.uint8]

# Folders of the standard library that hold no ordinary sources.
_NOT_SOURCES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
_LOOK_FOR_ZEROS = 8192


@dataclass(frozen=True)
class Document:
    """One file: its name relative to the source, and its bytes."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Corpus:
    """Training and validation bytes, how they were split, and the hash of both."""

    train: Bytes
    valid: Bytes
    description: str
    sha256: str


def count(number: int, things: str) -> str:
    """A number of things, whose plural ends in s: "1 file", "2,000 files"."""
    return f"{number:,} {things}{'' if number == 1 else 's'}"


def _is_binary(content: bytes) -> bool:
    return b"\0" in content[:_LOOK_FOR_ZEROS]


def read_file(path: Path) -> bytes:
    """The bytes of a file, decompressed if it ends in .gz or .xz.

    Raises:
        ValueError: it cannot be read or decompressed.
    """
    with open_file(path) as file:
        return file.read()


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """A file to read bytes from, decompressed as they are read if it ends in .gz or .xz.

    Raises:
        ValueError: it cannot be read or decompressed, now or in the block.
    """
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    try:
        with openers.get(path.suffix, open)(path, "rb") as file:
            yield file
    except (gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot decompress {str(path)!r}: {error}") from error
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror or error}") from error


def _walk(folder: Path, exclude: Path | None = None) -> list[Path]:
    """All regular files below a folder in a fixed order; hidden ones, and those below `exclude`, left out."""
    found = []
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and (exclude is None or (Path(base) / name).resolve() != exclude)
        )
        found += [Path(base) / name for name in sorted(names) if not name.startswith(".")]
    return [path for path in found if path.is_file()]


def standard_library() -> list[Document]:
    """The Python standard library's own sources on this machine, tests left out.

    Raises:
        ValueError: there are none.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in _walk(root)
        if path.suffix == ".py" and not _NOT_SOURCES.intersection(path.relative_to(root).parts)
    ]
    if not files:
        raise ValueError(f"no Python sources below {str(root)!r}: name a text file or a folder as DATA")
    return [Document(str(path.relative_to(root)), read_file(path)) for path in files]


def read_documents(source: str | None, exclude: Path | None = None, binary: bool = False) -> tuple[list[Document], int]:
    """All documents of a source, and how many binary or empty files were left out.

    Args:
        source: a file, a folder (read recursively), a glob pattern, any of them with .gz or .xz files in it; or None
            for the standard library's sources.
        exclude: a folder below the source that is not part of it.
        binary: keep files with zero bytes in them too.

    Raises:
        ValueError: nothing is there, a file cannot be read, or nothing in it is text.
    """
    if source is None:
        return standard_library(), 0
    if not source:
        raise ValueError("DATA must not be empty: name a file, a folder or a glob")
    path = Path(source)
    if path.is_dir():
        files, root = _walk(path, None if exclude is None else exclude.resolve()), path
    elif path.exists() and not path.is_file():
        raise ValueError(f"{source!r} is neither a regular file nor a folder")
    elif path.exists():
        files, root = [path], path.parent
    else:
        files = [Path(name) for name in sorted(glob.glob(source, recursive=True)) if os.path.isfile(name)]
        root = Path(os.path.commonpath([file.parent for file in files])) if files else path
    if not files and path.is_dir():
        raise ValueError(f"the folder {source!r} holds no files (hidden ones do not count)")
    if not files:
        raise ValueError(f"no file, folder or glob match at {source!r}")
    documents = [Document(str(file.relative_to(root)), read_file(file)) for file in files]
    texts = [document for document in documents if document.content and (binary or not _is_binary(document.content))]
    if not texts:
        kind = "is empty" if not any(document.content for document in documents) else "holds no text, only binary data"
        raise ValueError(f"{source!r} {kind}")
    return texts, len(documents) - len(texts)


def _join(documents: list[Document]) -> Bytes:
    return np.frombuffer(b"".join(document.content for document in documents), dtype=np.uint8)


def _split(documents: list[Document], valid_fraction: float) -> tuple[Bytes, Bytes, str]:
    """Whole documents are held out, in the order of a hash of their names, as many as make up the share.

    Documents much larger than the share are passed over; where those left do not make up half of it (a single file, a
    few books), the end of all bytes is held out instead.
    """
    total = sum(len(document.content) for document in documents)
    share = total * valid_fraction
    ordered = sorted(documents, key=lambda document: hashlib.sha256(os.fsencode(document.name)).digest())
    held: set[str] = set()
    size = 0
    for document in ordered:
        if size < share and size + len(document.content) <= 2 * share:
            held.add(document.name)
            size += len(document.content)
    if size < share / 2:
        everything = _join(documents)
        cut = round(total - share)
        return everything[:cut], everything[cut:], f"{count(len(documents), 'file')}, the end held out"
    train = [document for document in documents if document.name not in held]
    valid = [document for document in documents if document.name in held]
    return _join(train), _join(valid), f"{count(len(documents), 'file')}, {len(held)} held out"


def load_corpus(source: str | None, valid_fraction: float, context: int, exclude: Path | None = None) -> Corpus:
    """Read a source and split it into training and validation bytes.

    Args:
        source: as in `read_documents`.
        valid_fraction: share of the bytes held out: whole files chosen by a hash of their names, or the end where
            the files are too few or too large for that.
        context: bytes in a training window; the training part must hold one window and a byte.
        exclude: a folder below the source that is not part of it: that of the run.

    Raises:
        ValueError: unreadable, empty or too short data.
    """
    documents, skipped = read_documents(source, exclude)
    train, valid, description = _split(documents, valid_fraction)
    name = "the Python standard library" if source is None else repr(source)
    if len(train) < context + 1 or len(valid) < 2:
        raise ValueError(
            f"{name} is too short: {len(train)} training and {len(valid)} validation bytes; a context of {context} "
            f"needs at least {context + 1} and 2 (a smaller --context, or more data)"
        )
    description = f"{name}: {description}, {len(train):,} training and {len(valid):,} validation bytes"
    if skipped:
        description += f" ({count(skipped, 'binary or empty file')} left out)"
    digest = hashlib.sha256(train.tobytes())
    digest.update(b"|" + valid.tobytes())
    return Corpus(train, valid, description, digest.hexdigest())


def stream_at(
    train: Bytes, step: int, micro_batch: int, batch: int, accumulate: int, context: int, seed: int
) -> tuple[Tensor, Tensor | None]:
    """Windows (batch, context + 1) that go on where those of the step before ended, by one byte's overlap.

    Every row of every micro-batch is a stream of its own: it begins somewhere, all evenly spread, and comes back to
    the data's start after its end. Depends on nothing but the arguments.

    Returns:
        The windows, and resets (batch, context + 1), True where a row is at the data's start; None where none is.
    """
    count = (len(train) - 1) // context
    shift = int(np.random.default_rng([seed, 0]).integers(0, len(train) - count * context))
    rows = micro_batch * batch + np.arange(batch)
    numbers = (rows * count // (batch * accumulate) + step - 1) % count
    windows = np.stack([train[start : start + context + 1] for start in shift + numbers * context])
    resets = np.zeros(windows.shape, dtype=bool)
    resets[:, 0] = numbers == 0
    return torch.from_numpy(windows.astype(np.int64)), torch.from_numpy(resets) if resets.any() else None


def batch_at(train: Bytes, step: int, micro_batch: int, batch: int, context: int, seed: int) -> Tensor:
    """Random windows (batch, context + 1) that depend on nothing but the arguments.

    Any step's batch can be drawn again without those before it: that is all the state a resumed run needs.
    """
    random = np.random.default_rng([seed, step, micro_batch])
    starts = random.integers(0, len(train) - context, size=batch)
    windows = np.stack([train[start : start + context + 1] for start in starts])
    return torch.from_numpy(windows.astype(np.int64))
