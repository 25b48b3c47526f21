"""Text as tokens: the protocol of tokenizers, and the tokenizer of bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gateloop_transformer.files import write_bytes

Ids = npt.NDArray[Any]
# The files of a tokenizer in a folder, in the formats of Hugging Face.
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


class Tokenizer(Protocol):
    """Turns text into tokens and back.

    Attributes:
        kind: "bytes" or "bpe".
        size: size of the vocabulary.
        pieces: the bytes that each token stands for; special tokens stand for none.
        end: the token after each document; None: there is none.
        sha256: a hash that identifies the tokenizer.
        dtype: the smallest little-endian integer type that holds all tokens.
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
        """Cut a text into pieces that can be encoded alone, however the blocks were cut."""

    def encode_many(self, pieces: Sequence[bytes]) -> list[Ids]:
        """Encode each piece to its tokens."""

    def encode(self, content: bytes) -> Ids:
        """Encode a text, without a token for the document's end."""

    def decode(self, ids: Iterable[int]) -> bytes:
        """Join the bytes that tokens stand for."""

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into a folder, each whole or not at all."""


class ByteTokenizer:
    """The tokenizer for which each byte is a token."""

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
        """Write the files that transformers needs; this class itself needs none."""
        write_bytes(folder / TOKENIZER, json.dumps(_bytes_as_bpe(), ensure_ascii=False, indent=1).encode())
        # No text has the byte 0, and many programs expect padding and end tokens.
        write_config(folder, pad=printed_bytes()[0], end=printed_bytes()[0])


def encode_blocks(tokenizer: Tokenizer, blocks: Iterable[bytes]) -> Iterator[Ids]:
    """Yield the tokens of a text given in blocks, in parts."""
    for piece in tokenizer.cut(blocks):
        yield tokenizer.encode_many([piece])[0]


def encode_document(tokenizer: Tokenizer, blocks: Iterable[bytes]) -> Iterator[Ids]:
    """Yield the tokens of a document given in blocks, in parts, and the token after it."""
    yield from encode_blocks(tokenizer, blocks)
    if tokenizer.end is not None:
        yield np.array([tokenizer.end], dtype=tokenizer.dtype)


def printed_bytes() -> list[str]:
    """The character that byte-level BPE writes for each byte: the byte itself if it prints, else one from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def holds_bytes(values: Any) -> bool:
    """Tell whether a tokenizer.json is that of bytes."""
    model = values.get("model") if isinstance(values, dict) else None
    return (
        isinstance(model, dict) and not model.get("merges") and model.get("vocab") == _bytes_as_bpe()["model"]["vocab"]
    )


def _bytes_as_bpe() -> dict[str, Any]:
    """A tokenizer.json of byte-level BPE without merges: its tokens are the bytes, numbered by their values."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {name: byte for byte, name in enumerate(printed_bytes())}, "merges": []},
    }


def write_config(folder: Path, *, pad: str, end: str) -> None:
    """Write what transformers needs to know of a tokenizer besides its tokenizer.json.

    Special tokens spelled out in a text are read as text. Padding is put on the left, where generation needs it.

    Args:
        folder: the folder to write to.
        pad: the token that stands for padding; as padding is masked, it may also be a token of texts.
        end: the token after each document.
    """
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "padding_side": "left",
        "pad_token": pad,
        "eos_token": end,
    }
    write_bytes(folder / TOKENIZER_CONFIG, json.dumps(values, ensure_ascii=False, indent=1).encode())
