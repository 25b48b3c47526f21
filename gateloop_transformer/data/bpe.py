"""Lossless byte-level BPE in the file format of Hugging Face."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gateloop_transformer.data.tokenizer import TOKENIZER, Ids, printed_bytes, write_config
from gateloop_transformer.files import write_bytes
from gateloop_transformer.stored import parse_json

END = "<|endoftext|>"
# Texts are encoded in pieces of at least the first number of bytes, where tokens allow, and at most the second.
PIECE, LONGEST_PIECE = 1 << 14, 1 << 20
# Finds a line break that no token can cross, as there is no white space or slash next to it. Next to some characters
# beyond ASCII such a break is missed, but none is found wrongly.
_CUT = re.compile(rb"(?<=[!-~\x8b-\x9e\xb0-\xbf])\n(?=[!-.0-~\xc3-\xdf\xe4-\xf4])")
# Pre-tokenizers that cut texts but remove nothing.
_LOSSLESS = {"ByteLevel", "Split", "Digits", "Punctuation", "UnicodeScripts"}
# Up to this vocabulary size, most token numbers may be unused.
_SPARSE = 1 << 22
# The characters that stand for invalid bytes in a text decoded with "surrogateescape".
_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")


class BPETokenizer:
    """Byte-level BPE with a token <|endoftext|>; bytes that are not UTF-8 are tokens of their own.

    Args:
        content: the bytes of a tokenizer.json.
        where: where they came from, for errors.

    Raises:
        ValueError: it is another kind of tokenizer, or it is not lossless; or tokenizers is not installed.
    """

    kind = "bpe"

    def __init__(self, content: bytes, where: str) -> None:
        try:
            self._tokenizer = _tokenizers().Tokenizer.from_buffer(content)
        except ValueError as error:
            raise ValueError(f"{where} is not a tokenizer.json: {error}") from error
        values = parse_json(content, where)
        reason = _unsuitable(values)
        if reason is not None:
            raise ValueError(f"{where} cannot be used: {reason}")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # "<|endoftext|>" within a text is text.
        self._tokenizer.encode_special_tokens = True
        self._content = content
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.pieces = _pieces(values, where)
        self.size = len(self.pieces)
        self.end: int = next(token["id"] for token in values["added_tokens"] if token["content"] == END)
        self.dtype = np.dtype("<u2" if self.size <= 1 << 16 else "<u4")
        self._of_byte = {piece[0]: n for n, piece in enumerate(self.pieces) if len(piece) == 1}
        missing = set(range(256)) - self._of_byte.keys()
        if missing:
            raise ValueError(f"{where} cannot be used: no token stands for the byte {min(missing)}")

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.array([len(piece) for piece in self.pieces], dtype=np.int64)

    def cut(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        return cut_text(blocks)

    def encode_many(self, pieces: Sequence[bytes]) -> list[Ids]:
        parts = [_stretches(piece) for piece in pieces]
        texts = [text for part in parts for text in part[::2]]
        encoded = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        return [self._join(part, encoded) for part in parts]

    def _join(self, part: list[str], encoded: Iterator[Any]) -> Ids:
        """Join the tokens of stretches of text with those of the invalid bytes between them."""
        ids = [np.array(next(encoded).ids, dtype=self.dtype)]
        for stray in part[1::2]:
            content = stray.encode("utf-8", "surrogateescape")
            ids.append(np.array([self._of_byte[byte] for byte in content], dtype=self.dtype))
            ids.append(np.array(next(encoded).ids, dtype=self.dtype))
        return np.concatenate(ids) if len(ids) > 1 else ids[0]

    def encode(self, content: bytes) -> Ids:
        ids = self.encode_many(list(self.cut([content])))
        return np.concatenate([np.empty(0, self.dtype), *ids])

    def decode(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.pieces[int(n)] for n in ids)

    def save(self, folder: Path) -> None:
        self.save_as(folder / TOKENIZER)
        write_config(folder, pad=END, end=END)

    def save_as(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_bytes(path, self._content)


def load_tokenizer_file(path: str | os.PathLike[str]) -> BPETokenizer:
    """Load a byte-level BPE tokenizer from a tokenizer.json.

    Raises:
        ValueError: there is none, or it cannot be used; the message says why.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the tokenizer {str(path)!r}: {error.strerror or error}") from error
    return BPETokenizer(content, repr(str(path)))


