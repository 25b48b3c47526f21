"""Sources and the documents they give, each a stream of blocks of bytes."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCES = (
    "a text file, a folder (read recursively), a glob in quotes; .gz, .xz and .zst, .jsonl and .parquet files; "
    "hf:NAME[,CONFIG][:SPLIT], a dataset of Hugging Face or a folder of one; - for standard input (text, or JSON "
    "lines where --field is given)"
)


def count(number: int, things: str) -> str:
    """Write a number of things whose plural ends in s: "1 file", "2,000 files"."""
    return f"{number:,} {things}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class Document:
    """One text.

    name: tells the document from the others of its source; it does not depend on where the source is. blocks: its
    bytes, to be read once, before the next document; no block is empty.
    """

    name: str
    blocks: Iterator[bytes]


class Source(ABC):
    """Documents in a fixed order, read as they are asked for.

    Attributes:
        label: name of the source in messages.
        files: number of files that had text, so far; 0 where documents do not come from files.
        empty: number of files or records without a byte, so far, which are left out.
        binary: number of files with zero bytes at their beginning, so far, which are left out.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.files = self.empty = self.binary = 0

    @property
    def left_out(self) -> int:
        """The number of files or records that were left out so far."""
        return self.empty + self.binary

    @abstractmethod
    def documents(self, binary: bool = False) -> Iterator[Document]:
        """Yield all documents; with `binary` also files with zero bytes in them.

        Raises:
            ValueError: something cannot be read, or there is no text at all.
        """

    @abstractmethod
    def identity(self) -> list[Any]:
        """Plain values that change when the documents may have changed, found without reading them."""

    def size(self) -> int | None:
        """The number of bytes of text, where that is known without reading it."""
        return None

    def _start(self) -> None:
        self.files = self.empty = self.binary = 0

    def _check_some(self, found: bool) -> None:
        if not found:
            what = "holds no text, only binary data" if self.binary else "is empty"
            raise ValueError(f"{self.label} {what}")

    def _texts(self, texts: Iterable[bytes], name: str) -> Iterator[Document]:
        """Yield records as numbered documents."""
        for number, text in enumerate(texts):
            if text:
                yield Document(f"{name}#{number}", iter([text]))
            else:
                self.empty += 1


def stamp(path: Path) -> list[Any]:
    """Values that change when a file does: its path, size and time of change.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        about = path.stat()
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    return [str(os.path.abspath(path)), about.st_size, about.st_mtime_ns]
