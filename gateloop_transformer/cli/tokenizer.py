"""The command `gateloop tokenizer`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateloop_transformer.cli.flags import add_field
from gateloop_transformer.cli.parser import Parser
from gateloop_transformer.cli.progress import bar
from gateloop_transformer.waiting import waiting

if TYPE_CHECKING:
    from gateloop_transformer.data.documents import Source


HELP = "make a BPE tokenizer"
DESCRIPTION = "Make a BPE tokenizer."


def add_arguments(parser: Parser) -> None:
    """Add the command's flags."""
    from gateloop_transformer.data.documents import SOURCES

    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = actions.add_parser(
        "train",
        help="learn a byte-level BPE tokenizer from text",
        description="Learn a byte-level BPE tokenizer from text, for 'gateloop train --tokenizer FILE'. The file is a "
        "tokenizer.json that Hugging Face's transformers read too. The same text gives the same file.",
    )
    train.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help=f"{SOURCES} (default: the sources of this Python's standard library)",
    )
    train.add_argument("--vocab-size", type=int, required=True, metavar="N", help="number of tokens, at least 257")
    train.add_argument("--out", type=Path, required=True, metavar="FILE", help="the tokenizer.json to write")
    train.add_argument("--overwrite", action="store_true", help="replace the file")
    add_field(train)
    train.add_argument(
        "--limit-bytes", type=int, metavar="N", help="learn from the first N bytes only (default: from all)"
    )
    train.add_argument(
        "--json", action="store_true", help='print {"tokens": ..., "bytes": ..., "bytes_per_token": ...}'
    )


def run(arguments: argparse.Namespace) -> None:
    """Make a tokenizer."""
    from gateloop_transformer.data.bpe import train_tokenizer
    from gateloop_transformer.data.sources import open_source
    from gateloop_transformer.files import make_folder

    path, limit = arguments.out, arguments.limit_bytes
    if path.is_dir():
        raise ValueError(f"--out: {str(path)!r} is a folder, not a file")
    if path.exists() and not arguments.overwrite:
        raise ValueError(f"{str(path)!r} already exists: replace it with --overwrite")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit-bytes must be at least 1, not {limit}")
    make_folder(path.parent)
    with waiting("opening the data"):
        source = open_source(arguments.data, field=arguments.field)
    texts = _Texts(source, limit)
    with bar("reading", limit or source.size()) as progress, contextlib.ExitStack() as learning:
        tokenizer = train_tokenizer(texts.read(progress, learning), arguments.vocab_size)
    tokens = sum(len(ids) for ids in tokenizer.encode_many(list(tokenizer.cut(texts.sample))))
    tokenizer.save_as(path)
    size = sum(map(len, texts.sample))
    result = {
        "tokens": tokenizer.size,
        "bytes": texts.size,
        "bytes_per_token": size / tokens,
        "sha256": tokenizer.sha256,
        "file": str(path),
    }
    if arguments.json:
        print(json.dumps(result))
        return
    fewer = "" if tokenizer.size == arguments.vocab_size else f" (the text does not give {arguments.vocab_size:,})"
    print(
        f"{tokenizer.size:,} tokens{fewer} from {texts.size:,} bytes, {size / tokens:.2f} bytes per token\n"
        f"tokenizer: {path} ({os.path.getsize(path):,} bytes)"
    )


class _Texts:
    """Reads the documents of a source up to a number of bytes; keeps the first few million bytes as a sample."""

    def __init__(self, source: Source, limit: int | None) -> None:
        self._source, self._limit, self._room = source, limit, 1 << 22
        self.size = 0
        self.sample: list[bytes] = []

    def read(self, bar: Any, learning: contextlib.ExitStack) -> Iterator[Iterator[bytes]]:
        """Yield the blocks of each document; when all are read, enter `learning`, as the long part then begins."""
        for document in self._source.documents():
            if self._limit is not None and self.size >= self._limit:
                break
            yield self._blocks(document.blocks, bar)
        learning.enter_context(waiting("learning tokens from what was read"))

    def _blocks(self, blocks: Iterator[bytes], bar: Any) -> Iterator[bytes]:
        for block in blocks:
            left = len(block) if self._limit is None else self._limit - self.size
            part = block[:left]
            self.size += len(part)
            bar.update(len(part))
            if self._room > 0:
                self.sample.append(part[: self._room])
                self._room -= len(part)
            if part:
                yield part
            if len(part) < len(block):
                return