def train_tokenizer(texts: Iterable[Iterable[bytes]], size: int) -> BPETokenizer:
    """Learn a byte-level BPE tokenizer of at most `size` tokens from documents given as blocks of bytes.

    The same documents give the same tokenizer. It is smaller where they have too few pairs of tokens to merge.

    Raises:
        ValueError: size is below 257 (the bytes and <|endoftext|>) or beyond 2**32; tokenizers is not installed.
    """
    if not 257 <= size <= 1 << 32:
        raise ValueError(f"a vocabulary has at least 257 tokens (the bytes and {END}) and at most 2**32, not {size}")
    tokenizers = _tokenizers()
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    cut = itertools.chain.from_iterable(map(cut_text, texts))
    tokenizer.train_from_iterator((text for piece in cut for text in _stretches(piece)[::2]), trainer)
    return BPETokenizer(tokenizer.to_str(pretty=True).encode(), "the trained tokenizer")


def cut_text(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Cut a text into pieces that encode alone as they would within it, however the blocks were cut.

    Pieces end after a line break, the first suitable one after `PIECE` bytes. A stretch of `LONGEST_PIECE` bytes
    without one is cut there, between characters, and a token that would have crossed the cut becomes two.
    """
    held = b""
    for block in blocks:
        held += block
        while (end := _place_to_cut(held)) is not None:
            yield held[:end]
            held = held[end:]
    if held:
        yield held


def _place_to_cut(held: bytes) -> int | None:
    """The end of the first piece of a text; None: more of the text is needed to know."""
    found = _CUT.search(held, PIECE, LONGEST_PIECE)
    if found is not None:
        return found.end()
    if len(held) <= LONGEST_PIECE:
        return None
    end = LONGEST_PIECE
    while end > LONGEST_PIECE - 3 and held[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _stretches(content: bytes) -> list[str]:
    """Split into text, bytes that are not UTF-8, text, and so on; such bytes become lone surrogates."""
    try:
        return [content.decode("utf-8")]
    except UnicodeDecodeError:
        return _NOT_UTF8.split(content.decode("utf-8", "surrogateescape"))


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            "BPE tokenizers need the package tokenizers: `pip install gateloop-transformer[train]`"
        ) from error
    return tokenizers


def _unsuitable(values: Any) -> str | None:
    """The reason why a tokenizer.json is not lossless byte-level BPE; None: it is."""
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        return "it is not a tokenizer.json"
    model, steps = values["model"], _parts(values.get("pre_tokenizer"), "pretokenizers")
    if model.get("type") != "BPE":
        return f"its model is {model.get('type')}, not BPE"
    if "ByteLevel" not in [step.get("type") for step in steps]:
        return "it is not byte-level (its pre-tokenizer has no ByteLevel)"
    added = values.get("added_tokens") or []
    rules = (
        (values.get("normalizer") is None, "its normalizer changes texts"),
        (not any(step.get("add_prefix_space") for step in steps), "it puts a space before texts"),
        (
            all(step.get("type") in _LOSSLESS and step.get("behavior") != "Removed" for step in steps),
            "its pre-tokenizer removes parts of texts",
        ),
        (not model.get("dropout"), "its dropout draws tokens at random"),
        (
            not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")),
            "its tokens have prefixes or suffixes that are not part of the text",
        ),
        (
            not any(token.get("lstrip") or token.get("rstrip") for token in added if not token["special"]),
            "its added tokens remove white space",
        ),
        (any(token["content"] == END and token["special"] for token in added), f"it has no special token {END}"),
    )
    return next((reason for fine, reason in rules if not fine), None)


def _parts(step: Any, name: str) -> list[dict[str, Any]]:
    """Flatten a step that may be a sequence of steps."""
    if not isinstance(step, dict):
        return []
    return [part for inner in step[name] for part in _parts(inner, name)] if name in step else [step]


def _pieces(values: dict[str, Any], where: str) -> list[bytes]:
    """The bytes of each token of a tokenizer.json.

    Raises:
        ValueError: there are too many unused numbers below the highest token's.
    """
    printed = {name: byte for byte, name in enumerate(printed_bytes())}
    vocabulary: dict[str, int] = values["model"]["vocab"]
    added = values.get("added_tokens") or []
    size = 1 + max([*vocabulary.values(), *(token["id"] for token in added)])
    if size > max(_SPARSE, 2 * (len(vocabulary) + len(added))):
        raise ValueError(f"{where} cannot be used: it has {len(vocabulary):,} tokens, numbered up to {size - 1:,}")
    pieces = [b""] * size
    for token, n in vocabulary.items():
        # A token with other characters never comes from a text.
        pieces[n] = bytes(printed[c] for c in token) if all(c in printed for c in token) else b""
    for token in added:
        pieces[token["id"]] = b"" if token["special"] else token["content"].encode()
    return pieces
