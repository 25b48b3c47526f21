"""Text as tokens: what every tokenizer is, and that of bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[Any]


class Tokenizer(Protocol):
    """Text to tokens and back.

    Attributes:
        kind: "bytes" or "bpe".
        size: of the vocabulary.
        pieces: the bytes that each token stands for, none for special ones.
        end: the token after each document; None: there is none.
        sha256: tells it from others.
        dtype: the smallest type of integers that holds all tokens, little-endian.
    """

    @property
    def kind(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def pieces(self) -> list[bytes]: ...
    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """How many bytes each token stands for (vocabulary,)."""

    @property
    def end(self) -> int | None: ...
    @property
    def sha256(self) -> str: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...

    def cut(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """The same text in pieces, each to be encoded alone, however the blocks were cut."""

    def encode_many(self, pieces: Sequence[bytes]) -> list[Ids]:
        """The tokens of each piece."""

    def encode(self, content: bytes) -> Ids:
        """The tokens of a text, without the end of a document."""

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that tokens stand for."""

    def save(self, folder: Path) -> None:
        """Keep it in the folder, where it needs a file."""


class ByteTokenizer:
    """Each byte is a token."""

    kind, size, end = "bytes", 256, None
    pieces = [bytes([value]) for value in range(256)]  # noqa: RUF012
    lengths = np.ones(256, dtype=np.int64)
    sha256 = hashlib.sha256(b"bytes").hexdigest()
    dtype = np.dtype("u1")

    def cut(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        return iter(blocks)

    def encode_many(self, pieces: Sequence[bytes]) -> list[Ids]:
        return [self.encode(piece) for piece in pieces]

    def encode(self, content: bytes) -> Ids:
        return np.frombuffer(content, dtype=np.uint8)

    def decode(self, ids: Iterable[int]) -> bytes:
        return bytes(map(int, ids))

    def save(self, folder: Path) -> None:
        """Nothing to keep."""


def encode_blocks(tokenizer: Tokenizer, blocks: Iterable[bytes]) -> Iterator[Ids]:
    """The tokens of a text given in blocks, in parts."""
    for piece in tokenizer.cut(blocks):
        yield tokenizer.encode_many([piece])[0]


def encode_document(tokenizer: Tokenizer, blocks: Iterable[bytes]) -> Iterator[Ids]:
    """The tokens of a whole document given in blocks, in parts, with the one after it."""
    yield from encode_blocks(tokenizer, blocks)
    if tokenizer.end is not None:
        yield np.array([tokenizer.end], dtype=tokenizer.dtype)
