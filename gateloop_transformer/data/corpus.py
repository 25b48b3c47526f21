"""Corpora: a source is tokenised once into a folder of the cache, split and hashed. See docs/architecture.md."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gateloop_transformer.data.cache import build_once, spool
from gateloop_transformer.data.documents import Source, count
from gateloop_transformer.data.files import BLOCK, packed_suffix
from gateloop_transformer.data.shards import Shard, Tokens, Writer, join_starts, open_tokens
from gateloop_transformer.data.sources import TEXT, FileSource, is_remote, is_standard_input, open_source
from gateloop_transformer.data.tokenizer import Tokenizer
from gateloop_transformer.files import cache_folder
from gateloop_transformer.stored import read_json

FORMAT = 1
_META, _STARTS = "meta.json", "starts.bin"
# The most bytes of text that are encoded at a time.
_TOGETHER = 1 << 21
# The most pieces of text that are encoded at a time.
_PIECES = 1 << 13

Report = Callable[[int], object]


@dataclass(frozen=True)
class Corpus:
    """Training and validation tokens, how they were made and split, and the hash of both."""

    train: Tokens
    valid: Tokens
    tokenizer: Tokenizer
    description: str
    sha256: str


class _Plan(NamedTuple):
    """The settings in which two corpora of one source can differ."""

    tokenizer: Tokenizer
    valid_fraction: float
    field: str | None

    def key(self, identity: list[Any]) -> str:
        values = [FORMAT, identity, self.field, self.tokenizer.sha256, self.valid_fraction]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class _Meta:
    """The content of meta.json, which describes a finished folder.

    shards: name and number of tokens of each file. cut: where validation begins. held: number of documents held out;
    None: the end of all tokens is held out instead. size: bytes of text.
    """

    format: int
    dtype: str
    shards: list[Shard]
    cut: int
    documents: int
    held: int | None
    files: int
    left_out: int
    size: int
    sha256: str
    tokenizer: str
    source: str
    field: str | None
    valid_fraction: float


def load_corpus(
    source: str | None,
    *,
    valid_fraction: float,
    context: int,
    tokenizer: Tokenizer,
    field: str | None = None,
    exclude: Path | None = None,
    sha256: str | None = None,
    report: Report | None = None,
) -> Corpus:
    """Tokenise a source, or find it in the cache, and split it into training and validation tokens.

    Whole documents are held out: those for which a hash of their names falls below `valid_fraction`. Where that gives
    less than half or more than double the share (a single file, a few books), the end of all tokens is held out
    instead.

    Args:
        source: what to read, as in `open_source`.
        valid_fraction: share of the tokens held out.
        context: tokens that a training window predicts; the training part must hold one window and a token.
        tokenizer: turns the text into tokens.
        field: the field of records that holds the text, as in `open_source`.
        exclude: a folder below the source that is not part of it, such as that of the run.
        sha256: the corpus's hash, where it is known: a corpus from standard input or the Hub is then found by it in
            the cache.
        report: called with the number of bytes of each piece as it is tokenised.

    Raises:
        ValueError: the data is unreadable, empty or too short.
        OSError: the cache cannot be written.
    """
    plan = _Plan(tokenizer, valid_fraction, field)
    standard_input = is_standard_input(source)
    known = _find(sha256, plan) if sha256 and (standard_input or is_remote(source)) else None
    label = "standard input" if standard_input else repr(source)
    if known is not None:
        folder = known
    elif standard_input:
        folder = _from_standard_input(plan, sha256, report)
    else:
        opened = open_source(source, field=field, exclude=[cache_folder(), *([exclude] if exclude else [])])
        label = opened.label
        folder = _corpora() / plan.key(opened.identity())
        build_once(folder, lambda aside: _build(aside, opened, plan, report), _is_whole)
    meta = _read_meta(folder)
    assert meta is not None
    corpus = _open(folder, meta, tokenizer, label)
    if len(corpus.train) < context + 1 or len(corpus.valid) < 2:
        raise ValueError(
            f"{label} is too short: {len(corpus.train)} training and {len(corpus.valid)} validation "
            f"{_unit(tokenizer)}; a context of {context} needs at least {context + 1} and 2 (a smaller --context, or "
            "more data)"
        )
    return corpus


def _corpora() -> Path:
    return cache_folder() / "corpora"


def _unit(tokenizer: Tokenizer) -> str:
    return "bytes" if tokenizer.kind == "bytes" else "tokens"


def _open(folder: Path, meta: _Meta, tokenizer: Tokenizer, label: str) -> Corpus:
    train, valid = open_tokens(folder, meta.shards, np.dtype(meta.dtype), folder / _STARTS, meta.cut)
    parts = [count(meta.files, "file")] if meta.files else []
    parts += [count(meta.documents, "document")] if meta.documents != meta.files else []
    parts += ["the end held out" if meta.held is None else f"{meta.held:,} held out"]
    parts += [f"{len(train):,} training and {len(valid):,} validation {_unit(tokenizer)}"]
    description = f"{label}: {', '.join(parts)}"
    if tokenizer.kind != "bytes":
        description += f" of {meta.size / (len(train) + len(valid)):.2f} bytes"
    if meta.left_out:
        what = "binary or empty file" if meta.documents == meta.files else "empty document"
        description += f" ({count(meta.left_out, what)} left out)"
    return Corpus(train, valid, tokenizer, description, meta.sha256)


def _read_meta(folder: Path) -> _Meta | None:
    """Read a folder's meta.json; None where the folder does not exist or is not whole."""
    try:
        values = read_json(folder / _META)
        meta = _Meta(**{**values, "shards": [Shard(*shard) for shard in values["shards"]]})
        size = np.dtype(meta.dtype).itemsize
        expected = {shard.name: shard.tokens * size for shard in meta.shards} | {_STARTS: 8 * meta.documents}
        fits = all((folder / name).stat().st_size == length for name, length in expected.items())
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return meta if fits and meta.format == FORMAT else None


