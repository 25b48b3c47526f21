"""gateloop eval."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gateloop_transformer.cli.flags import add_checkpoint, add_dtype, add_field, bytes_bar, folder

if TYPE_CHECKING:
    from gateloop_transformer.data.documents import Source


def add_parser(commands: Any) -> None:
    from gateloop_transformer.data.documents import SOURCES

    parser = commands.add_parser(
        "eval",
        help="bits per byte of a trained model on any text",
        description="Bits per byte, each document read once from start to end with the state carried along.",
    )
    parser.add_argument("dir", metavar="DIR", type=folder, help="folder of a run")
    parser.add_argument("data", metavar="DATA", help=SOURCES)
    add_field(parser)
    parser.add_argument("--device", default="auto", metavar="WORD", help="auto, cpu, cuda, ... (default: auto)")
    add_dtype(parser)
    add_checkpoint(parser)
    parser.add_argument("--json", action="store_true", help='print {"bits_per_byte": ..., "bytes": ...}')


def run(arguments: argparse.Namespace) -> None:
    from gateloop_transformer.data.documents import count
    from gateloop_transformer.data.sources import open_source
    from gateloop_transformer.data.tokenizer import encode_document
    from gateloop_transformer.layers.quantized import quantize
    from gateloop_transformer.training.checkpoint import weights_file
    from gateloop_transformer.training.evaluation import Score, score
    from gateloop_transformer.training.folder import load_model, load_tokenizer, pick_device

    source = open_source(arguments.data, field=arguments.field)
    counts = _Counts()
    texts = counts.texts(source)
    # Data that cannot be read is refused before the model is looked at.
    documents = itertools.chain([next(texts)], texts)
    tokenizer = load_tokenizer(arguments.dir)
    weights = weights_file(arguments.dir, arguments.checkpoint)
    model = quantize(load_model(arguments.dir, weights), arguments.dtype).to(pick_device(arguments.device))
    total = Score(0.0, 0)
    with bytes_bar(source.size()) as bar:
        for document in documents:
            ids = encode_document(tokenizer, document)
            new = score(model, ids, tokenizer, report=bar.update)
            total = Score(total.nats + new.nats, total.size + new.size)
    result = {
        "bits_per_byte": total.bits_per_byte,
        "bytes": counts.size,
        "files": source.files,
        "documents": counts.documents,
    }
    of_files = counts.documents + counts.short == source.files
    for number, what in ((source.left_out, "empty"), (counts.short, "single-byte")):
        if number:
            left_out = count(number, f"{what} file" if of_files else f"{what} document")
            print(f"gateloop eval: {left_out} left out", file=sys.stderr)
    if arguments.json:
        print(json.dumps(result))
        return
    where = count(counts.documents, "file" if of_files else "document")
    print(f"{result['bits_per_byte']:.4f} bits per byte over {counts.size:,} bytes in {where}")


class _Counts:
    """What was read: texts, their bytes, and texts of a single byte, in which nothing can be predicted."""

    def __init__(self) -> None:
        self.documents = self.size = self.short = 0

    def texts(self, source: Source) -> Iterator[Iterator[bytes]]:
        """The blocks of each text of two bytes or more.

        Raises:
            ValueError: there is none.
        """
        for document in source.documents(binary=True):
            first = next(document.blocks)
            if len(first) < 2:
                self.short += 1
                continue
            self.documents += 1
            yield self._counted(itertools.chain([first], document.blocks))
        if not self.documents:
            raise ValueError(f"{source.label} is too short: evaluation needs at least 2 bytes of text")

    def _counted(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        for block in blocks:
            self.size += len(block)
            yield block