def _is_whole(folder: Path) -> bool:
    return _read_meta(folder) is not None


def _from_standard_input(plan: _Plan, sha256: str | None, report: Report | None) -> Path:
    """Build the corpus of standard input; with `sha256`, the cache has lost the corpus of this hash."""
    gone = "the text that came from standard input is no longer in the cache" if sha256 else "nothing comes"
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError(f"{gone}: give it on standard input")
    with spool(_corpora()) as inner:
        block = sys.stdin.buffer.read(BLOCK)
        if sha256 is not None and not block:
            raise ValueError(f"{gone}: give it on standard input again")
        path = inner / f"input{'' if plan.field is None else '.jsonl'}{packed_suffix(block)}"
        digest = hashlib.sha256()
        with path.open("wb") as file:
            while block:
                digest.update(block)
                file.write(block)
                block = sys.stdin.buffer.read(BLOCK)
        opened = FileSource("standard input", [path], path, plan.field or TEXT, "standard input")
        folder = _corpora() / plan.key(["standard input", digest.hexdigest()])
        build_once(folder, lambda aside: _build(aside, opened, plan, report), _is_whole)
    return folder


def _find(sha256: str, plan: _Plan) -> Path | None:
    """Find a finished corpus by its hash; folders of unfinished ones have a suffix."""
    for folder in sorted(path for path in _corpora().glob("*") if not path.suffix):
        meta = _read_meta(folder)
        if meta is not None and (meta.sha256, meta.tokenizer) == (sha256, plan.tokenizer.sha256):
            return folder
    return None


def _build(folder: Path, source: Source, plan: _Plan, report: Report | None) -> None:
    """Tokenise a source into a folder."""
    dtype, size = plan.tokenizer.dtype, 0
    with contextlib.ExitStack() as stack:
        parts = [_Part(stack, Writer(folder, name, dtype), plan.tokenizer) for name in ("train", "valid")]
        for document in source.documents():
            part = parts[_is_held_out(document.name, plan.valid_fraction)]
            for piece in plan.tokenizer.cut(document.blocks):
                size += len(piece)
                part.add(piece)
                if report is not None:
                    report(len(piece))
            part.end_document()
        for part in parts:
            part.flush()
    writers = [part.writer for part in parts]
    join_starts(folder, writers, folder / _STARTS)
    cut, held = _split(writers[0], writers[1], plan.valid_fraction)
    content = [plan.tokenizer.sha256, cut, *(writer.digest for writer in writers)]
    meta = _Meta(
        FORMAT,
        dtype.str,
        [shard for writer in writers for shard in writer.shards],
        cut,
        sum(writer.documents for writer in writers),
        held,
        source.files,
        source.left_out,
        size,
        hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        plan.tokenizer.sha256,
        source.label,
        plan.field,
        plan.valid_fraction,
    )
    (folder / _META).write_text(json.dumps(dataclasses.asdict(meta), indent=1), encoding="utf-8")


def _is_held_out(key: str, valid_fraction: float) -> bool:
    """Tell whether a document is held out; the answer depends on no other document."""
    digest = hashlib.sha256(os.fsencode(key)).digest()
    return int.from_bytes(digest[:8], "big") < valid_fraction * 2**64


def _split(train: Writer, valid: Writer, valid_fraction: float) -> tuple[int, int | None]:
    """Where validation begins, and its number of documents; None: it is the end of all tokens."""
    total = train.tokens + valid.tokens
    if train.tokens and valid_fraction / 2 <= valid.tokens / total <= 2 * valid_fraction:
        return train.tokens, valid.documents
    return round(total * (1 - valid_fraction)), None


class _Part:
    """Writes training or validation tokens: encodes many pieces at once, and marks where documents begin."""

    def __init__(self, stack: contextlib.ExitStack, writer: Writer, tokenizer: Tokenizer) -> None:
        stack.callback(writer.close)
        self.writer, self._tokenizer = writer, tokenizer
        # Pieces, whether each begins a document, and whether each ends one.
        self._pieces: list[bytes] = []
        self._begins: list[bool] = []
        self._ends: list[bool] = []
        self._size, self._new = 0, True

    def add(self, piece: bytes) -> None:
        """Add the next piece of a document."""
        if self._size + len(piece) > _TOGETHER or len(self._pieces) == _PIECES:
            self.flush()
        self._pieces.append(piece)
        self._begins.append(self._new)
        self._ends.append(False)
        self._size, self._new = self._size + len(piece), False

    def end_document(self) -> None:
        """End a document: the next piece begins another."""
        self._ends[-1] = self._new = True

    def flush(self) -> None:
        """Write the pieces that have been added."""
        if not self._pieces:
            return
        arrays = self._tokenizer.encode_many(self._pieces)
        if self._tokenizer.end is not None:
            last = np.array([self._tokenizer.end], dtype=self._tokenizer.dtype)
            arrays = [
                np.concatenate([ids, last]) if ends else ids for ids, ends in zip(arrays, self._ends, strict=True)
            ]
        lengths = np.array([len(ids) for ids in arrays], dtype=np.int64)
        starts = (np.cumsum(lengths) - lengths)[np.array(self._begins)]
        self.writer.write(np.concatenate(arrays), starts)
        self._pieces, self._begins, self._ends, self._size = [], [], [], 0
